"""A cluster's cores and GPUs are divided among fits."""

import pytest

from sprue.config import FitSettings
from sprue.errors import SprueError
from sprue.training.placement import FitPlacement, fit_placement


@pytest.fixture
def cluster_of(monkeypatch):
    """Makes Ray say that the cluster has nodes of these resources."""

    def make(*resources):
        monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": each} for each in resources])

    return make


@pytest.mark.parametrize(
    ("cores", "workers", "expected"),
    [([8, 8], 3, (1, 4)), ([5, 5], 3, (1, 2)), ([3, 3, 3], 4, (1, 1)), ([4, 4], 3, (1, 2)), ([16], 1, (1, 16))],
)
def test_workers_that_span_machines_find_room(cluster_of, cores, workers, expected):
    cluster_of(*({"CPU": float(count)} for count in cores))
    placement = fit_placement(1, FitSettings(workers=workers))
    assert (placement.groups, placement.cpus) == expected


@pytest.mark.parametrize(
    ("fits", "workers", "gpus", "expected"),
    [(9, 1, 1.0, (3, 1.0)), (9, 1, 0.25, (6, 0.25)), (2, 1, 0.25, (2, 0.25)), (9, 2, 1.0, (1, 1.0))],
)
def test_fits_share_gpus_as_far_as_there_are_cores_beside_them(cluster_of, fits, workers, gpus, expected):
    cluster_of({"CPU": 8.0, "GPU": 1.0}, {"CPU": 2.0, "GPU": 2.0}, {"CPU": 16.0}, {"GPU": 1.0})
    placement = fit_placement(fits, FitSettings(workers=workers, gpus=gpus))
    assert (placement.groups, placement.gpus) == expected


def test_cores_are_divided_among_fits(cluster_of):
    cluster_of({"CPU": 2.0})
    found = [fit_placement(count, FitSettings()) for count in (1, 2, 3)]
    assert [(each.groups, each.cpus) for each in found] == [(1, 2), (2, 1), (2, 1)]


def test_a_fit_of_changing_size_begins_with_the_workers_that_there_are(cluster_of):
    cluster_of({"CPU": 1.0}, {"CPU": 1.0})
    assert fit_placement(1, FitSettings(workers=4, min_workers=2)) == FitPlacement(1, 4, 1, 0, 2)
    with pytest.raises(SprueError, match=r"fit\.min_workers: 3 workers .* need a CPU each; the Ray cluster has 2"):
        fit_placement(1, FitSettings(workers=4, min_workers=3))


def test_room_is_found_on_machines_that_have_joined(cluster_of):
    cluster_of({"CPU": 2.0})
    on_cores, on_gpus = FitPlacement(1, 1, 2, 0), FitPlacement(1, 2, 1, 0.5)
    assert (on_cores.room(), on_gpus.room()) == (1, 0)
    cluster_of({"CPU": 2.0}, {"CPU": 5.0, "GPU": 2.0})
    assert (on_cores.room(), on_gpus.room()) == (3, 2)
