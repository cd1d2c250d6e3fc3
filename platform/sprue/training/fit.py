"""Fits all classes of a dataset side by side, as far as the cluster's resources go."""

import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from threading import Thread
from typing import Any

import ray
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.actor import ActorHandle
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from upath import UPath

from sprue.errors import SprueError
from sprue.store import remove_folder
from sprue.training.checkpoint import Checkpoint, Checkpoints
from sprue.training.loop import Epoch
from sprue.training.queue import ATTEMPTS, FitQueue, News
from sprue.training.record import fit_key
from sprue.training.worker import FitRequest, fit_worker

logger = logging.getLogger(__name__)

OnEpoch = Callable[[str, Epoch], None]
OnOutcome = Callable[[FitRequest, "FitOutcome"], None]

ENDING = 10.0
"""Seconds that a slot has to end when all classes have."""

SLOTS = "slots"
"""The folder that Ray Train wants for itself."""

Fits = Mapping[str, tuple["ray.ObjectRef[FitRequest]", str]]
"""For each class Ray's reference to its request, and the folder of its checkpoints."""


@dataclass(frozen=True)
class FitOutcome:
    """What became of a class's fit.

    Attributes:
        class_name: The product class.
        best: The checkpoint with the best validation likelihood; None if the fit failed.
        history: The figures of all epochs.
        failure: The reason, if it failed.
        lost: Whether it failed with its processes, so that another attempt may end in another way.
    """

    class_name: str
    best: Checkpoint | None
    history: list[dict[str, Any]] = field(default_factory=list)
    failure: str = ""
    lost: bool = False


@dataclass(frozen=True)
class Slots:
    """How many fits run side by side, and what each of a fit's workers gets."""

    count: int
    workers: int
    cpus: int
    gpus: int


def place_fits(fits: int, workers: int = 1) -> Slots:
    """Shares the cluster among fits: a GPU for each worker where there are any, else equal shares of the cores.

    Args:
        fits: How many fits there are.
        workers: Of each fit.

    Raises:
        SprueError: If the cluster has no CPU, or not enough for the workers of one fit.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    cores = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
    if not cores:
        raise SprueError("the Ray cluster offers no CPU; start a node with at least one")
    if (gpus or sum(cores)) < workers:
        raise SprueError(
            f"fit.workers: {workers} workers of a fit need a {'GPU' if gpus else 'CPU'} each; the Ray cluster has "
            f"{gpus or sum(cores)}"
        )
    if gpus:
        return Slots(count=min(fits, gpus // workers), workers=workers, cpus=1, gpus=1)
    cpus = max(1, min(min(cores), sum(cores) // (fits * workers)))
    while sum(node // cpus for node in cores) < workers:
        cpus -= 1
    return Slots(min(fits, sum(node // cpus for node in cores) // workers), workers, cpus, gpus=0)


def fit_classes(
    requests: Sequence[FitRequest],
    runs: UPath,
    on_epoch: OnEpoch,
    on_outcome: OnOutcome | None = None,
    slots: Slots | None = None,
    lockstep: bool = False,
) -> list[FitOutcome]:
    """Fits classes in runs of Ray Train, the slots, each of which takes class after class from one queue.

    A class that fails does not stop the others. A fit that was interrupted goes on from its last checkpoint, for
    these are in a folder that is named by its inputs.

    Args:
        requests: One for each class.
        runs: Folder or s3 URL of the checkpoints, as every node sees it.
        on_epoch: Called in this thread after each epoch of each class, whose checkpoint is stored.
        on_outcome: Called in this thread as soon as a class is finished or has failed.
        slots: How many fits run side by side, and what each gets; all of the cluster if not given.
        lockstep: Whether a fit waits after each epoch until `on_epoch` has returned, and its last checkpoint with it.

    Returns:
        An outcome for each request, in their order.
    """
    slots = slots or place_fits(len(requests), max(request.settings.workers for request in requests))
    logger.info(
        "%d classes, %d at a time, each on %d workers with %d CPUs and %d GPUs",
        len(requests), slots.count, slots.workers, slots.cpus, slots.gpus,
    )  # fmt: skip
    by_class = {request.class_name: request for request in requests}
    # The largest first, so that at the end no slot waits long for another.
    order = sorted(by_class, key=lambda class_name: -by_class[class_name].pictures)
    # Beside this process, so that it outlives any other machine.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remove_folder(runs / SLOTS)
    # `ray list actors` shows it under this name.
    name = f"fits of {', '.join(order)} ({uuid.uuid4().hex[:4]})"
    queue = (
        ray.remote(FitQueue)
        .options(name=name, num_cpus=0, scheduling_strategy=here)
        .remote(order, slots.count, lockstep)
    )
    fits = {name: (ray.put(request), str(runs / run_name(request))) for name, request in by_class.items()}
    threads = [
        Thread(target=_run_slot, args=(slot, slots, queue, fits, runs), daemon=True) for slot in range(slots.count)
    ]
    for thread in threads:
        thread.start()
    outcomes: dict[str, FitOutcome] = {}
    try:
        while len(outcomes) < len(requests):
            news: News = ray.get(queue.news.remote())
            request = by_class[news.class_name]
            if news.epoch is not None:
                on_epoch(news.class_name, Epoch(**news.epoch))
                queue.heard.remote(news.class_name, news.epoch["epoch"])
                continue
            outcomes[news.class_name] = _outcome(request, runs, news)
            if on_outcome is not None:
                on_outcome(request, outcomes[news.class_name])
    finally:
        # A slot for which there was no room has nothing left to wait for.
        queue.cancel.remote()
    for thread in threads:
        thread.join(ENDING)
    remove_folder(runs / SLOTS)
    return [outcomes[request.class_name] for request in requests]


def run_name(request: FitRequest) -> str:
    """The name of a fit's folder of checkpoints, where an interrupted one is found again."""
    return f"{request.class_name}-{fit_key(request)}"


def storage_filesystem(folder: UPath) -> PyFileSystem | None:
    """The store's own way to reach a remote folder, so that Ray needs no endpoint and no keys of its own."""
    return None if folder.protocol in ("", "file") else PyFileSystem(FSSpecHandler(folder.fs))


def _run_slot(slot: int, slots: Slots, queue: ActorHandle, fits: Fits, runs: UPath) -> None:
    """Runs a slot to its end, and tells the queue why, should it leave something undone."""
    name = f"{runs.parent.name}-fits-{slot + 1}"
    reason = "its run of Ray Train ended before it"
    try:
        # A single worker needs no process group, and a controller that is to make none does not import torch.
        trainer = (TorchTrainer if slots.workers > 1 else DataParallelTrainer)(
            fit_worker,
            train_loop_config={"queue": queue, "slot": slot, "fits": fits, "threads": slots.cpus},
            scaling_config=ScalingConfig(
                num_workers=slots.workers,
                use_gpu=slots.gpus > 0,
                resources_per_worker={"CPU": slots.cpus} | ({"GPU": 1} if slots.gpus else {}),
            ),
            run_config=RunConfig(
                name=name,
                storage_path=(runs / SLOTS).path,
                storage_filesystem=storage_filesystem(runs),
                failure_config=FailureConfig(max_failures=(ATTEMPTS + 1) * len(fits)),
                logging_config=LoggingConfig(log_level="WARNING"),
            ),
        )
        trainer.fit()
    except Exception as error:  # whatever it is, it is the reason that the classes get
        logger.debug("%s failed", name, exc_info=error)
        reason = _innermost(error)
    finally:
        queue.close.remote(slot, reason)


def _outcome(request: FitRequest, runs: UPath, news: News) -> FitOutcome:
    """What is stored of a class's fit, or why there is nothing."""
    failed = FitOutcome(request.class_name, None, failure=news.failure, lost=news.lost)
    if news.failure:
        return failed
    checkpoints = Checkpoints(runs / run_name(request))
    try:
        best = checkpoints.best()
        history = checkpoints.history()
    except SprueError as error:
        return replace(failed, failure=str(error))
    if best is None:
        return replace(failed, failure=f"there is no checkpoint in {checkpoints.folder}")
    return FitOutcome(request.class_name, best, history)


def _innermost(error: BaseException) -> str:
    """The last line of what Ray has wrapped several times."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
