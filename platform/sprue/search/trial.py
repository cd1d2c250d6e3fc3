"""One trial of a search: fits a class's flow at a point of the space, and says after each epoch how well it does."""

import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import ray
import ray.tune
import torch
from numpy.typing import NDArray
from upath import UPath

from sprue.errors import SprueError
from sprue.features.tables import FeatureTable
from sprue.inference.detector import Scoring, best_device
from sprue.inference.memory import keep_freed_memory
from sprue.search.drawn import drawn_maps
from sprue.search.objective import Objective
from sprue.search.space import Point, at_point
from sprue.store import location, remove_folder
from sprue.training.checkpoint import Checkpoint, Checkpoints
from sprue.training.feed import MemoryFeed, sample_size
from sprue.training.fit import Slots, fit_classes, run_name
from sprue.training.loop import Epoch, train
from sprue.training.worker import FitRequest

Maps = list[NDArray[np.float16]]
Report = Callable[[Epoch, Checkpoint], None]


@dataclass(frozen=True)
class TrialData:
    """What all trials of a class read.

    Attributes:
        train: Maps [N, C, H, W] of the training samples; none if they are too large for memory or for several workers.
        validation: Those of the validation samples.
        drawn: Those of the validation samples with drawn defects.
    """

    train: Maps
    validation: Maps
    drawn: Maps

    @staticmethod
    def feed(maps: Maps) -> MemoryFeed:
        """Shared maps as a feed, without a copy."""
        with warnings.catch_warnings():
            # Ray's shared memory can't be written to, and is not.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return MemoryFeed([torch.from_numpy(map_NCHW) for map_NCHW in maps])


def read_trial_data(request: FitRequest, drawn: str) -> TrialData:
    """Reads the features of a class and of its drawn defects, which are in the table `drawn`."""
    table = FeatureTable(location(request.table))
    places = request.build_flow(table).config.maps
    size = len(request.train) * sample_size(table, request.views, places)
    # Several workers read them themselves.
    unshared = request.settings.workers > 1 or size > request.settings.memory * 2**30
    return TrialData(
        [] if unshared else table.read_samples(request.train, request.views, places),
        table.read_samples(request.validation, request.views, places),
        drawn_maps(table, FeatureTable(location(drawn)), request.validation, places),
    )


@dataclass(frozen=True)
class DrawnJudge:
    """The objective of a checkpoint, for a process that has the shared data within reach.

    Attributes:
        flow_name: A key of `defectflow.FLOWS`.
        flow_config: All of the flow's settings.
        data: Ray's reference to the `TrialData`.
        scoring: How a score is made.
    """

    flow_name: str
    flow_config: Mapping[str, Any]
    data: "ray.ObjectRef[TrialData]"
    scoring: Scoring

    def __call__(self, checkpoint: Checkpoint) -> dict[str, float]:
        """How well drawn defects are found, under the name ``objective``."""
        data = ray.get(self.data)
        objective = Objective(data.validation, data.drawn, self.scoring)
        return {"objective": objective(self.flow_name, self.flow_config, checkpoint.flow)}


@dataclass(frozen=True)
class Trial:
    """Ray Tune's trainable, the same for all trials of a class.

    Attributes:
        request: The recipe's fit.
        epochs: Of a whole trial; as in the request if None.
        data: Ray's reference to the `TrialData`, of which each machine has one copy.
        scoring: How a score is made.
        slots: What a trial gets.
        runs: Folder of the trials' checkpoints while several workers fit one.
    """

    request: FitRequest
    epochs: int | None
    data: "ray.ObjectRef[TrialData]"
    scoring: Scoring
    slots: Slots
    runs: UPath

    @property
    def resources(self) -> dict[str, float]:
        """What Ray Tune keeps for a trial."""
        if self.slots.workers > 1:
            # Ray Train keeps the workers' cores, and none may be missing. Of Ray Tune a trial has to want something.
            return {"memory": 2**20}
        return {"cpu": self.slots.cpus, "gpu": self.slots.gpus}

    def __call__(self, point: Point) -> None:
        """Fits at a point, in this process; in a run of Ray Train if the fit has several workers."""
        request = at_point(self.request, point, self.epochs)
        table = FeatureTable(location(request.table))
        judge = DrawnJudge(request.flow_name, request.whole_config(table), self.data, self.scoring)
        keep_freed_memory()
        torch.set_num_threads(self.slots.cpus)
        done = 0

        def report(epoch: Epoch, checkpoint: Checkpoint) -> None:
            nonlocal done
            done = epoch.epoch
            with tempfile.TemporaryDirectory() as folder:
                checkpoint.write(UPath(folder))
                stored = ray.tune.Checkpoint.from_directory(folder)
                ray.tune.report(asdict(epoch) | judge(checkpoint), checkpoint=stored)

        try:
            (self._fit_on_workers if self.slots.workers > 1 else self._fit_here)(request, report)
        except SprueError as error:
            # A flow that can't be fitted finds nothing. Another attempt would give the same answer.
            ray.tune.report({"epoch": done + 1, "objective": 0.0, "failure": str(error)})

    def _fit_here(self, request: FitRequest, report: Report) -> None:
        table = FeatureTable(location(request.table))
        data: TrialData = ray.get(self.data)
        training = data.feed(data.train) if data.train else request.feed(table, request.train)
        validation = data.feed(data.validation)
        flow = request.build_flow(table)
        train(flow, training, validation, request.settings, best_device(), report, _latest_checkpoint())

    def _fit_on_workers(self, request: FitRequest, report: Report) -> None:
        # Another trial may try the same point.
        runs = self.runs / str(ray.tune.get_context().get_trial_id())
        checkpoints = Checkpoints(runs / run_name(request))
        # What Ray Tune has heard of is where a trial goes on.
        remove_folder(runs)
        start = _latest_checkpoint()
        if start is not None:
            checkpoints.keep(start)

        def on_epoch(_: str, epoch: Epoch) -> None:
            # It stays until this returns, unless the workers have died and begun again meanwhile.
            if max(checkpoints.epochs()) != epoch.epoch:
                raise RuntimeError(f"epoch {epoch.epoch} was followed by another before it was judged")
            report(epoch, checkpoints.read(epoch.epoch))

        try:
            slots = replace(self.slots, count=1)
            (outcome,) = fit_classes([request], runs, on_epoch, slots=slots, lockstep=True)
        finally:
            remove_folder(runs)
        if outcome.failure:
            # Ray Tune tries again what was lost with its processes.
            raise (RuntimeError if outcome.lost else SprueError)(outcome.failure)


def read_checkpoint(stored: ray.tune.Checkpoint) -> Checkpoint:
    """A checkpoint from Ray's storage."""
    with stored.as_directory() as folder:
        return Checkpoint.read(UPath(folder))


def _latest_checkpoint() -> Checkpoint | None:
    """The last checkpoint of this trial, if it was interrupted."""
    stored = ray.tune.get_checkpoint()
    return None if stored is None else read_checkpoint(stored)
