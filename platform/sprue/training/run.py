"""Runs the fits of a dataset's classes on Ray Train, as many at once as the cluster has room for."""

import logging
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from upath import UPath

from sprue.errors import SprueError
from sprue.store import remove_folder
from sprue.training.checkpoint import Checkpoint, Checkpoints
from sprue.training.class_queue import ClassQueue, Event
from sprue.training.loop import Epoch
from sprue.training.placement import FitPlacement, placement_of
from sprue.training.spec import FitSpec
from sprue.training.worker_groups import FOLDER, WorkerGroups

logger = logging.getLogger(__name__)

QUIET_S = 10.0
"""How long the driver waits for an event before it looks whether machines have joined."""

NAMED = 3
"""Fits that the name of the queue's actor has, at most."""


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
        on_outcome: Called in this thread as soon as a fit is finished or has failed; takes the outcomes one by one, for
            the weights of all fits together would not fit this process's memory.
        placement: How many fits run side by side, and what each gets; all of the cluster by default.
        synchronous: Whether a fit, and its last checkpoint, wait after each epoch until `on_epoch` has returned.

    Returns:
        An outcome for each spec, in their order; none if `on_outcome` takes them.
    """
    placement = placement or placement_of(specs)
    logger.info(
        "%d fits, %d at a time, each on %d workers with %d CPUs and %g GPUs",
        len(specs), placement.groups, placement.workers, placement.cpus, placement.gpus,
    )  # fmt: skip
    by_name = {spec.name: spec for spec in specs}
    queue = _start_queue(by_name, placement, synchronous)
    remove_folder(runs / FOLDER)
    config = {"queue": queue, "features": str(features), "runs": str(runs), "threads": placement.cpus}
    groups = WorkerGroups(config, placement, runs)
    outcomes: dict[str, FitOutcome] = {}
    ended = 0
    try:
        for event in _events(queue):
            groups.grow(len(specs) - ended)
            if event is None:
                continue
            spec = by_name[event.fit]
            if event.epoch is not None:
                on_epoch(event.fit, Epoch(**event.epoch))
                queue.acknowledge.remote(event.fit, event.epoch["epoch"])
                continue
            ended, outcome = ended + 1, _outcome(spec, runs, event)
            if on_outcome is not None:
                on_outcome(spec, outcome)
            else:
                outcomes[event.fit] = outcome
            if ended == len(specs):
                break
    finally:
        groups.close()
    # Not after an exception: a trial of a search must end at once, and a stage says why it fails.
    groups.join()
    remove_folder(runs / FOLDER)
    return [outcomes[spec.name] for spec in specs if spec.name in outcomes]


def _events(queue: ActorHandle) -> Iterator[Event | None]:
    """The events of a queue as they happen; None whenever there was none for `QUIET_S` seconds."""
    event = queue.next_event.remote()
    while True:
        done, _ = ray.wait([event], timeout=QUIET_S)
        yield ray.get(event) if done else None
        if done:
            event = queue.next_event.remote()


def _start_queue(by_name: dict[str, FitSpec], placement: FitPlacement, synchronous: bool) -> ActorHandle:
    # The largest first, so that at the end no worker group waits long for another.
    order = sorted(by_name, key=lambda name: -by_name[name].images)
    # On this node, so that the queue outlives any other machine.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # `ray list actors` shows the name.
    more = f" and {len(order) - NAMED} more" if len(order) > NAMED else ""
    name = f"fits of {', '.join(order[:NAMED])}{more} ({uuid.uuid4().hex[:4]})"
    options = {"name": name, "num_cpus": 0, "scheduling_strategy": here}
    specs = {name: ray.put(spec) for name, spec in by_name.items()}
    return ray.remote(ClassQueue).options(**options).remote(order, placement.groups, synchronous, specs)


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
