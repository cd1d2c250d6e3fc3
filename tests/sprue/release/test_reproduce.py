"""A registered version is fitted once more from its record, and its weights are compared."""

from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch

from sprue.errors import SprueError
from sprue.inference.calibration import Calibration
from sprue.inference.detector import Detector
from sprue.release.reproduce import reproduce
from sprue.tracking.digests import digest_tags
from sprue.tracking.lineage import COLUMNS, Lineage, NoRecordError
from sprue.tracking.registry import find_registered, register
from sprue.tracking.runs import FitRun
from sprue.tracking.server import experiment_id
from sprue.training.record import FitRecord
from sprue.training.worker import fit_flow


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def fitted(spec, store):
    """The record of a fit of the plan in this process."""
    torch.set_num_threads(1)
    reports = []
    fit_flow(spec, store / "plant" / "features", torch.device("cpu"), lambda *report: reports.append(report))
    epoch, checkpoint = min(reports, key=lambda report: report[0].validation_nll)
    return FitRecord(spec, epoch.epoch, checkpoint.history, "abc", 1, checkpoint.flow)


def registered(fit, folder, store, dataset, key="k1"):
    """A version with the fit's flow and record."""
    spec = fit.spec
    scores = np.linspace(0, 1, 20, dtype=np.float32)
    calibration = Calibration.fit(scores, scores[:, None], alpha=0.1)
    detector = Detector("plant", "brick", spec.features, spec.flow_name, fit.build_flow(), spec.scoring, calibration)
    detector.save(Path(folder) / "artifacts" / "detector")
    run = FitRun.open(experiment_id(dataset, store), "brick", spec.key, spec.params)
    Lineage((fit.facts,), "", pd.DataFrame(columns=COLUMNS)).log(run.run_id, key)
    digests = digest_tags(Path(folder) / "artifacts" / "detector")
    register(dataset, "brick", str(folder), run.run_id, key, digests, "")
    return find_registered(f"{dataset}.brick", "1")


def test_the_weights_are_equal_bit_for_bit(store, plan, tmp_path):
    fit = fitted(plan, store)
    seen = []
    found = reproduce(registered(fit, tmp_path, store, "same"), store, lambda epoch: seen.append(epoch.epoch))
    assert (found.equal, found.largest, found.epochs) == (True, 0.0, (fit.best_epoch,))
    assert seen == [1, 2, 3]


def test_other_weights_are_found(store, plan, tmp_path):
    fit = fitted(plan, store)
    name = next(name for name, value in fit.state.items() if value.is_floating_point())
    fit.state[name].view(-1)[0] += 0.25
    found = reproduce(registered(fit, tmp_path, store, "other"), store, lambda epoch: None)
    assert not found.equal
    assert found.largest == pytest.approx(0.25)


def test_what_can_not_be_reproduced_is_said(store, plan, tmp_path):
    (tmp_path / "bare").mkdir()
    register("bare", "brick", str(tmp_path / "bare"), "", "k1", {}, "")
    with pytest.raises(NoRecordError, match="was not registered by the pipeline"):
        reproduce(find_registered("bare.brick", "1"), store, lambda epoch: None)

    fit = fitted(plan, store)
    version = registered(fit, tmp_path / "lost", store, "lost")
    with pytest.raises(SprueError, match=r"class brick has no features in .*; run the features stage first"):
        reproduce(version, store / "elsewhere", lambda epoch: None)

    two = plan.model_copy(update={"fit": plan.fit.model_copy(update={"workers": 2})})
    version = registered(FitRecord(two, 1, [], "abc", 1, fit.state), tmp_path / "two", store, "two")
    with pytest.raises(SprueError, match=r"two\.brick version 1 was fitted by 2 workers; one process does not sum"):
        reproduce(version, store, lambda epoch: None)
    assert mlflow.active_run() is None
