"""A fit's run is opened with its first epoch, and a server that does not answer stops no fit."""

import json
import time
from contextlib import closing, contextmanager
from itertools import groupby

import mlflow
import pytest
import yaml

from sprue.config import DatasetSettings
from sprue.params import find_recipe
from sprue.stages.fit_runs import FitRuns
from sprue.stages.runtime import Context
from sprue.tracking.server import experiment_id
from sprue.training.loop import Epoch
from sprue.training.plan import ClassPlan


def epoch(number):
    return Epoch(number, 3.0 - number, 4.0 - number, 1e-3, 2.0, 50.0, "float32", time.time())


def history(*numbers):
    return [{"epoch": number, "train_nll": 0.0, "validation_nll": 0.0, "time": 1.0} for number in numbers]


@pytest.fixture
def found(store):
    """The runs of the dataset by name: status, epochs that have a metric, parent."""

    def runs():
        client = mlflow.MlflowClient()
        return {
            run.info.run_name: (
                run.info.status,
                sorted(metric.step for metric in client.get_metric_history(run.info.run_id, "train_nll")),
                run.data.tags.get("mlflow.parentRunId"),
            )
            for run in client.search_runs([experiment_id("plant", store)])
        }

    return runs


@pytest.fixture
def context(store):
    settings = DatasetSettings.model_validate_json(json.dumps(yaml.safe_load(find_recipe("patchflow-cpu").read_text())))
    return Context("plant", settings, store / "images", store)


def renamed(spec, name, **changes):
    return spec.model_copy(update={"class_name": name, **changes})


@contextmanager
def runs_of(context, specs):
    """The runs of fits of one class or of several; all is written at the end."""
    of_class = [tuple(fits) for _, fits in groupby(specs, lambda spec: spec.class_name)]
    with closing(FitRuns(context, [ClassPlan(fits=fits) for fits in of_class], specs)) as runs:
        yield runs


def test_a_run_begins_with_the_first_epoch_and_goes_on_after_the_fit(context, plan, found):
    specs = [renamed(plan, name) for name in ("alone", "late")]
    with runs_of(context, specs):
        pass
    assert not found()
    with runs_of(context, specs) as runs:
        runs.log_epoch("alone", epoch(1))
    assert found() == {"alone": ("RUNNING", [1], None)}
    with runs_of(context, specs) as runs:
        runs.complete(specs[0], history(1, 2))
    assert found() == {"alone": ("RUNNING", [1, 2], None)}
    with runs_of(context, specs) as runs:
        runs.fail(specs[1])
    assert found()["late"] == ("FAILED", [], None)


def test_the_run_of_a_fold_is_below_that_of_its_class(context, plan, found):
    specs = [renamed(plan, "folded", fold=fold, fit=plan.fit.model_copy(update={"seed": fold})) for fold in (1, 2)]
    with runs_of(context, specs) as runs:
        for spec in specs:
            runs.log_epoch(spec.name, epoch(1))
        runs.complete(specs[0], history(1))
        runs.fail(specs[1])
    after = found()
    assert {after[spec.name][0] for spec in specs} == {"FINISHED", "FAILED"}
    assert len({after[spec.name][2] for spec in specs}) == 1
    assert after["folded"] == ("FAILED", [], None)


def test_what_a_server_did_not_take_is_sent_with_the_next_epoch(context, plan, found, away_once, caplog):
    spec = renamed(plan, "restarted")
    with runs_of(context, [spec]) as runs:
        runs.log_epoch(spec.name, epoch(1))
        runs.log_epoch(spec.name, epoch(2))
    assert "the tracking server did not answer (no answer)" in caplog.text
    assert found()["restarted"] == ("RUNNING", [1, 2], None)
