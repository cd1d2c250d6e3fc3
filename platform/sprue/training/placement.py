"""How a cluster's cores and GPUs are divided among fits."""

from collections.abc import Sequence
from dataclasses import dataclass

import ray

from sprue.config import FitSettings
from sprue.errors import SprueError
from sprue.training.spec import FitSpec


@dataclass(frozen=True)
class FitPlacement:
    """How many fits run side by side, and what each worker of a fit gets; a GPU may be shared.

    Attributes:
        groups: Fits at a time.
        workers: Of each fit.
        cpus: Of each worker.
        gpus: Of each worker.
        min_workers: With how many a fit goes on when machines leave; None for all of them.
    """

    groups: int
    workers: int
    cpus: int
    gpus: float
    min_workers: int | None = None

    def room(self) -> int:
        """How many such fits the nodes that are alive have room for, whatever runs there."""
        return int(sum(min(cores // self.cpus, _share(gpus, self.gpus)) for cores, gpus in _nodes()) // self.workers)


def _nodes() -> list[tuple[int, int]]:
    """Cores and GPUs of each node that is alive and has a core."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    return [(int(node["CPU"]), int(node.get("GPU", 0))) for node in nodes]


def _share(gpus: int, gpus_per_worker: float) -> float:
    """How many workers GPUs have room for; any number if these need none."""
    return int(gpus / gpus_per_worker) if gpus_per_worker else float("inf")


def fit_placement(fits: int, settings: FitSettings) -> FitPlacement:
    """Divides the cluster among fits: its GPUs where there are any, else equal numbers of cores.

    Args:
        fits: How many fits there are.
        settings: ``workers`` and ``min_workers`` of each fit, and ``gpus`` of each worker.

    Raises:
        SprueError: If the cluster has no CPU, or not enough for the fewest workers of one fit.
    """
    nodes, workers = _nodes(), settings.workers
    if not nodes:
        raise SprueError("the Ray cluster offers no CPU; start a node with at least one")
    cores = [count for count, _ in nodes]
    # Each worker on a GPU has a core beside it.
    on_gpus = sum(min(count, int(_share(gpus, settings.gpus))) for count, gpus in nodes)
    fewest = settings.min_workers or workers
    if (room := on_gpus or sum(cores)) < fewest:
        name = "fit.workers" if settings.min_workers is None else "fit.min_workers"
        raise SprueError(
            f"{name}: {fewest} workers of a fit need a {'GPU' if on_gpus else 'CPU'} each; the Ray cluster has {room}"
        )
    at_once = min(workers, room)
    if on_gpus:
        return FitPlacement(min(fits, on_gpus // at_once), workers, 1, settings.gpus, settings.min_workers)
    cpus = max(1, min(min(cores), sum(cores) // (fits * at_once)))
    while sum(count // cpus for count in cores) < at_once:
        cpus -= 1
    groups = min(fits, sum(count // cpus for count in cores) // at_once)
    return FitPlacement(groups, workers, cpus, 0, settings.min_workers)


def placement_of(specs: Sequence[FitSpec]) -> FitPlacement:
    """The placement of fits, all of which have the room of the largest; see `fit_placement`."""
    largest = max((spec.fit for spec in specs), key=lambda fit: (fit.workers, fit.gpus))
    return fit_placement(len(specs), largest)
