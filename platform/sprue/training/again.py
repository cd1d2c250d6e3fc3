"""Fits a registered version again from its record, and compares the weights."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from upath import UPath

from sprue.errors import SprueError
from sprue.inference.detector import best_device, portable_state
from sprue.tracking.lineage import Lineage
from sprue.tracking.registry import RegisteredDetector, load_detector
from sprue.training.checkpoint import Checkpoint
from sprue.training.loop import Epoch, FitSettings
from sprue.training.worker import FitRequest, fit_flow


@dataclass(frozen=True)
class Comparison:
    """What fitting a version again has shown.

    Attributes:
        equal: Whether all weights are equal, bit for bit.
        largest: The largest difference of a weight.
        epoch: The epoch that the new weights are of.
    """

    equal: bool
    largest: float
    epoch: int


def request_of(registered: RegisteredDetector, store: UPath) -> FitRequest:
    """The fit that a version comes from, on the features in a store.

    Raises:
        SprueError: If the version has no record, or its features are not in the store.
    """
    lineage = Lineage.read(registered)
    facts = lineage.facts
    request = FitRequest(
        registered.class_name,
        facts["fingerprint"],
        str(store / facts["dataset"] / "features" / facts["fingerprint"] / registered.class_name),
        len(facts["spec"]["blocks"]),
        lineage.digests("train"),
        lineage.digests("validation"),
        facts["flow_name"],
        facts["flow_config"],
        FitSettings(**facts["settings"]),
    )
    request.check()
    return request


def fit_again(registered: RegisteredDetector, store: UPath, on_epoch: Callable[[Epoch], None]) -> Comparison:
    """Fits a version's flow again in this process, with as many threads as then.

    Args:
        registered: The version.
        store: Where the features are.
        on_epoch: Called after each epoch.

    Raises:
        SprueError: If the version has no record or was fitted by several workers, or its features are not in the store.
    """
    request = request_of(registered, store)
    if request.settings.workers > 1:
        raise SprueError(
            f"{registered.class_name} version {registered.version} was fitted by {request.settings.workers} workers, "
            "whose sums one process does not repeat bit for bit"
        )
    torch.set_num_threads(Lineage.read(registered).facts["cpus"] or torch.get_num_threads())
    best: tuple[float, Checkpoint] | None = None

    def report(epoch: Epoch, checkpoint: Checkpoint) -> None:
        nonlocal best
        if best is None or epoch.validation_nll < best[0]:
            best = epoch.validation_nll, checkpoint
        on_epoch(epoch)

    fit_flow(request, best_device(), report)
    assert best is not None  # a fit has at least one epoch
    then = portable_state(load_detector(registered).flow)
    now = best[1].flow
    differences = [float((value.double() - now[name].cpu().double()).abs().max()) for name, value in then.items()]
    equal = all(torch.equal(value, now[name].cpu()) for name, value in then.items())
    return Comparison(equal, max(differences), best[1].epoch)
