"""Fits all classes of a dataset side by side, as far as the cluster's resources go."""

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.util.queue import Empty, Queue
from upath import UPath

from sprue.errors import SprueError
from sprue.training.checkpoint import Checkpoint
from sprue.training.loop import Epoch
from sprue.training.record import fit_key
from sprue.training.worker import FitRequest, fit_worker

logger = logging.getLogger(__name__)

OnEpoch = Callable[[str, Epoch], None]


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
    """How many fits run side by side, and what each gets."""

    count: int
    cpus: int
    gpus: int


def place_fits(classes: int) -> Slots:
    """Shares the cluster among a number of classes: a GPU each where there are any, else equal shares of the cores.

    Raises:
        SprueError: If the cluster offers no CPU.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    if gpus:
        return Slots(count=min(classes, gpus), cpus=1, gpus=1)
    cores = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
    if not cores:
        raise SprueError("the Ray cluster offers no CPU; start a node with at least one")
    cpus = max(1, min(min(cores), sum(cores) // classes))
    return Slots(count=min(classes, sum(node // cpus for node in cores)), cpus=cpus, gpus=0)


def fit_classes(requests: Sequence[FitRequest], runs: UPath, on_epoch: OnEpoch) -> list[FitOutcome]:
    """Runs one Ray Train run for each class; a class that fails does not stop the others.

    A fit that was interrupted goes on from its last checkpoint, for its run is named by its inputs.

    Args:
        requests: One for each class.
        runs: Folder or s3 URL of Ray Train's runs, as every node sees it.
        on_epoch: Called in this process after each epoch of each class.

    Returns:
        An outcome for each request, in their order.
    """
    slots = place_fits(len(requests))
    logger.info(
        "%d classes, %d at a time on %d CPUs and %d GPUs each", len(requests), slots.count, slots.cpus, slots.gpus
    )
    epochs = Queue(actor_options={"num_cpus": 0, "name": f"sprue-epochs-{id(requests):x}"})
    finished = threading.Event()
    listener = threading.Thread(target=_forward, args=(epochs, on_epoch, finished), daemon=True)
    listener.start()
    with ThreadPoolExecutor(slots.count) as pool:
        futures = [pool.submit(_fit_class, request, runs, slots, epochs) for request in requests]
        wait(futures)
    finished.set()
    listener.join()
    epochs.shutdown()
    return [_outcome(request, future) for request, future in zip(requests, futures, strict=True)]


def _fit_class(request: FitRequest, runs: UPath, slots: Slots, epochs: Queue) -> FitOutcome:
    name = f"{request.class_name}-{fit_key(request)}"
    trainer = TorchTrainer(
        fit_worker,
        train_loop_config={"request": request, "epochs": epochs},
        scaling_config=ScalingConfig(
            num_workers=1,
            use_gpu=slots.gpus > 0,
            resources_per_worker={"CPU": slots.cpus} | ({"GPU": 1} if slots.gpus else {}),
        ),
        run_config=RunConfig(
            name=name,
            storage_path=runs.path,
            # The store's own way to reach it, so that Ray Train needs no endpoint and no keys of its own.
            storage_filesystem=None if runs.protocol in ("", "file") else PyFileSystem(FSSpecHandler(runs.fs)),
            checkpoint_config=CheckpointConfig(
                num_to_keep=1, checkpoint_score_attribute="validation_nll", checkpoint_score_order="min"
            ),
            failure_config=FailureConfig(max_failures=0),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    result = trainer.fit()
    best = result.get_best_checkpoint("validation_nll", "min")
    if best is None or result.checkpoint is None:
        raise SprueError(f"{name} left no checkpoint")
    return FitOutcome(request.class_name, _read(best), _read(result.checkpoint).history)


def _read(stored: ray.train.Checkpoint) -> Checkpoint:
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
