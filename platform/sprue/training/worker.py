"""What runs in a Ray Train worker: reads a class's features, fits its flow, stores its epochs; then the next class."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.actor import ActorHandle
from ray.train.collective import broadcast_from_rank_zero

from defectflow import Flow, build_flow, fitting_config
from sprue.data.samples import Sample
from sprue.errors import SprueError
from sprue.features.tables import FeatureTable
from sprue.inference.detector import require_views
from sprue.store import location
from sprue.training.checkpoint import Checkpoint, Checkpoints
from sprue.training.feed import Feed, open_feed
from sprue.training.loop import Epoch, FitSettings, train
from sprue.training.share import ALONE, Share


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

    def feed(self, table: FeatureTable, samples: Sequence[Sample]) -> Feed:
        """Samples as the flow is given them, in memory as far as the settings allow.

        Raises:
            SprueError: If a picture is not in the table.
        """
        limit = int(self.settings.memory * 2**30)
        return open_feed(table, samples, self.views, self.whole_config(table)["maps"], limit)

    def build_flow(self, table: FeatureTable) -> Flow:
        """A new flow, the same for the same seed.

        Raises:
            ValueError: If the flow does not accept its settings.
        """
        torch.manual_seed(self.settings.seed)
        return build_flow(self.flow_name, **self.whole_config(table))


class Cancelled(Exception):
    """Nobody waits for the fit any more."""


def fit_worker(config: dict[str, Any]) -> None:
    """Ray Train's entry point in each worker of a slot: fits class after class, as the queue gives them.

    A process that has imported everything goes on to the next class, for which a new one would need seconds.

    Args:
        config: ``queue``, the `sprue.training.queue.FitQueue`, and ``slot``, this run's number there; ``fits``, for
            each class Ray's reference to its `FitRequest` and the folder of its checkpoints; ``threads``, how many
            to fit with.

    Raises:
        SprueError: If a class can't be fitted and other workers wait for this one.
    """
    queue, slot = config["queue"], config["slot"]
    # Ray goes by OMP_NUM_THREADS where a user has set it, and fits side by side would fight over the cores.
    torch.set_num_threads(config["threads"])
    context = ray.train.get_context()
    share = Share(context.get_world_rank(), context.get_world_size())

    def take() -> str | None:
        taken: str | None = None if share.rank else ray.get(queue.take.remote(slot))
        return broadcast_from_rank_zero(taken)

    while (class_name := take()) is not None:
        stored, folder = config["fits"][class_name]
        failure = ""
        try:
            _fit_class(ray.get(stored), Checkpoints(location(folder)), queue, share)
        except Cancelled:
            return
        except SprueError as error:
            # Another attempt would end in the same way.
            failure = str(error)
        except Exception as error:
            ray.get(queue.stumble.remote(class_name, f"{type(error).__name__}: {error}".splitlines()[0]))
            raise
        ray.get(queue.end.remote(slot, class_name, failure))
        if failure and share.count > 1:
            raise SprueError(failure)


def _fit_class(request: FitRequest, checkpoints: Checkpoints, queue: ActorHandle, share: Share) -> None:
    """Fits a class, from its last checkpoint if it was interrupted. What is told of an epoch is stored before."""
    # The first worker's answer, for another might see the store as it was.
    last = broadcast_from_rank_zero(max(checkpoints.epochs(), default=0))
    start = checkpoints.read(last) if last else None

    def report(epoch: Epoch, checkpoint: Checkpoint) -> None:
        goes_on = True
        if not share.rank:
            checkpoints.keep(checkpoint)
            # Ray's dashboard and `ray list tasks` show the name.
            told = queue.epoch.options(name=f"{request.class_name} epoch {epoch.epoch}")
            goes_on = ray.get(told.remote(request.class_name, asdict(epoch)))
        if not broadcast_from_rank_zero(goes_on):
            raise Cancelled

    goes_on = True
    if start is not None and not share.rank:
        goes_on = ray.get(queue.resume.remote(request.class_name, start.history[-1]))
    if not broadcast_from_rank_zero(goes_on):
        raise Cancelled
    fit_flow(request, ray.train.torch.get_device(), report, start, share)


def fit_flow(
    request: FitRequest,
    device: torch.device,
    report: Callable[[Epoch, Checkpoint], None],
    start: Checkpoint | None = None,
    share: Share = ALONE,
) -> None:
    """Fits a class's flow on its stored features in this process; see `sprue.training.loop.train`."""
    table = FeatureTable(location(request.table))
    training, validation = request.feed(table, request.train), request.feed(table, request.validation)
    train(request.build_flow(table), training, validation, request.settings, device, report, start, share)
