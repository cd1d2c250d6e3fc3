"""What runs in a Ray Train worker: reads a class's features, fits its flow, reports an epoch at a time."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
from ray.util.queue import Queue

from defectflow import Flow, build_flow, fitting_config
from sprue.data.samples import Sample
from sprue.errors import SprueError
from sprue.features.tables import FeatureTable
from sprue.inference.detector import require_views
from sprue.store import location
from sprue.training.checkpoint import Checkpoint
from sprue.training.loop import Epoch, FitSettings, train


def run_params(
    flow_name: str, flow_config: Mapping[str, Any], settings: Mapping[str, Any], fingerprint: str, pictures: int
) -> dict[str, Any]:
    """A fit's settings by the names under which its run shows them."""
    flow = {f"flow.{name}": value for name, value in flow_config.items()}
    fit = {f"fit.{name}": value for name, value in settings.items()}
    return {"flow": flow_name, "features": fingerprint, "train_pictures": pictures, **flow, **fit}


@dataclass(frozen=True)
class FitRequest:
    """Everything a worker on any machine needs to fit one class.

    Attributes:
        class_name: The product class.
        fingerprint: Of the feature spec.
        table: The class's feature table, as every node sees it.
        blocks: How many feature maps each scale of a picture has.
        train: The training samples, each the digests of its pictures in the order of its views.
        validation: The validation samples.
        flow_name: A key of `defectflow.FLOWS`.
        flow_config: The flow's settings that are set by hand.
        settings: How to fit.
    """

    class_name: str
    fingerprint: str
    table: str
    blocks: int
    train: tuple[Sample, ...]
    validation: tuple[Sample, ...]
    flow_name: str
    flow_config: dict[str, Any]
    settings: FitSettings

    @property
    def views(self) -> int:
        """Pictures of a sample."""
        return len(self.train[0])

    @property
    def pictures(self) -> int:
        """How many training pictures there are."""
        return len(self.train) * self.views

    def params(self) -> dict[str, Any]:
        """The settings by the names under which a run shows them."""
        flow = self.whole_config(FeatureTable(location(self.table)))
        return run_params(self.flow_name, flow, asdict(self.settings), self.fingerprint, self.pictures)

    def check(self) -> None:
        """Checks that the features are there and that the flow accepts its settings and the samples.

        Raises:
            SprueError: If not; the message names the class.
        """
        table = FeatureTable(location(self.table))
        if not len(table):
            raise SprueError(f"class {self.class_name} has no features in {self.table}; run the features stage first")
        try:
            flow = self.build_flow(table)
        except (TypeError, ValueError) as error:
            raise SprueError(f"flow: {error}") from error
        require_views(self.class_name, self.flow_name, flow, self.views)

    def whole_config(self, table: FeatureTable) -> dict[str, Any]:
        """The flow's settings, with what follows from the features.

        Raises:
            ValueError: If the flow does not accept its settings.
        """
        scales = [table.shapes[start : start + self.blocks] for start in range(0, len(table.shapes), self.blocks)]
        return fitting_config(self.flow_name, scales, self.pictures, self.flow_config)

    def build_flow(self, table: FeatureTable) -> Flow:
        """A new flow, the same for the same seed.

        Raises:
            ValueError: If the flow does not accept its settings.
        """
        torch.manual_seed(self.settings.seed)
        return build_flow(self.flow_name, **self.whole_config(table))


def fit_worker(config: dict[str, Any]) -> None:
    """Ray Train's entry point in the worker.

    Args:
        config: ``request``, a `FitRequest`; ``epochs``, a queue that gets (class name, `Epoch`) after each epoch.
    """
    request: FitRequest = config["request"]
    epochs: Queue = config["epochs"]
    table = FeatureTable(location(request.table))
    train_maps = _maps(table, request.train, request.views)
    validation_maps = _maps(table, request.validation, request.views)

    def report(epoch: Epoch, checkpoint: Checkpoint) -> None:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint.write(Path(folder))
            ray.train.report(asdict(epoch), checkpoint=ray.train.Checkpoint.from_directory(folder))
        epochs.put((request.class_name, epoch))

    flow = request.build_flow(table)
    device = ray.train.torch.get_device()
    train(flow, train_maps, validation_maps, request.settings, device, report, _latest_checkpoint())


def _maps(table: FeatureTable, samples: Sequence[Sample], views: int) -> list[torch.Tensor]:
    return [torch.from_numpy(map_NCHW) for map_NCHW in table.read_samples(samples, views)]


def _latest_checkpoint() -> Checkpoint | None:
    """The last checkpoint of an earlier, interrupted attempt under the same name."""
    stored = ray.train.get_checkpoint()
    if stored is None:
        return None
    with stored.as_directory() as folder:
        return Checkpoint.read(Path(folder))
