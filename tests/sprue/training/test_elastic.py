"""Machines join and leave a cluster while classes are fitted: real Ray nodes, which are processes here."""

import contextlib
import threading
import time

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster
from upath import UPath

from sprue.stages.runtime import init_ray
from sprue.training import worker_groups
from sprue.training.run import fit_classes


class Nodes(Cluster):
    """A Ray of one node, to which a test adds others; each has one core."""

    def join(self):
        """Adds a node. On a busy machine, Ray may give it up after its 30 seconds."""
        for _ in range(2):
            with contextlib.suppress(Exception):
                return self.add_node(num_cpus=1)
        return self.add_node(num_cpus=1)


@pytest.fixture
def nodes(monkeypatch):
    """The cluster of a driver that kills its worker groups at once; it leaves Ray without a thread of theirs."""
    monkeypatch.setattr(worker_groups, "SHUTDOWN_S", 0)
    cluster = Nodes(initialize_head=True, head_node_args={"num_cpus": 1})
    init_ray(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith(worker_groups.THREADS)]
    ray.shutdown()
    cluster.shutdown()
    assert not left


def workers():
    """The processes of Ray Train's workers."""
    found = []
    for each in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            found += [each] if each.name().startswith("ray::RayTrainW") else []
    return found


def test_a_fit_goes_on_with_fewer_workers_when_a_machine_leaves(nodes, make_spec, tmp_path):
    other = nodes.join()
    spec = make_spec(tmp_path, epochs=5, workers=2, min_workers=1)
    epochs, sizes = [], []

    def leave_once(_, epoch):
        epochs.append(epoch.epoch)
        sizes.append(len(workers()))
        if epoch.epoch == 2:
            nodes.remove_node(other, allow_graceful=False)

    features, runs = UPath(tmp_path / "features"), UPath(tmp_path / "runs")
    (fitted,) = fit_classes([spec], features, runs, leave_once, synchronous=True)
    assert fitted.failure == ""
    assert epochs == [row["epoch"] for row in fitted.history] == [1, 2, 3, 4, 5]
    assert (sizes[0], sizes[-1]) == (2, 1)


def test_a_machine_that_joins_takes_a_class(nodes, make_spec, tmp_path, monkeypatch):
    monkeypatch.setattr(worker_groups, "JOINED_S", 0.0)
    specs = [make_spec(tmp_path, name, epochs=10) for name in ("brick", "grass", "sand")]
    at_once = []

    def join_once(_, epoch):
        at_once.append(len(workers()))
        if len(at_once) == 1:
            nodes.join()
        if max(at_once) < 2:
            time.sleep(2)  # the worker of the second group needs some seconds to start

    features, runs = UPath(tmp_path / "features"), UPath(tmp_path / "runs")
    fitted = fit_classes(specs, features, runs, join_once, synchronous=True)
    assert [each.failure for each in fitted] == [""] * 3
    assert at_once[0] == 1 and max(at_once) == 2
