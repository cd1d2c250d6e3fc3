"""One trial of a search: fits a class's flow at a point of the space and reports the objective after each epoch."""

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import numpy as np
import ray
import ray.tune
import torch
from numpy.typing import NDArray
from upath import UPath

from sprue.errors import SprueError
from sprue.inference.detector import best_device
from sprue.inference.memory import keep_freed_memory
from sprue.inference.priority import lower_priority
from sprue.search.objective import Objective
from sprue.search.space import Point
from sprue.store import remove_folder
from sprue.training.checkpoint import Checkpoint, Checkpoints
from sprue.training.dataloader import InMemoryDataLoader, sample_size
from sprue.training.loop import Epoch, train
from sprue.training.placement import FitPlacement
from sprue.training.run import fit_classes
from sprue.training.spec import FitSpec

Maps = list[NDArray[np.float16]]
Report = Callable[[Epoch, Checkpoint], None]


@dataclass(frozen=True)
class TrialData:
    """What all trials of a class read.

    Attributes:
        train: Maps [N, C, H, W] of the training samples; none if they exceed the memory or several workers read them.
        validation: Those of the validation samples.
        synthetic: Those of the validation samples with synthetic defects.
    """

    train: Maps
    validation: Maps
    synthetic: Maps


def read_trial_data(spec: FitSpec, features: UPath) -> TrialData:
    """Reads the features of a class, and those of its synthetic defects from their own table."""
    table = spec.table(features)
    indices = spec.maps
    size = len(spec.train) * sample_size(table, spec.views, indices)
    # Several workers read the training maps themselves.
    unshared = spec.fit.workers > 1 or size > spec.fit.memory * 2**30
    return TrialData(
        [] if unshared else table.read_samples(spec.train, spec.views, indices),
        table.read_samples(spec.validation, spec.views, indices),
        spec.synthetic_maps(features),
    )


class DataOwner:
    """An actor that reads a class's data and owns it: Ray frees it when the actor ends.

    If the driver owned it, it would stay until the last class is searched: Ray Tune pickles the trials, and a reference
    that is pickled outside of Ray's own calls is pinned in the process that does it.
    """

    def read(self, spec: FitSpec, features: UPath) -> "list[ray.ObjectRef[TrialData]]":
        """One reference, in a list: Ray would return what a bare one refers to."""
        return [ray.put(read_trial_data(spec, features))]


@dataclass(frozen=True)
class Trial:
    """Ray Tune's trainable, the same for all trials of a class.

    Attributes:
        spec: The recipe's plan.
        epochs: Of a full trial; as in the spec if None.
        data: Ray's reference to the `TrialData`, of which each machine has one copy.
        features: Folder of the dataset's features.
        placement: What a trial gets.
        runs: Folder of the trials' checkpoints while several workers fit one.
    """

    spec: FitSpec
    epochs: int | None
    data: "ray.ObjectRef[TrialData]"
    features: UPath
    placement: FitPlacement
    runs: UPath

    @property
    def resources(self) -> dict[str, float]:
        """What Ray Tune reserves for a trial."""
        if self.placement.workers > 1:
            # Ray Train reserves the workers' cores, and needs all of them. Ray Tune needs a request for something.
            return {"memory": 2**20}
        return {"cpu": self.placement.cpus, "gpu": self.placement.gpus}

    def __call__(self, point: Point) -> None:
        """Fits at a point: in this process, or in a run of Ray Train if the fit has several workers."""
        spec = self.spec.with_values(point, self.epochs)
        data = ray.get(self.data)
        objective = Objective(data.validation, data.synthetic, spec.scoring)
        keep_freed_memory()
        lower_priority()
        torch.set_num_threads(self.placement.cpus)
        last_epoch = 0

        def report(epoch: Epoch, checkpoint: Checkpoint) -> None:
            nonlocal last_epoch
            last_epoch = epoch.epoch
            with tempfile.TemporaryDirectory() as folder:
                checkpoint.write(UPath(folder))
                stored = ray.tune.Checkpoint.from_directory(folder)
                auroc = objective(spec.flow_name, spec.flow_config, checkpoint.flow)
                ray.tune.report({**asdict(epoch), "objective": auroc}, checkpoint=stored)

        try:
            (self._fit_on_workers if self.placement.workers > 1 else self._fit_here)(spec, report)
        except SprueError as error:
            # A flow that can't be fitted detects nothing. Another attempt would fail in the same way.
            ray.tune.report({"epoch": last_epoch + 1, "objective": 0.0, "failure": str(error)})

    def _fit_here(self, spec: FitSpec, report: Report) -> None:
        data: TrialData = ray.get(self.data)
        shared = InMemoryDataLoader.of(data.train) if data.train else None
        training = shared or spec.dataloader(spec.table(self.features), spec.train)
        validation, synthetic = InMemoryDataLoader.of(data.validation), InMemoryDataLoader.of(data.synthetic)
        train(
            spec.build_flow(), training, validation, spec.fit, best_device(), report, _latest_checkpoint(),
            synthetic=synthetic if spec.weighted else None,
        )  # fmt: skip

    def _fit_on_workers(self, spec: FitSpec, report: Report) -> None:
        # Another trial may try the same point.
        runs = self.runs / str(ray.tune.get_context().get_trial_id())
        checkpoints = Checkpoints(runs / spec.checkpoints)
        # A trial resumes after the last checkpoint that Ray Tune has recorded.
        remove_folder(runs)
        start = _latest_checkpoint()
        if start is not None:
            checkpoints.keep(start)

        def on_epoch(_: str, epoch: Epoch) -> None:
            # The checkpoint stays until this returns, unless the workers have died and restarted meanwhile.
            if max(checkpoints.epochs()) != epoch.epoch:
                raise RuntimeError(f"epoch {epoch.epoch} was followed by another before it was judged")
            report(epoch, checkpoints.read(epoch.epoch))

        try:
            placement = replace(self.placement, groups=1)
            (outcome,) = fit_classes([spec], self.features, runs, on_epoch, placement=placement, synchronous=True)
        finally:
            remove_folder(runs)
        if outcome.failure:
            # Ray Tune retries what was lost with its processes.
            raise (RuntimeError if outcome.lost else SprueError)(outcome.failure)


def read_checkpoint(stored: ray.tune.Checkpoint) -> Checkpoint:
    """A checkpoint from Ray's storage."""
    with stored.as_directory() as folder:
        return Checkpoint.read(UPath(folder))


def _latest_checkpoint() -> Checkpoint | None:
    """The last checkpoint of this trial, if it was interrupted."""
    stored = ray.tune.get_checkpoint()
    return None if stored is None else read_checkpoint(stored)
