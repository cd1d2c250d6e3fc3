"""Fits all classes of a dataset side by side, as far as the cluster's resources go."""

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.util.queue import Empty, Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from upath import UPath

from sprue.errors import SprueError
from sprue.training.checkpoint import Checkpoint
from sprue.training.loop import Epoch
from sprue.training.record import fit_key
from sprue.training.worker import FitRequest, fit_worker

logger = logging.getLogger(__name__)

OnEpoch = Callable[[str, Epoch], None]
OnOutcome = Callable[[FitRequest, "FitOutcome"], None]

ATTEMPTS = 3
"""How often a fit goes on from its last checkpoint after one of its processes or machines has died."""


@dataclass(frozen=True)
class FitOutcome:
    """What became of a class's fit.

    Attributes:
        class_name: The product class.
        best: The checkpoint with the best validation likelihood; None if the fit failed.
        history: The figures of all epochs.
        failure: The reason, if it failed.
    """

    class_name: str
    best: Checkpoint | None
    history: list[dict[str, Any]] = field(default_factory=list)
    failure: str = ""


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
    return Slots(min(fits, sum(node // cpus for node in cores) // workers), workers, cpus, gpus=0)


def fit_classes(
    requests: Sequence[FitRequest], runs: UPath, on_epoch: OnEpoch, on_outcome: OnOutcome | None = None
) -> list[FitOutcome]:
    """Runs one Ray Train run for each class; a class that fails does not stop the others.

    A fit that was interrupted goes on from its last checkpoint, for its run is named by its inputs.

    Args:
        requests: One for each class.
        runs: Folder or s3 URL of Ray Train's runs, as every node sees it.
        on_epoch: Called in this process after each epoch of each class.
        on_outcome: Called in this thread as soon as a class is finished or has failed.

    Returns:
        An outcome for each request, in their order.
    """
    slots = place_fits(len(requests), max(request.settings.workers for request in requests))
    logger.info(
        "%d classes, %d at a time, each on %d workers with %d CPUs and %d GPUs",
        len(requests), slots.count, slots.workers, slots.cpus, slots.gpus,
    )  # fmt: skip
    # Beside this process, so that it outlives any other machine.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    name = f"sprue-epochs-{id(requests):x}"
    epochs = Queue(actor_options={"num_cpus": 0, "name": name, "scheduling_strategy": here})
    finished = threading.Event()
    listener = threading.Thread(target=_forward, args=(epochs, on_epoch, finished), daemon=True)
    listener.start()
    pool = ThreadPoolExecutor(slots.count)
    futures = [pool.submit(_fit_class, request, runs, slots, epochs) for request in requests]
    requested = dict(zip(futures, requests, strict=True))
    try:
        for future in as_completed(futures):
            if on_outcome is not None:
                on_outcome(requested[future], _outcome(requested[future], future))
    finally:
        # Who is interrupted does not wait for the fits that run; what they have stored is gone on from.
        pool.shutdown(wait=False, cancel_futures=True)
    finished.set()
    listener.join()
    epochs.shutdown()
    return [_outcome(request, future) for request, future in zip(requests, futures, strict=True)]


def run_name(request: FitRequest) -> str:
    """A fit's name on Ray Train and in its storage, where an interrupted fit is found again."""
    return f"{request.class_name}-{fit_key(request)}"


def storage_filesystem(folder: UPath) -> PyFileSystem | None:
    """The store's own way to reach a remote folder, so that Ray needs no endpoint and no keys of its own."""
    return None if folder.protocol in ("", "file") else PyFileSystem(FSSpecHandler(folder.fs))


def _fit_class(request: FitRequest, runs: UPath, slots: Slots, epochs: Queue) -> FitOutcome:
    trainer = TorchTrainer(
        fit_worker,
        # By reference, so that Ray Train's controller, which reads this too, need not import what a request is made of.
        train_loop_config={"request": ray.put(request), "epochs": epochs, "threads": slots.cpus},
        scaling_config=ScalingConfig(
            num_workers=slots.workers,
            use_gpu=slots.gpus > 0,
            resources_per_worker={"CPU": slots.cpus} | ({"GPU": 1} if slots.gpus else {}),
        ),
        run_config=RunConfig(
            name=run_name(request),
            storage_path=runs.path,
            storage_filesystem=storage_filesystem(runs),
            checkpoint_config=CheckpointConfig(
                num_to_keep=1, checkpoint_score_attribute="validation_nll", checkpoint_score_order="min"
            ),
            failure_config=FailureConfig(max_failures=ATTEMPTS),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    result = trainer.fit()
    if result.return_value is not None:
        raise SprueError(result.return_value)
    best = result.get_best_checkpoint("validation_nll", "min")
    if best is None or result.checkpoint is None:
        raise SprueError(f"{run_name(request)} left no checkpoint")
    return FitOutcome(request.class_name, read_checkpoint(best), read_checkpoint(result.checkpoint).history)


def read_checkpoint(stored: ray.train.Checkpoint) -> Checkpoint:
    """A checkpoint from Ray's storage."""
    with stored.as_directory() as folder:
        return Checkpoint.read(Path(folder))


def _outcome(request: FitRequest, future: "Future[FitOutcome]") -> FitOutcome:
    error = future.exception()
    if error is None:
        return future.result()
    # Ray wraps a worker's exception several times; the innermost says what happened.
    while error.__cause__ is not None:
        error = error.__cause__
    logger.debug("fit of %s failed", request.class_name, exc_info=error)
    lines = str(error).strip().splitlines()
    return FitOutcome(request.class_name, None, failure=lines[-1] if lines else type(error).__name__)


def _forward(epochs: Queue, on_epoch: OnEpoch, finished: threading.Event) -> None:
    """Hands epochs on as they come, and after the last fit what is left."""
    while True:
        try:
            class_name, epoch = epochs.get(timeout=0.5)
        except Empty:
            if finished.is_set():
                return
            continue
        on_epoch(class_name, epoch)
