"""Ray Train fits the classes side by side, and again only what is not finished."""

import hashlib
import math
import time
from dataclasses import asdict, replace

import numpy as np
import psutil
import pytest
import torch
from ray.util.state import list_actors, list_tasks
from upath import UPath

from sprue.errors import SprueError
from sprue.features.tables import write_part
from sprue.training.fit import fit_classes, place_fits
from sprue.training.loop import FitSettings
from sprue.training.worker import FitRequest, fit_flow

FLOW = {"adapted": 6, "bottleneck": 8}


def request_of(folder, class_name, broken=False, **changes):
    """Writes a class's features and asks for a fit of them."""
    rng = np.random.default_rng(0)
    maps = [rng.normal(size=(14, 3, 6, 6)).astype(np.float16), rng.normal(size=(14, 5, 3, 3)).astype(np.float16)]
    if broken:
        maps[0][-1, 0, 0, 0] = math.nan
    names = [hashlib.sha256(f"{class_name}{index}".encode()).hexdigest() for index in range(14)]
    write_part(UPath(folder / class_name), names, maps)
    settings = FitSettings(epochs=3, batch_size=5)
    samples = tuple((name,) for name in names)
    arguments = {"train": samples[:10], "validation": samples[10:], "flow_config": FLOW, "settings": settings}
    return FitRequest(
        class_name, "f" * 16, str(folder / class_name), blocks=2, flow_name="patchflow", **arguments | changes
    )


def request_of_views(folder, views=3):
    """The same pictures as samples of two."""
    one = request_of(folder, "box")
    names = [name for (name,) in one.train + one.validation]
    samples = tuple(zip(names[::2], names[1::2], strict=True))
    flow = {"hidden": 4, "steps": 2, "adaptation": "whiten", "views": views}
    return replace(one, train=samples[:5], validation=samples[5:], flow_name="multiflow", flow_config=flow)


def fitted_here(request):
    """The last epoch and checkpoint of the same fit without Ray."""
    reports = []
    fit_flow(request, torch.device("cpu"), lambda *report: reports.append(report))
    return reports


def test_classes_are_fitted_and_one_that_fails_stops_no_other(cluster, tmp_path):
    good, bad = request_of(tmp_path / "tables", "brick"), request_of(tmp_path / "tables", "grass", broken=True)
    seen = []
    ours, failed = fit_classes([good, bad], UPath(tmp_path / "runs"), lambda name, epoch: seen.append((name, epoch)))

    assert (failed.class_name, failed.best, failed.history) == ("grass", None, [])
    assert "the likelihood stopped being finite in epoch 1" in failed.failure
    assert "\n" not in failed.failure

    assert (ours.class_name, ours.failure) == ("brick", "")
    assert [row["epoch"] for row in ours.history] == [1, 2, 3]
    assert [(name, asdict(epoch)) for name, epoch in seen] == [("brick", row) for row in ours.history]
    assert ours.best.epoch == min(ours.history, key=lambda row: row["validation_nll"])["epoch"]
    if not torch.cuda.is_available():
        expected = fitted_here(good)
        best = expected[ours.best.epoch - 1][1]
        figures = [row["validation_nll"] for row in ours.history]
        assert figures == pytest.approx([epoch.validation_nll for epoch, _ in expected], rel=1e-4)
        for key, value in best.flow.items():
            torch.testing.assert_close(ours.best.flow[key], value, rtol=1e-3, atol=1e-4)

    (queue,) = list_actors(cluster, filters=[("class_name", "=", "FitQueue")])
    assert queue.name.startswith("fits of brick, grass (")

    seen.clear()
    (again,) = fit_classes([good], UPath(tmp_path / "runs"), lambda name, epoch: seen.append(name))
    assert seen == []
    assert again.history == ours.history
    assert again.best.epoch == ours.best.epoch
    assert all(torch.equal(value, ours.best.flow[key]) for key, value in again.best.flow.items())


def test_after_the_death_of_its_process_a_fit_goes_on(cluster, tmp_path):
    request = request_of(tmp_path / "tables", "brick", settings=FitSettings(epochs=5, batch_size=5))
    seen, killed, named = [], [], []

    def kill_once(name, epoch):
        seen.append(epoch.epoch)
        if not killed:
            processes = psutil.Process().children(recursive=True)
            workers = [each for each in processes if "ray::RayTrainWorker" in each.name()]
            killed.extend(worker.kill() for worker in workers)
        if epoch.epoch == 5:
            # Processes tell Ray of their tasks a second later.
            for _ in range(3):
                time.sleep(1)
                named.extend(list_tasks(cluster, filters=[("name", "=", "brick epoch 4")]))

    (fitted,) = fit_classes([request], UPath(tmp_path / "runs"), kill_once, lockstep=True)
    assert killed
    assert named, "Ray shows no epoch by its name"
    assert fitted.failure == ""
    assert seen == [row["epoch"] for row in fitted.history] == [1, 2, 3, 4, 5]
    if not torch.cuda.is_available():
        torch.set_num_threads(2)
        states = {epoch.epoch: checkpoint.flow for epoch, checkpoint in fitted_here(request)}
        expected = states[fitted.best.epoch]
        assert all(torch.equal(value, fitted.best.flow[key]) for key, value in expected.items())


@pytest.mark.parametrize(
    ("cores", "workers", "expected"),
    [([8, 8], 3, (1, 4)), ([5, 5], 3, (1, 2)), ([3, 3, 3], 4, (1, 1)), ([4, 4], 3, (1, 2)), ([16], 1, (1, 16))],
)
def test_workers_that_span_machines_find_room(monkeypatch, cores, workers, expected):
    nodes = [{"Alive": True, "Resources": {"CPU": float(count)}} for count in cores]
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    slots = place_fits(1, workers)
    assert (slots.count, slots.cpus) == expected


def test_cores_are_shared_out(cluster):
    if torch.cuda.is_available():
        pytest.skip("where there is a GPU, fits share it")
    assert [(place_fits(count).count, place_fits(count).cpus) for count in (1, 2, 3)] == [(1, 2), (2, 1), (2, 1)]


def test_a_request_is_checked_before_anything_starts(tmp_path):
    request_of(tmp_path, "brick").check()
    with pytest.raises(SprueError, match=r"class grass has no features in .*; run the features stage first"):
        FitRequest(
            "grass", "f", str(tmp_path / "grass"), 2, (("a",),), (("b",),), "patchflow", FLOW, FitSettings()
        ).check()
    for changes, match in (
        ({"flow_config": {"adapted": 1}}, "flow: adapted: 1 is below 2"),
        ({"flow_config": {"depth": 2}}, "flow: patchflow has no setting 'depth'"),
        ({"flow_config": {"adapted": "many"}}, "flow: "),
    ):
        with pytest.raises(SprueError, match=match):
            request_of(tmp_path, "brick", **changes).check()


def test_samples_of_several_views_are_fitted_together(cluster, tmp_path):
    request = request_of_views(tmp_path / "tables", views=2)
    request.check()
    assert (request.views, request.params()["train_pictures"], request.params()["flow.maps"]) == (2, 10, (1,))
    (fitted,) = fit_classes([request], UPath(tmp_path / "runs"), lambda name, epoch: None)
    assert fitted.failure == ""
    if not torch.cuda.is_available():
        expected = [epoch.validation_nll for epoch, _ in fitted_here(request)]
        assert [row["validation_nll"] for row in fitted.history] == pytest.approx(expected, rel=1e-4)
    with pytest.raises(
        SprueError, match="class box: its samples have 2 pictures each, and multiflow reads 3; set flow"
    ):
        request_of_views(tmp_path / "again").check()
    with pytest.raises(SprueError, match="class box: its samples have 2 pictures each, and patchflow reads 1; choose"):
        replace(request, flow_name="patchflow", flow_config=FLOW).check()


def test_two_workers_learn_what_one_does(cluster, tmp_path):
    # Noise, a stride and batches of odd sizes: what each worker draws must be its part of what one would.
    flow = {**FLOW, "noise": 0.2, "noise_scheme": "uniform", "stride": 2}
    alone = request_of(tmp_path / "tables", "brick", flow_config=flow)
    shared = replace(alone, settings=replace(alone.settings, workers=2))
    (found,) = fit_classes([shared], UPath(tmp_path / "runs"), lambda name, epoch: None)
    assert found.failure == ""
    expected = fitted_here(alone)
    for figure in ("train_nll", "validation_nll", "learning_rate"):
        assert [row[figure] for row in found.history] == pytest.approx(
            [getattr(epoch, figure) for epoch, _ in expected], rel=1e-5
        )
    best = expected[found.best.epoch - 1][1]
    for key, value in best.flow.items():
        torch.testing.assert_close(found.best.flow[key], value, rtol=1e-3, atol=1e-5)


def test_more_workers_than_the_cluster_has_room_for_are_refused(cluster, tmp_path):
    request = request_of(tmp_path / "tables", "brick", settings=FitSettings(workers=64))
    with pytest.raises(SprueError, match=r"fit\.workers: 64 workers of a fit need a .PU each; the Ray cluster has"):
        fit_classes([request], UPath(tmp_path / "runs"), lambda name, epoch: None)
