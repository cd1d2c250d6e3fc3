"""A trial fits at a point and reports the objective after each epoch, here without a cluster."""

import warnings

import numpy as np
import pytest
import ray
import torch
from upath import UPath

from sprue.search.objective import Objective
from sprue.search.trial import Trial, read_checkpoint, read_trial_data
from sprue.training.dataloader import InMemoryDataLoader
from sprue.training.placement import FitPlacement
from sprue.training.worker import fit_flow

POINT = {"flow.steps": 2, "fit.learning_rate": 0.02}
ONE = FitPlacement(groups=1, workers=1, cpus=1, gpus=0)


@pytest.fixture
def trial(case, monkeypatch):
    """The trials of the class; their data are in this process."""
    monkeypatch.setattr(ray, "get", lambda data: data)
    data = read_trial_data(case.spec, case.features)
    return Trial(case.spec, 3, data, case.features, ONE, case.runs)


@pytest.fixture
def reports(monkeypatch):
    """What is reported to Ray Tune: metrics and checkpoints."""
    found = []

    def report(metrics, checkpoint=None):
        found.append((metrics, None if checkpoint is None else read_checkpoint(checkpoint)))

    monkeypatch.setattr(ray.tune, "report", report)
    monkeypatch.setattr(ray.tune, "get_checkpoint", lambda: None)
    return found


def fitted_here(case, point):
    expected = []
    spec = case.spec.with_values(point, epochs=3)
    fit_flow(spec, case.features, torch.device("cpu"), lambda *report: expected.append(report))
    return spec, expected


def test_a_trial_is_the_fit_at_its_point_with_an_objective_for_each_epoch(trial, reports, case):
    trial(POINT)
    spec, expected = fitted_here(case, POINT)
    objective = Objective(trial.data.validation, trial.data.synthetic, spec.scoring)
    assert [metrics["epoch"] for metrics, _ in reports] == [1, 2, 3]
    for (metrics, checkpoint), (epoch, state) in zip(reports, expected, strict=True):
        assert metrics["validation_nll"] == epoch.validation_nll
        assert metrics["objective"] == objective(spec.flow_name, spec.flow_config, state.flow)
        assert all(torch.equal(value, checkpoint.flow[name]) for name, value in state.flow.items())


def test_an_interrupted_trial_resumes_after_its_last_checkpoint(trial, reports, monkeypatch, tmp_path):
    trial(POINT)
    undisturbed, first = reports[-1], reports[0][1]
    reports.clear()
    first.write(UPath(tmp_path / "stored"))
    stored = ray.tune.Checkpoint.from_directory(str(tmp_path / "stored"))
    monkeypatch.setattr(ray.tune, "get_checkpoint", lambda: stored)
    trial(POINT)
    assert [metrics["epoch"] for metrics, _ in reports] == [2, 3]
    assert reports[-1][0]["objective"] == undisturbed[0]["objective"]
    assert all(torch.equal(value, undisturbed[1].flow[name]) for name, value in reports[-1][1].flow.items())


def test_a_fit_that_diverges_is_reported_as_one_that_detects_nothing(trial, reports):
    trial({"fit.learning_rate": 1e20, "fit.gradient_norm": 1e30})
    metrics, checkpoint = reports[-1]
    assert (metrics["epoch"], metrics["objective"], checkpoint) == (len(reports), 0.0, None)
    assert "the likelihood stopped being finite" in metrics["failure"]


def test_trials_share_what_fits_into_their_memory(case):
    def data(**fit):
        spec = case.spec.model_copy(update={"fit": case.spec.fit.model_copy(update=fit)})
        return read_trial_data(spec, case.features)

    table, shared = case.spec.table(case.features), data()
    for maps, samples in ((shared.train, case.spec.train), (shared.validation, case.spec.validation)):
        assert all(map(np.array_equal, maps, table.read_samples(samples, 1)))
    assert [len(map_NCHW) for map_NCHW in shared.synthetic] == [104, 104]
    for fit in ({"workers": 2}, {"memory": 1e-9}):
        alone = data(**fit)
        assert alone.train == []
        assert all(map(np.array_equal, alone.validation, shared.validation))


def test_maps_that_can_not_be_written_to_are_read_without_a_copy_and_a_warning():
    map_NCHW = np.ones((2, 1, 3, 3), np.float16)
    map_NCHW.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataloader = InMemoryDataLoader.of([map_NCHW])
    assert dataloader.maps[0].data_ptr() == map_NCHW.__array_interface__["data"][0]


def test_a_trial_reserves_what_it_computes_with(trial, case):
    assert trial.resources == {"cpu": 1, "gpu": 0}
    several = Trial(case.spec, None, trial.data, case.features, FitPlacement(1, 2, 1, 0), case.runs)
    assert set(several.resources) == {"memory"}, "Ray Train reserves the workers' cores"
