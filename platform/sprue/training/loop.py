"""The training loop: plain torch, a checkpoint an epoch; several processes may share its steps.

A sample is a picture, or a picture of each of its views; a flow's maps are those of the first view, then those of the
second, and so on.

Shapes: B samples of a step, C channels, H rows, W columns of a map.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from defectflow import Flow
from sprue.errors import SprueError
from sprue.training.checkpoint import Checkpoint
from sprue.training.feed import Feed
from sprue.training.share import ALONE, Share


@dataclass(frozen=True)
class FitSettings:
    """How a flow is fitted.

    Attributes:
        epochs: Passes over the training pictures.
        patience: Epochs without a better validation likelihood after which the fit ends early; 0 for never.
        batch_size: Samples a step, of all workers together.
        learning_rate: Peak of the schedule.
        schedule: What follows the warm-up: a cosine to zero, or the peak throughout.
        warmup: Share of the steps that the rate rises in, linearly.
        optimizer: ``adam`` adds the weight decay to the gradient, ``adamw`` takes it off the weights.
        betas: Decay of the optimizer's means of the gradient and of its square.
        epsilon: Added to the optimizer's divisor.
        weight_decay: Strength of the pull of the weights to zero.
        gradient_norm: Gradients are scaled down to this norm.
        recompute: Whether memory is saved by computing the couplings' inputs anew in the backward pass.
        workers: Processes that share a class's steps, each on its own GPU where there are any.
        memory: GiB that a worker's training features may take; larger ones are streamed, and shuffled in parts. (The
            validation features have as much again.)
        seed: Of the initial weights, the permutations, the order of the pictures and the noise.
    """

    epochs: int = 10
    patience: int = 0
    batch_size: int = 16
    learning_rate: float = 1e-3
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: float = 0.2
    optimizer: Literal["adam", "adamw"] = "adam"
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    gradient_norm: float = 1.0
    recompute: bool = False
    workers: int = 1
    memory: float = 8.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            SprueError: If a setting is out of range.
        """
        if self.epochs < 1 or self.batch_size < 1:
            raise SprueError(f"fit: epochs and batch_size are at least 1; got {self.epochs} and {self.batch_size}")
        if self.patience < 0 or self.workers < 1 or self.memory <= 0:
            raise SprueError(
                "fit: patience is not below 0, workers is at least 1, memory is above 0; "
                f"got {self.patience}, {self.workers} and {self.memory}"
            )
        if self.learning_rate <= 0 or self.gradient_norm <= 0 or not 0 <= self.warmup < 1:
            raise SprueError("fit: learning_rate and gradient_norm are above 0, warmup from 0 to below 1")
        if self.schedule not in ("cosine", "constant"):
            raise SprueError(f"fit.schedule: {self.schedule!r} is neither 'cosine' nor 'constant'")
        if self.optimizer not in ("adam", "adamw"):
            raise SprueError(f"fit.optimizer: {self.optimizer!r} is neither 'adam' nor 'adamw'")
        object.__setattr__(self, "betas", tuple(self.betas))
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas) or self.epsilon <= 0:
            raise SprueError(f"fit: betas are two numbers from 0 to below 1, epsilon is above 0; got {self.betas}")


@dataclass(frozen=True)
class Epoch:
    """What an epoch did.

    Attributes:
        epoch: From 1.
        train_nll: Of the training pictures as they were seen, in nats per dimension.
        validation_nll: Of the validation pictures after the epoch, in nats per dimension.
        learning_rate: Of the last step.
        seconds: Time of the training pass.
        pictures_per_second: Training pictures over that time.
        time: When it ended, in seconds since 1970.
    """

    epoch: int
    train_nll: float
    validation_nll: float
    learning_rate: float
    seconds: float
    pictures_per_second: float
    time: float

    def __str__(self) -> str:
        """One line for the terminal."""
        return (
            f"epoch {self.epoch:3d}  nll {self.train_nll:7.4f}  validation {self.validation_nll:7.4f}  "
            f"{self.pictures_per_second:6.1f} pictures/s  {60 / self.seconds:5.1f} epochs/min"
        )


def rate_at(step: int, steps: int, settings: FitSettings) -> float:
    """The learning rate of a step, a function of the step alone, so that resuming needs no state.

    >>> settings = FitSettings(learning_rate=1.0, warmup=0.2)
    >>> [round(rate_at(step, 10, settings), 2) for step in (0, 1, 2, 6, 9)]
    [0.5, 1.0, 1.0, 0.5, 0.04]
    """
    rising = settings.warmup * steps
    if step + 1 <= rising:
        return settings.learning_rate * (step + 1) / rising
    if settings.schedule == "constant":
        return settings.learning_rate
    progress = max(0.0, step - rising) / (steps - rising)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def build_optimizer(flow: Flow, settings: FitSettings) -> torch.optim.Optimizer:
    """The optimizer of all of a flow's parameters; its rate is set at every step."""
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[settings.optimizer]
    return kind(
        flow.parameters(), betas=settings.betas, eps=settings.epsilon, weight_decay=settings.weight_decay, fused=True
    )


def to_device(batch: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """A stored batch as float32 maps [B, C, H, W] on a device."""
    return [map_BCHW.to(device, non_blocking=True).float() for map_BCHW in batch]


@torch.no_grad()
def mean_nll(flow: Flow, feed: Feed, size: int, device: torch.device, share: Share = ALONE) -> float:
    """Mean negative log-likelihood of a feed's samples, in nats per dimension, without noise."""
    flow.eval()
    batches = (to_device(share.take(whole), device) for whole in feed.ordered(size))
    total = sum(float(flow.nll(batch).sum()) for batch in batches if samples_in(batch))
    return share.total(total, device) / len(feed)


def samples_in(batch: Sequence[Tensor]) -> int:
    """How many samples a batch has."""
    return max(len(map_BCHW) for map_BCHW in batch)


def is_done(history: Sequence[dict[str, Any]], settings: FitSettings) -> bool:
    """Whether a fit with these figures of its epochs has ended, by its epochs or its patience.

    >>> history = [{"epoch": epoch, "validation_nll": nll} for epoch, nll in enumerate((3.0, 2.0, 2.5, 2.4), 1)]
    >>> [is_done(history, FitSettings(epochs=9, patience=patience)) for patience in (0, 2, 3)]
    [False, True, False]
    """
    if len(history) >= settings.epochs:
        return True
    if not history or not settings.patience:
        return False
    best = min(history, key=lambda row: float(row["validation_nll"]))
    return len(history) - int(best["epoch"]) >= settings.patience


def train(
    flow: Flow,
    training: Feed,
    validation: Feed,
    settings: FitSettings,
    device: torch.device,
    report: Callable[[Epoch, Checkpoint], None],
    start: Checkpoint | None = None,
    share: Share = ALONE,
) -> None:
    """Fits a flow by maximum likelihood.

    The random numbers of an epoch depend on the seed and the epoch alone, so an interrupted fit that goes on from
    a checkpoint ends with the weights of an undisturbed one.

    Args:
        flow: A new flow.
        training: The training samples.
        validation: The validation samples.
        settings: How to fit.
        device: Where the flow goes.
        report: Called after each epoch.
        start: The checkpoint to go on from.
        share: What this process does of each step.

    Raises:
        SprueError: If the likelihood stops being finite.
    """
    # Weights of units that have died decay into denormal numbers, on which CPUs compute ten times as slowly.
    torch.set_flush_denormal(True)
    flow.to(device)
    flow.recompute = settings.recompute
    if start is None:
        flow.fit_adaptor(to_device(batch, device) for batch in training.ordered(settings.batch_size))
    else:
        flow.load_state_dict(start.flow)
    optimizer = build_optimizer(flow, settings)
    if start is not None:
        start.restore(optimizer)
    history = list(start.history) if start else []
    while not is_done(history, settings):
        epoch = len(history) + 1
        started = time.perf_counter()
        torch.manual_seed(settings.seed * 1_000_003 + epoch)
        train_nll, rate = _train_epoch(flow, training, optimizer, settings, epoch, device, share)
        seconds = time.perf_counter() - started
        validation_nll = mean_nll(flow, validation, settings.batch_size, device, share)
        if not (math.isfinite(train_nll) and math.isfinite(validation_nll)):
            raise SprueError(
                f"the likelihood stopped being finite in epoch {epoch} (training {train_nll}, validation "
                f"{validation_nll}): lower fit.learning_rate; the last good checkpoint is kept"
            )
        result = Epoch(
            epoch, train_nll, validation_nll, rate, seconds, len(training) * flow.views / seconds, time.time()
        )
        history.append(asdict(result))
        report(result, Checkpoint.take(flow, optimizer, epoch, list(history)))


def _train_epoch(
    flow: Flow,
    feed: Feed,
    optimizer: torch.optim.Optimizer,
    settings: FitSettings,
    epoch: int,
    device: torch.device,
    share: Share,
) -> tuple[float, float]:
    """One pass; the mean likelihood of its samples as they were seen, and the last learning rate."""
    flow.train()
    per_epoch = math.ceil(len(feed) / settings.batch_size)
    total, rate = 0.0, 0.0
    for index, whole in enumerate(feed.shuffled(settings.batch_size)):
        rate = rate_at((epoch - 1) * per_epoch + index, settings.epochs * per_epoch, settings)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        flow.part = share.part(samples_in(whole))
        batch = to_device(share.take(whole), device)
        if samples_in(batch):
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                nll = flow.nll(batch).sum()
            (nll / samples_in(whole)).backward()  # type: ignore[no-untyped-call]
            total += float(nll.detach())
        share.add_gradients(flow)
        torch.nn.utils.clip_grad_norm_(flow.parameters(), settings.gradient_norm)
        optimizer.step()
    return share.total(total, device) / len(feed), rate
