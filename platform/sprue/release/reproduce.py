"""Repeats the fits of a registered version from its record and compares the weights."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from upath import UPath

from defectflow import Ensemble
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
    """The weights of two fits, or of two fits for each fold.

    Attributes:
        equal: Whether all weights are equal, bit for bit.
        largest: The largest difference of a weight.
        epochs: The epoch that the new weights of each fit are of.
    """

    equal: bool
    largest: float
    epochs: tuple[int, ...]


def reproduce(registered: RegisteredDetector, store: UPath, on_epoch: Callable[[Epoch], None]) -> Comparison:
    """Repeats a version's fits in this process, with as many threads and in the precision of the first time.

    Args:
        registered: The version.
        store: Where the features are.
        on_epoch: Called after each epoch.

    Raises:
        SprueError: If the version has no record or was fitted by several workers, or its features are not in the store.
    """
    fits = Lineage.read(registered).fits
    workers = fits[0]["spec"]["fit"]["workers"]
    if workers > 1:
        raise SprueError(
            f"{registered} was fitted by {workers} workers; one process does not sum their gradients in the "
            "same order, bit for bit"
        )
    repeated = [_fit_again(fit, store, on_epoch) for fit in fits]
    flow = load_detector(registered).flow
    recorded = [portable_state(member) for member in (flow.members if isinstance(flow, Ensemble) else [flow])]
    pairs = [
        (value, checkpoint.flow[name])
        for state, checkpoint in zip(recorded, repeated, strict=True)
        for name, value in state.items()
    ]
    return Comparison(
        all(torch.equal(*pair) for pair in pairs),
        max(float((old.double() - new.double()).abs().max()) for old, new in pairs),
        tuple(checkpoint.epoch for checkpoint in repeated),
    )


def _fit_again(fit: dict[str, Any], store: UPath, on_epoch: Callable[[Epoch], None]) -> Checkpoint:
    """Repeats a recorded fit; returns its best epoch."""
    spec = FitSpec.model_validate(fit["spec"], strict=False)
    torch.set_num_threads(fit["cpus"])
    precision = fit["history"][0]["precision"]
    spec = spec.model_copy(update={"fit": spec.fit.model_copy(update={"precision": precision})})
    best: tuple[float, Checkpoint] | None = None

    def report(epoch: Epoch, checkpoint: Checkpoint) -> None:
        nonlocal best
        if best is None or epoch.validation_nll < best[0]:
            best = epoch.validation_nll, checkpoint
        on_epoch(epoch)

    fit_flow(spec, store / spec.dataset / "features", best_device(), report)
    assert best is not None  # a fit has at least one epoch
    return best[1]
