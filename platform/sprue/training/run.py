"""Runs the fits of a dataset's classes on Ray Train, as many at once as the cluster has room for."""

import logging
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from threading import Thread
from typing import Any

import ray
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.actor import ActorHandle
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

# No public module exports the trainer without torch, whose controller starts seconds sooner.
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from upath import UPath

from sprue.errors import SprueError
from sprue.store import remove_folder
from sprue.training.checkpoint import Checkpoint, Checkpoints
from sprue.training.class_queue import ATTEMPTS, ClassQueue, Event
from sprue.training.loop import Epoch
from sprue.training.spec import FitSpec
from sprue.training.worker import fit_worker

logger = logging.getLogger(__name__)

SHUTDOWN_S = 10.0
"""How long a worker group may take to end after the last fit."""

WORKER_GROUPS = "worker-groups"
"""The folder that Ray Train writes to."""


@dataclass(frozen=True)
class FitOutcome:
    """What became of a fit.

    Attributes:
        fit: The fit's name.
        best: The checkpoint with the best validation likelihood; None if the fit failed.
        history: The metrics of all epochs.
        failure: The reason, if it failed.
        lost: Whether it failed with its processes, so that another attempt may succeed.
    """

    fit: str
    best: Checkpoint | None
    history: list[dict[str, Any]] = field(default_factory=list)
    failure: str = ""
    lost: bool = False


@dataclass(frozen=True)
class FitPlacement:
    """How many fits run side by side, and what each worker of a fit gets; a GPU may be shared."""

    groups: int
    workers: int
    cpus: int
    gpus: float


def fit_placement(fits: int, workers: int = 1, gpus_per_worker: float = 1.0) -> FitPlacement:
    """Divides the cluster among fits: its GPUs where there are any, else equal numbers of cores.

    Args:
        fits: How many fits there are.
        workers: Of each fit.
        gpus_per_worker: What each takes of a GPU, up to 1.

    Raises:
        SprueError: If the cluster has no CPU, or not enough for the workers of one fit.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    if not nodes:
        raise SprueError("the Ray cluster offers no CPU; start a node with at least one")
    cores, gpus = [int(node["CPU"]) for node in nodes], [int(node.get("GPU", 0)) for node in nodes]
    # Each worker on a GPU has a core beside it.
    on_gpus = sum(min(node, int(count / gpus_per_worker)) for node, count in zip(cores, gpus, strict=True))
    if (room := on_gpus or sum(cores)) < workers:
        raise SprueError(
            f"fit.workers: {workers} workers of a fit need a {'GPU' if on_gpus else 'CPU'} each; the Ray cluster has "
            f"{room}"
        )
    if on_gpus:
        return FitPlacement(min(fits, on_gpus // workers), workers, cpus=1, gpus=gpus_per_worker)
    cpus = max(1, min(min(cores), sum(cores) // (fits * workers)))
    while sum(node // cpus for node in cores) < workers:
        cpus -= 1
    return FitPlacement(min(fits, sum(node // cpus for node in cores) // workers), workers, cpus, gpus=0)


def placement_of(specs: Sequence[FitSpec]) -> FitPlacement:
    """The placement of fits, all of which have the room of the largest; see `fit_placement`."""
    fits = [spec.fit for spec in specs]
    return fit_placement(len(fits), max(fit.workers for fit in fits), max(fit.gpus for fit in fits))


def fit_classes(
    specs: Sequence[FitSpec],
    features: UPath,
    runs: UPath,
    on_epoch: Callable[[str, Epoch], None],
    on_outcome: Callable[[FitSpec, FitOutcome], None] | None = None,
    placement: FitPlacement | None = None,
    synchronous: bool = False,
) -> list[FitOutcome]:
    """Fits classes in worker groups, each a run of Ray Train that takes fit after fit from one queue.

    A fit that fails does not stop the others. An interrupted fit resumes after its last checkpoint, which is in a
    folder that is named by the fit's key.

    Args:
        specs: One for each class, or one for each of its folds.
        features: Folder or s3 URL of the dataset's features, as every node sees it.
        runs: Folder or s3 URL of the checkpoints, as every node sees it.
        on_epoch: Called in this thread with the fit's name after each epoch, whose checkpoint is stored.
        on_outcome: Called in this thread as soon as a fit is finished or has failed.
        placement: How many fits run side by side, and what each gets; all of the cluster by default.
        synchronous: Whether a fit, and its last checkpoint, wait after each epoch until `on_epoch` has returned.

    Returns:
        An outcome for each spec, in their order.
    """
    placement = placement or placement_of(specs)
    logger.info(
        "%d fits, %d at a time, each on %d workers with %d CPUs and %g GPUs",
        len(specs), placement.groups, placement.workers, placement.cpus, placement.gpus,
    )  # fmt: skip
    by_name = {spec.name: spec for spec in specs}
    queue = _start_queue(by_name, placement, synchronous)
    remove_folder(runs / WORKER_GROUPS)
    config = {
        "queue": queue,
        "specs": {name: ray.put(spec) for name, spec in by_name.items()},
        "features": str(features),
        "runs": str(runs),
        "threads": placement.cpus,
    }
    threads = [
        Thread(target=_run_worker_group, args=(config | {"group": group}, placement, runs), daemon=True)
        for group in range(placement.groups)
    ]
    for thread in threads:
        thread.start()
    outcomes: dict[str, FitOutcome] = {}
    try:
        while len(outcomes) < len(specs):
            event: Event = ray.get(queue.next_event.remote())
            spec = by_name[event.fit]
            if event.epoch is not None:
                on_epoch(event.fit, Epoch(**event.epoch))
                queue.acknowledge.remote(event.fit, event.epoch["epoch"])
                continue
            outcomes[event.fit] = _outcome(spec, runs, event)
            if on_outcome is not None:
                on_outcome(spec, outcomes[event.fit])
    finally:
        # Releases worker groups for which there was no room.
        queue.cancel.remote()
    for thread in threads:
        thread.join(SHUTDOWN_S)
    remove_folder(runs / WORKER_GROUPS)
    return [outcomes[spec.name] for spec in specs]


def _start_queue(by_name: dict[str, FitSpec], placement: FitPlacement, synchronous: bool) -> ActorHandle:
    # The largest first, so that at the end no worker group waits long for another.
    order = sorted(by_name, key=lambda name: -by_name[name].images)
    # On this node, so that the queue outlives any other machine.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # `ray list actors` shows the name.
    name = f"fits of {', '.join(order)} ({uuid.uuid4().hex[:4]})"
    options = {"name": name, "num_cpus": 0, "scheduling_strategy": here}
    return ray.remote(ClassQueue).options(**options).remote(order, placement.groups, synchronous)


def storage_filesystem(folder: UPath) -> PyFileSystem | None:
    """The store's own way to a remote folder, so that Ray needs no endpoint and no keys of its own."""
    return None if folder.protocol in ("", "file") else PyFileSystem(FSSpecHandler(folder.fs))


def _run_worker_group(config: dict[str, Any], placement: FitPlacement, runs: UPath) -> None:
    """Runs a worker group to its end; tells the queue why, should it leave a fit unfinished."""
    name = f"{runs.parent.name}-fits-{config['group'] + 1}"
    reason = "its run of Ray Train ended before it"
    try:
        # A single worker needs no process group.
        trainer = (TorchTrainer if placement.workers > 1 else DataParallelTrainer)(
            fit_worker,
            train_loop_config=config,
            scaling_config=ScalingConfig(
                num_workers=placement.workers,
                use_gpu=placement.gpus > 0,
                resources_per_worker={"CPU": placement.cpus} | ({"GPU": placement.gpus} if placement.gpus else {}),
            ),
            run_config=RunConfig(
                name=name,
                storage_path=(runs / WORKER_GROUPS).path,
                storage_filesystem=storage_filesystem(runs),
                failure_config=FailureConfig(max_failures=(ATTEMPTS + 1) * len(config["specs"])),
                logging_config=LoggingConfig(log_level="WARNING"),
            ),
        )
        trainer.fit()
    except Exception as error:  # whatever it is, it becomes the reason of the fits' failure
        logger.debug("%s failed", name, exc_info=error)
        reason = _innermost(error)
    finally:
        config["queue"].close.remote(config["group"], reason)


def _outcome(spec: FitSpec, runs: UPath, event: Event) -> FitOutcome:
    """What is stored of a fit, or why there is nothing."""
    failed = FitOutcome(spec.name, None, failure=event.failure, lost=event.lost)
    if event.failure:
        return failed
    checkpoints = Checkpoints(runs / spec.checkpoints)
    try:
        best = checkpoints.best()
        history = checkpoints.history()
    except SprueError as error:
        return replace(failed, failure=str(error))
    if best is None:
        return replace(failed, failure=f"there is no checkpoint in {checkpoints.folder}")
    return FitOutcome(spec.name, best, history)


def _innermost(error: BaseException) -> str:
    """The last line of what Ray has wrapped several times."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
