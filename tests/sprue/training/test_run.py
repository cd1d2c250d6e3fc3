"""Ray Train fits the classes side by side, and only those that are not finished."""

import os
import sys
import time
from dataclasses import asdict

import psutil
import pytest
import torch
from ray.cloudpickle import register_pickle_by_value
from ray.util import placement_group_table
from ray.util.state import list_actors, list_tasks
from upath import UPath

from sprue.errors import SprueError
from sprue.training import worker_groups
from sprue.training.run import fit_classes
from sprue.training.worker import fit_flow

MULTIFLOW = {"name": "multiflow", "hidden": 4, "steps": 2, "adaptation": "whiten", "views": 2}


def fitted_here(spec, folder):
    """The epochs and checkpoints of the same fit without Ray."""
    reports = []
    fit_flow(spec, UPath(folder / "features"), torch.device("cpu"), lambda *report: reports.append(report))
    return reports


def fit(specs, folder, on_epoch=lambda name, epoch: None, **arguments):
    return fit_classes(specs, UPath(folder / "features"), UPath(folder / "runs"), on_epoch, **arguments)


@pytest.fixture(scope="module")
def dataset(cluster, make_spec, tmp_path_factory):
    """A good class, one that can't be fitted and one of several views, fitted in one go: specs, outcomes, epochs."""
    folder, seen = tmp_path_factory.mktemp("dataset"), []
    specs = [
        make_spec(folder, "brick"), make_spec(folder, "grass", broken=True),
        make_spec(folder, "box", views=2, flow=MULTIFLOW),
    ]  # fmt: skip
    return folder, specs, fit(specs, folder, lambda name, epoch: seen.append((name, epoch))), seen


def test_classes_are_fitted_and_one_that_fails_stops_no_other(cluster, dataset):
    folder, (good, _, _), (ours, failed, _), seen = dataset
    assert (failed.fit, failed.best, failed.history) == ("grass", None, [])
    assert "the likelihood stopped being finite in epoch 1" in failed.failure
    assert "\n" not in failed.failure

    assert (ours.fit, ours.failure) == ("brick", "")
    assert [row["epoch"] for row in ours.history] == [1, 2, 3]
    assert [asdict(epoch) for name, epoch in seen if name == "brick"] == ours.history
    assert {name for name, _ in seen} == {"brick", "box"}
    assert ours.best.epoch == min(ours.history, key=lambda row: row["validation_nll"])["epoch"]
    if not torch.cuda.is_available():
        expected = fitted_here(good, folder)
        best = expected[ours.best.epoch - 1][1]
        nlls = [row["validation_nll"] for row in ours.history]
        assert nlls == pytest.approx([epoch.validation_nll for epoch, _ in expected], rel=1e-4)
        for key, value in best.flow.items():
            torch.testing.assert_close(ours.best.flow[key], value, rtol=1e-3, atol=1e-4)

    (queue,) = list_actors(cluster, filters=[("class_name", "=", "ClassQueue")])
    assert queue.name.startswith("fits of brick, grass, box (")
    assert not list_actors(cluster, filters=[("class_name", "=", "DatasetManager")])

    repeated = []
    (second,) = fit([good], folder, lambda name, epoch: repeated.append(name))
    assert repeated == []
    assert second.history == ours.history
    assert second.best.epoch == ours.best.epoch
    assert all(torch.equal(value, ours.best.flow[key]) for key, value in second.best.flow.items())


def test_after_the_death_of_its_process_a_fit_resumes(cluster, make_spec, tmp_path):
    spec = make_spec(tmp_path, epochs=5)
    seen, killed, named = [], [], []

    def kill_once(name, epoch):
        seen.append(epoch.epoch)
        if not killed:
            processes = psutil.Process().children(recursive=True)
            workers = [each for each in processes if "ray::RayTrainWorker" in each.name()]
            killed.extend(worker.kill() for worker in workers)
        if epoch.epoch == 5:
            # Processes tell Ray of their tasks a second later, on a busy machine later than that.
            deadline = time.monotonic() + 60
            while not named and time.monotonic() < deadline:
                time.sleep(0.5)
                named.extend(list_tasks(cluster, filters=[("name", "=", "brick epoch 4")]))

    (fitted,) = fit([spec], tmp_path, kill_once, synchronous=True)
    assert killed
    assert named, "Ray shows no epoch by its name"
    assert fitted.failure == ""
    assert seen == [row["epoch"] for row in fitted.history] == [1, 2, 3, 4, 5]
    if not torch.cuda.is_available():
        torch.set_num_threads(2)
        states = {epoch.epoch: checkpoint.flow for epoch, checkpoint in fitted_here(spec, tmp_path)}
        expected = states[fitted.best.epoch]
        assert all(torch.equal(value, fitted.best.flow[key]) for key, value in expected.items())


class DiesOnce:
    """The worker's function; the first worker that unpickles it is killed, after its group has been created."""

    def __init__(self, function, marker):
        self.function, self.marker = function, str(marker)

    def __call__(self, config):
        self.function(config)

    def __reduce__(self):
        code = (
            "(lambda os, function: function if os.path.exists({0!r}) or 'RayTrainWorker' not in "
            "open('/proc/self/cmdline').read() else os.close(os.open({0!r}, os.O_CREAT)) or os.kill(os.getpid(), 9))"
        )
        return _apply, (code.format(self.marker), self.function)


def _apply(code, function):
    return eval(code)(os, function)


def test_a_worker_that_dies_while_its_group_starts_leaves_no_room_reserved(cluster, make_spec, tmp_path, monkeypatch):
    marker = tmp_path / "died"
    register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(worker_groups, "fit_worker", DiesOnce(worker_groups.fit_worker, marker))
    monkeypatch.setattr(worker_groups, "RETRY_S", 0.0)
    (fitted,) = fit([make_spec(tmp_path)], tmp_path)
    assert marker.exists()
    assert (fitted.failure, [row["epoch"] for row in fitted.history]) == ("", [1, 2, 3])
    left = [each for each in placement_group_table().values() if each["state"] != "REMOVED"]
    assert left == []


def test_samples_of_several_views_are_fitted_together(dataset):
    folder, (*_, spec), (*_, fitted), _ = dataset
    assert (spec.views, spec.params["train_images"], spec.params["flow.maps"]) == (2, 10, [1])
    assert fitted.failure == ""
    if not torch.cuda.is_available():
        expected = [epoch.validation_nll for epoch, _ in fitted_here(spec, folder)]
        assert [row["validation_nll"] for row in fitted.history] == pytest.approx(expected, rel=1e-4)


def test_two_workers_learn_what_one_does(cluster, make_spec, plan_of, tmp_path):
    # Noise, a stride and batches of odd sizes: each worker's random numbers must be its part of those of one.
    flow = {"name": "patchflow", "adapted": 6, "bottleneck": 8, "noise": 0.2, "noise_scheme": "uniform", "stride": 2}
    settings = {"flow": flow, "precision": "float32"}  # parts of a batch are rounded otherwise than all of it
    alone, shared = make_spec(tmp_path, **settings), plan_of(tmp_path, **settings, workers=2)
    (found,) = fit([shared], tmp_path)
    assert found.failure == ""
    expected = fitted_here(alone, tmp_path)
    for metric in ("train_nll", "validation_nll", "learning_rate"):
        assert [row[metric] for row in found.history] == pytest.approx(
            [getattr(epoch, metric) for epoch, _ in expected], rel=1e-5
        )
    best = expected[found.best.epoch - 1][1]
    for key, value in best.flow.items():
        torch.testing.assert_close(found.best.flow[key], value, rtol=1e-3, atol=1e-5)


def test_more_workers_than_the_cluster_has_room_for_are_refused(cluster, make_spec, tmp_path):
    spec = make_spec(tmp_path, workers=64)
    with pytest.raises(SprueError, match=r"fit\.workers: 64 workers of a fit need a .PU each; the Ray cluster has"):
        fit([spec], tmp_path)
