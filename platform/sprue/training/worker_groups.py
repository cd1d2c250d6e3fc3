"""Worker groups: runs of Ray Train that take fits from a queue, more of them as machines join the cluster."""

import itertools
import logging
import time
from threading import Event, Thread
from typing import Any

import ray
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback

# No public module exports the trainer without torch, whose controller starts seconds sooner.
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from upath import UPath

from sprue.training.class_queue import ATTEMPTS
from sprue.training.controller import Announcement, RoomKeeper
from sprue.training.placement import FitPlacement
from sprue.training.worker import fit_worker

logger = logging.getLogger(__name__)

SHUTDOWN_S = 10.0
"""How long a worker group may take to end after the last fit; then its controller is killed."""

KILLED_S = 30.0
"""How long its thread may take then."""

RESIZE_S = 30.0
"""How often a fit with fewer workers than it may have looks for room, and resumes with more after its last epoch."""

RETRY_S = 5.0
"""Until a worker group whose run of Ray Train has failed starts anew."""

JOINED_S = 10.0
"""How often a look at the cluster finds machines that have joined."""

THREADS = "worker-group"
"""What the names of the threads that wait for worker groups begin with."""

FOLDER = "worker-groups"
"""The folder that Ray Train writes to."""


class WorkerGroups:
    """The worker groups of a queue, each a thread that waits for a run of Ray Train."""

    def __init__(self, config: dict[str, Any], placement: FitPlacement, runs: UPath) -> None:
        """Starts as many as the placement says.

        Args:
            config: What `sprue.training.worker.fit_worker` gets, but for ``group``.
            placement: How many there are, and what each gets.
            runs: Folder or s3 URL that every node sees.
        """
        self._config, self._placement, self._runs = config, placement, runs
        self._threads: list[Thread] = []
        self._closing = Event()
        self._looked = time.monotonic()
        self._start(placement.groups)

    def grow(self, unfinished: int) -> None:
        """Starts more where machines have joined, up to one for each fit that is not finished."""
        if time.monotonic() < self._looked + JOINED_S:
            return
        self._looked = time.monotonic()
        more = min(unfinished, self._placement.room()) - len(self._threads)
        if more > 0:
            logger.info("the cluster has grown: %d more fits at a time", more)
            for _ in range(more):
                self._config["queue"].open.remote()
            self._start(more)

    def close(self) -> None:
        """Ends each fit after its current epoch, and begins no other; releases groups for which there was no room."""
        self._closing.set()
        self._config["queue"].cancel.remote()

    def join(self) -> None:
        """Waits until all have ended; kills the controllers of those that take long, which may wait for room.

        A thread that asked something of Ray while its process leaves Ray would end the process. What a killed
        controller had reserved is given back with the job.
        """
        self._wait(SHUTDOWN_S)
        deadline = time.monotonic() + KILLED_S
        while self._running() and time.monotonic() < deadline:
            for controller in ray.get(self._config["queue"].announced.remote()):
                ray.kill(controller)
            self._wait(1.0)
        if names := ", ".join(thread.name for thread in self._running()):
            logger.warning("still running after the last fit: %s", names)

    def _running(self) -> list[Thread]:
        return [thread for thread in self._threads if thread.is_alive()]

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _start(self, count: int) -> None:
        for number in range(len(self._threads), len(self._threads) + count):
            config = self._config | {"group": number}
            arguments = (config, self._placement, self._runs, self._closing)
            self._threads.append(Thread(name=f"{THREADS}-{number}", target=_run, args=arguments, daemon=True))
            self._threads[-1].start()


def storage_filesystem(folder: UPath) -> PyFileSystem | None:
    """The store's own way to a remote folder, so that Ray needs no endpoint and no keys of its own."""
    return None if folder.protocol in ("", "file") else PyFileSystem(FSSpecHandler(folder.fs))


def _run(config: dict[str, Any], placement: FitPlacement, runs: UPath, closing: Event) -> None:
    """Runs a worker group to its end; tells the queue why, should it leave a fit unfinished.

    A run of Ray Train bears as many deaths as a fit, and none while its workers start. Another run follows; only if
    several in a row finish no epoch and no fit, the group is given up. So machines may come and go for as long as the
    fits make progress. None follows once the groups are ``closing``.
    """
    queue, group = config["queue"], config["group"]
    name = f"{runs.parent.name}-fits-{group + 1}"
    reason, finished, fruitless = "its run of Ray Train ended before it", 0, 0
    try:
        for number in itertools.count(1):
            try:
                _trainer(f"{name}-{number}", config, placement, runs).fit()
                break
            except Exception as error:  # whatever it is, it becomes the reason of the fits' failure
                logger.debug("%s failed", name, exc_info=error)
                reason = _innermost(error)
            if closing.is_set():
                break
            before, finished = finished, ray.get(queue.finished.remote(group))
            fruitless = 0 if finished > before else fruitless + 1
            if fruitless > ATTEMPTS:
                break
            logger.warning("%s starts anew: %s", name, reason)
            if closing.wait(RETRY_S):
                break
    finally:
        queue.close.remote(group, reason)


class _WithoutDatasets(DataParallelTrainer):
    """A trainer without the process that shares out datasets of Ray Data: workers read the stored features."""

    def _create_default_callbacks(self) -> list[Any]:
        return [each for each in super()._create_default_callbacks() if not isinstance(each, DatasetsCallback)]


class _WithProcessGroup(_WithoutDatasets, TorchTrainer):
    """For several workers; a single one needs no process group."""


def _trainer(name: str, config: dict[str, Any], placement: FitPlacement, runs: UPath) -> DataParallelTrainer:
    fewest, workers = placement.min_workers or placement.workers, placement.workers
    return (_WithProcessGroup if workers > 1 else _WithoutDatasets)(
        fit_worker,
        train_loop_config=config,
        scaling_config=ScalingConfig(
            num_workers=workers if fewest == workers else (fewest, workers),
            use_gpu=placement.gpus > 0,
            resources_per_worker={"CPU": placement.cpus} | ({"GPU": placement.gpus} if placement.gpus else {}),
            elastic_resize_monitor_interval_s=RESIZE_S,
        ),
        run_config=RunConfig(
            name=name,
            storage_path=(runs / FOLDER).path,
            storage_filesystem=storage_filesystem(runs),
            failure_config=FailureConfig(max_failures=ATTEMPTS),
            logging_config=LoggingConfig(log_level="WARNING"),
            callbacks=[RoomKeeper(), Announcement(config["queue"], config["group"])],
        ),
    )


def _innermost(error: BaseException) -> str:
    """The last line of what Ray has wrapped several times."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
