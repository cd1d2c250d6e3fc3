"""What runs in a Ray Train worker: runs one fit after the other, and stores a checkpoint after each epoch."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.actor import ActorHandle
from ray.train.collective import broadcast_from_rank_zero
from upath import UPath

from sprue.errors import SprueError
from sprue.inference.priority import lower_priority
from sprue.store import location
from sprue.training.checkpoint import Checkpoint, Checkpoints
from sprue.training.dataloader import InMemoryDataLoader
from sprue.training.distributed import SINGLE_PROCESS, ProcessGroup
from sprue.training.loop import Epoch, train
from sprue.training.spec import FitSpec


class Cancelled(Exception):
    """The driver no longer waits for the fit."""


def fit_worker(config: dict[str, Any]) -> None:
    """Ray Train's entry point: runs fit after fit, as the queue hands them out.

    A process that has imported everything continues with the next fit; a new process would need seconds.

    Args:
        config: ``queue``, the `sprue.training.class_queue.ClassQueue`; ``group``, the number of this worker group;
            ``features`` and ``runs``, folders of the features and of the checkpoints; ``threads``, how many to fit
            with.

    Raises:
        SprueError: If a fit is impossible and other workers wait for this one.
    """
    queue, worker_group = config["queue"], config["group"]
    # Ray follows OMP_NUM_THREADS where a user has set it, and fits side by side would compete for the cores.
    torch.set_num_threads(config["threads"])
    lower_priority()
    context = ray.train.get_context()
    group = ProcessGroup(context.get_world_rank(), context.get_world_size())

    def take() -> str | None:
        taken: str | None = None if group.rank else ray.get(queue.take.remote(worker_group, group.world_size))
        return broadcast_from_rank_zero(taken)

    while (name := take()) is not None:
        failure = ""
        try:
            spec: FitSpec = ray.get(ray.get(queue.spec.remote(name)))
            checkpoints = Checkpoints(location(config["runs"]) / spec.checkpoints)
            _run_fit(spec, location(config["features"]), checkpoints, queue, group)
        except Cancelled:
            return
        except SprueError as error:
            # Another attempt would fail in the same way.
            failure = str(error)
        except Exception as error:
            ray.get(queue.report_error.remote(name, f"{type(error).__name__}: {error}".splitlines()[0]))
            raise
        ray.get(queue.end.remote(worker_group, name, failure))
        if failure and group.world_size > 1:
            raise SprueError(failure)


def _run_fit(spec: FitSpec, features: UPath, checkpoints: Checkpoints, queue: ActorHandle, group: ProcessGroup) -> None:
    """Runs a fit, after its last checkpoint if it was interrupted; stores each epoch before it reports it."""
    # The first worker decides, for another might see an older state of the store.
    last = broadcast_from_rank_zero(max(checkpoints.epochs(), default=0))
    start = checkpoints.read(last) if last else None

    def agree_to_continue(reply: bool) -> None:
        if not broadcast_from_rank_zero(reply):
            raise Cancelled

    def report(epoch: Epoch, checkpoint: Checkpoint) -> None:
        reply = True
        if not group.rank:
            checkpoints.keep(checkpoint)
            # Ray's dashboard and `ray list tasks` show the name.
            task = queue.report_epoch.options(name=f"{spec.name} epoch {epoch.epoch}")
            reply = ray.get(task.remote(spec.name, asdict(epoch)))
        agree_to_continue(reply)

    reply = True
    if start is not None and not group.rank:
        reply = ray.get(queue.resume.remote(spec.name, start.history[-1]))
    agree_to_continue(reply)
    fit_flow(spec, features, ray.train.torch.get_device(), report, start, group)


def fit_flow(
    spec: FitSpec,
    features: UPath,
    device: torch.device,
    report: Callable[[Epoch, Checkpoint], None],
    start: Checkpoint | None = None,
    group: ProcessGroup = SINGLE_PROCESS,
) -> None:
    """Fits a flow on its stored features in this process; see `sprue.training.loop.train`."""
    table = spec.table(features)
    training, validation = spec.dataloader(table, spec.train), spec.dataloader(table, spec.validation)
    synthetic = InMemoryDataLoader.of(spec.synthetic_maps(features)) if spec.weighted else None
    train(spec.build_flow(), training, validation, spec.fit, device, report, start, group, synthetic)
