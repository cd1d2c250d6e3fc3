"""Epochs of trials are printed, and logged to a run for each trial on the tracking server."""

import logging
import pickle
from types import SimpleNamespace

import mlflow
import pytest

from sprue.search.progress import Progress, TrialRuns
from sprue.tracking.runs import KEY_TAG, FitRun
from sprue.tracking.server import experiment_id

POINT = {"flow.steps": 2, "fit.learning_rate": 0.02}


def trial_of(number, point=POINT):
    """A trial, as Ray Tune passes it to a callback."""
    return SimpleNamespace(trial_id=f"t{number}", config={**point, "number": number})


def result_of(epoch, objective):
    rates = {
        "learning_rate": 0.01,
        "seconds": 2.0,
        "images_per_second": 11.0,
        "precision": "float32",
        "time": 1.7e9 + epoch,
    }
    return {"epoch": epoch, "train_nll": 1.5, "validation_nll": 1.0 / epoch, **rates, "objective": objective, "pid": 7}


@pytest.fixture
def trial_runs(case, store, request):
    experiment = experiment_id(request.node.name, store)
    parent = FitRun.open(experiment, "search-brick", "s", {})
    return TrialRuns(case.spec, 3, experiment, parent.run_id, {"sprue.commit": "abc"})


def logged(trial_runs, point=POINT):
    """The run of a trial, and the steps and values of its objective."""
    key = trial_runs.spec.with_values(point, trial_runs.epochs).key
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([trial_runs.experiment_id], f"tags.`{KEY_TAG}` = 'brick-{key}'")
    return run, [(each.step, each.value) for each in client.get_metric_history(run.info.run_id, "objective")]


def test_epochs_are_printed_and_logged_to_the_trial_s_own_run(trial_runs, caplog):
    caplog.set_level(logging.INFO)
    progress = Progress(trial_runs, trials=6)
    progress.on_trial_result(1, [], trial_of(1), result_of(1, 0.5))
    progress.on_trial_result(2, [], trial_of(2, {**POINT, "flow.steps": 1}), result_of(1, 0.9))
    progress.on_trial_result(3, [], trial_of(1), result_of(2, 0.75))
    progress.on_experiment_end([])
    assert [record.message for record in caplog.records if "trial" in record.message] == [
        f"brick  trial  {trial} of 6  epoch   {epoch}  nll  1.5000  validation  {1 / epoch:.4f}    11.0 images/s   "
        f"30.0 epochs/min  synthetic defects {objective} % (highest {highest} %)"
        for trial, epoch, objective, highest in (
            (1, 1, " 50.0", "50.0"),
            (2, 1, " 90.0", "90.0"),
            (1, 2, " 75.0", "90.0"),
        )
    ]
    run, objectives = logged(trial_runs)
    assert objectives == [(1, 0.5), (2, 0.75)]
    assert run.data.tags["mlflow.parentRunId"] == trial_runs.parent
    assert run.data.tags["sprue.commit"] == "abc"
    assert {name: run.data.params[name] for name in (*POINT, "fit.epochs")} == {
        "flow.steps": "2",
        "fit.learning_rate": "0.02",
        "fit.epochs": "3",
    }
    assert logged(trial_runs, {**POINT, "flow.steps": 1})[1] == [(1, 0.9)]


def test_a_failure_is_a_warning_and_no_epoch(trial_runs, caplog):
    progress = Progress(trial_runs, trials=6)
    failure = "the likelihood stopped being finite"
    progress.on_trial_result(1, [], trial_of(1), {"epoch": 1, "objective": 0.0, "failure": failure})
    progress.on_experiment_end([])
    assert [record.message for record in caplog.records] == [f"brick  trial  1 of 6  {failure}"]
    assert len(mlflow.MlflowClient().search_runs([trial_runs.experiment_id])) == 1  # the search's own


def test_a_resumed_search_continues_the_runs(trial_runs):
    progress = Progress(trial_runs, trials=6)
    progress.on_trial_result(1, [], trial_of(1), result_of(1, 0.5))
    progress.on_experiment_end([])
    resumed = pickle.loads(pickle.dumps(progress))
    assert resumed.best == 0.5
    resumed.on_trial_result(2, [], trial_of(1), result_of(2, 0.75))
    resumed.on_experiment_end([])
    assert logged(trial_runs)[1] == [(1, 0.5), (2, 0.75)]


def test_a_server_that_is_away_is_a_warning_and_gets_the_epochs_later(trial_runs, caplog, away_once):
    progress = Progress(trial_runs, trials=6)
    progress.on_trial_result(1, [], trial_of(1), result_of(1, 0.5))
    progress.on_trial_result(2, [], trial_of(1), result_of(2, 0.75))
    progress.on_experiment_end([])
    assert "the tracking server did not answer" in caplog.text
    assert logged(trial_runs)[1] == [(1, 0.5), (2, 0.75)]
