"""The metrics of fits, as a real Prometheus reads them for the board of training."""

import itertools
import time

import pytest
import ray

from sprue.stages.runtime import init_ray
from sprue.training.loop import Epoch
from sprue.training.metrics import FitMetrics

ON_GPUS = "GPU: utilization, and memory in MB"


@pytest.fixture(scope="module")
def cluster():
    """Ray with metrics each second, so that no test waits for them."""
    often = {"enable_metrics_collection": True, "metrics_report_interval_ms": 1000}
    init_ray(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, _system_config=often)
    yield
    ray.shutdown()


def epoch(number, loss):
    return Epoch(number, loss, loss + 1, 1e-3, 2.0, 50.0, "float32", time.time())


def test_prometheus_has_what_every_panel_of_the_board_shows(cluster, prometheus, panels, make_spec, tmp_path):
    specs = [make_spec(tmp_path, name) for name in ("brick", "grass", "sand")]
    metrics = FitMetrics("plant", specs)
    metrics.epoch("brick", epoch(1, 3.0))
    metrics.epoch("brick", epoch(2, 2.5))
    metrics.outcome("brick", failed=False)
    metrics.epoch("grass", epoch(1, 4.0))
    metrics.outcome("grass", failed=True)

    board = panels("training.json", "30s")
    assert ON_GPUS in board
    left = set(itertools.chain.from_iterable(queries for title, queries in board.items() if title != ON_GPUS))
    assert len(left) > 8
    deadline = time.monotonic() + 240
    while left and time.monotonic() < deadline:
        left = {query for query in left if not prometheus(query)}
        time.sleep(0.5)
    assert not left

    def values(expression, by):
        return {each["metric"][by]: float(each["value"][1]) for each in prometheus(expression)}

    assert values("ray_sprue_fits", "state") == {"waiting": 1, "running": 0, "done": 1, "failed": 1}
    assert values("ray_sprue_fit_epochs_total", "dataset") == {"plant": 3}
    loss = values('ray_sprue_fit_loss{split="validation"}', "model")
    assert loss == {"plant.brick": 3.5, "plant.grass": 5.0}
    assert values("ray_sprue_fit_images_per_second", "model") == {"plant.brick": 50, "plant.grass": 50}
    assert values("ray_sprue_fit_seconds_count", "outcome") == {"done": 1, "failed": 1}
