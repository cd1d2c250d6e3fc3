"""Repeats the fit of a registered version from its record and compares the weights."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from upath import UPath

from sprue.errors import SprueError
from sprue.inference.detector import best_device
from sprue.inference.weights import portable_state
from sprue.tracking.lineage import Lineage
from sprue.tracking.registry import RegisteredDetector, load_detector
from sprue.training.checkpoint import Checkpoint
from sprue.training.loop import Epoch
from sprue.training.spec import FitSpec
from sprue.training.worker import fit_flow


@dataclass(frozen=True)
class Comparison:
    """The weights of two fits.

    Attributes:
        equal: Whether all weights are equal, bit for bit.
        largest: The largest difference of a weight.
        epoch: The epoch that the new weights are of.
    """

    equal: bool
    largest: float
    epoch: int


def reproduce(registered: RegisteredDetector, store: UPath, on_epoch: Callable[[Epoch], None]) -> Comparison:
    """Fits a version's flow once more in this process, with as many threads and in the precision of the first time.

    Args:
        registered: The version.
        store: Where the features are.
        on_epoch: Called after each epoch.

    Raises:
        SprueError: If the version has no record or was fitted by several workers, or its features are not in the store.
    """
    lineage = Lineage.read(registered)
    spec = FitSpec.model_validate(lineage.spec, strict=False)
    if spec.fit.workers > 1:
        raise SprueError(
            f"{registered} was fitted by {spec.fit.workers} workers; one process does not sum their gradients in the "
            "same order, bit for bit"
        )
    torch.set_num_threads(lineage.fit["cpus"])
    precision = lineage.fit["history"][0]["precision"]
    spec = spec.model_copy(update={"fit": spec.fit.model_copy(update={"precision": precision})})
    best: tuple[float, Checkpoint] | None = None

    def report(epoch: Epoch, checkpoint: Checkpoint) -> None:
        nonlocal best
        if best is None or epoch.validation_nll < best[0]:
            best = epoch.validation_nll, checkpoint
        on_epoch(epoch)

    fit_flow(spec, store / spec.dataset / "features", best_device(), report)
    assert best is not None  # a fit has at least one epoch
    recorded = portable_state(load_detector(registered).flow)
    repeated = best[1].flow
    differences = [float((value.double() - repeated[name].double()).abs().max()) for name, value in recorded.items()]
    equal = all(torch.equal(value, repeated[name]) for name, value in recorded.items())
    return Comparison(equal, max(differences), best[1].epoch)
