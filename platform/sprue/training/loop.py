"""The training loop: plain torch, one checkpoint an epoch; several processes may share its steps.

A sample is one image, or one image of each view. A flow's maps are those of the first view, then of the second, ...

Shapes: B samples of a step, C channels, H rows, W columns of a map.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from defectflow import Flow
from sprue.config import FitSettings
from sprue.errors import SprueError
from sprue.training.checkpoint import Checkpoint
from sprue.training.dataloader import DataLoader
from sprue.training.distributed import SINGLE_PROCESS, ProcessGroup

VERSION = 2
"""Changes when the same spec gives other weights."""

LEAST_STANDARD = 5
"""Validation samples below which scores are standardised by the training samples, too."""


@dataclass(frozen=True)
class Epoch:
    """The metrics of an epoch.

    Attributes:
        epoch: From 1.
        train_nll: Of the training images as the steps saw them, in nats per dimension.
        validation_nll: Of the validation images after the epoch, in nats per dimension.
        learning_rate: Of the last step.
        seconds: Time of the training pass.
        images_per_second: Training images over that time.
        precision: ``bfloat16`` or ``float32``; see `FitSettings.precision`.
        time: When it ended, in seconds since 1970.
    """

    epoch: int
    train_nll: float
    validation_nll: float
    learning_rate: float
    seconds: float
    images_per_second: float
    precision: str
    time: float

    def __str__(self) -> str:
        """One line for the terminal."""
        return (
            f"epoch {self.epoch:3d}  nll {self.train_nll:7.4f}  validation {self.validation_nll:7.4f}  "
            f"{self.images_per_second:6.1f} images/s  {60 / self.seconds:5.1f} epochs/min"
        )


def rate_at(step: int, steps: int, settings: FitSettings) -> float:
    """The learning rate of a step. It depends on the step alone, so that resuming needs no state.

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
    """The optimizer of all parameters of a flow; the loop sets its rate at every step."""
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[settings.optimizer]
    # The baseline has no parameters, and torch refuses to optimise nothing.
    parameters = list(flow.parameters()) or [torch.nn.Parameter(torch.empty(0))]
    return kind(parameters, betas=settings.betas, eps=settings.epsilon, weight_decay=settings.weight_decay, fused=True)


def trains_in_bfloat16(settings: FitSettings, device: torch.device) -> bool:
    """Whether the couplings are trained in bfloat16 on a device."""
    if settings.precision != "auto":
        return settings.precision == "bfloat16"
    supported = torch.cpu.get_capabilities()
    return device.type == "cuda" or bool(supported.get("avx512_bf16") or supported.get("amx_bf16"))


def to_device(batch: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Stored float16 maps as float32 maps [B, C, H, W] on a device."""
    return [map_BCHW.to(device, non_blocking=True).float() for map_BCHW in batch]


@dataclass(frozen=True)
class _Ordered:
    """A data loader's batches on a device, in order; may be read several times."""

    dataloaders: Sequence[DataLoader]
    size: int
    device: torch.device

    def __iter__(self) -> Iterator[list[Tensor]]:
        for dataloader in self.dataloaders:
            yield from (to_device(batch, self.device) for batch in dataloader.ordered(self.size))


@torch.no_grad()
def mean_nll(
    flow: Flow, dataloader: DataLoader, size: int, device: torch.device, group: ProcessGroup = SINGLE_PROCESS
) -> float:
    """Mean negative log-likelihood of a data loader's samples, in nats per dimension, without noise."""
    flow.eval()
    batches = (to_device(group.shard(batch), device) for batch in dataloader.ordered(size))
    total = sum(float(flow.nll(batch).sum()) for batch in batches if samples_in(batch))
    return group.all_reduce_sum(total, device) / len(dataloader)


def samples_in(batch: Sequence[Tensor]) -> int:
    """How many samples a batch has."""
    return max(len(map_BCHW) for map_BCHW in batch)


def is_done(history: Sequence[dict[str, Any]], settings: FitSettings) -> bool:
    """Whether a fit with this history has ended, by its epochs or its patience.

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
    training: DataLoader,
    validation: DataLoader,
    settings: FitSettings,
    device: torch.device,
    report: Callable[[Epoch, Checkpoint], None],
    start: Checkpoint | None = None,
    group: ProcessGroup = SINGLE_PROCESS,
    synthetic: DataLoader | None = None,
) -> None:
    """Fits a flow by maximum likelihood.

    The random numbers of an epoch depend on the seed and the epoch alone, so a fit that resumes after a checkpoint
    ends with the weights of an undisturbed one.

    Args:
        flow: A new flow.
        training: The training samples.
        validation: The validation samples.
        settings: How to fit.
        device: Where the flow goes.
        report: Called after each epoch.
        start: The checkpoint to resume after.
        group: The workers that share each step.
        synthetic: The validation samples with synthetic defects, which weigh the members of a flow that is weighted.

    Raises:
        SprueError: If the likelihood stops being finite.
    """
    # Weights of dead units decay into denormal numbers, with which CPUs compute ten times as slowly.
    torch.set_flush_denormal(True)
    flow.to(device)
    flow.recompute = settings.recompute
    if start is None:
        flow.fit_adaptor(_Ordered([training], settings.batch_size, device))
        group.broadcast(flow)
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
        train_nll, rate = _train_epoch(flow, training, optimizer, settings, epoch, device, group)
        seconds = time.perf_counter() - started
        validation_nll = mean_nll(flow, validation, settings.batch_size, device, group)
        if not (math.isfinite(train_nll) and math.isfinite(validation_nll)):
            raise SprueError(
                f"the likelihood stopped being finite in epoch {epoch} (training {train_nll}, validation "
                f"{validation_nll}): lower fit.learning_rate; the last good checkpoint is kept"
            )
        result = Epoch(
            epoch,
            train_nll,
            validation_nll,
            rate,
            seconds,
            images_per_second=len(training) * flow.views / seconds,
            precision="bfloat16" if trains_in_bfloat16(settings, device) else "float32",
            time=time.time(),
        )
        history.append(asdict(result))
        _fit_scores(flow, training, validation, synthetic, settings.batch_size, device)
        report(result, Checkpoint.take(flow, optimizer, epoch, list(history)))


def _fit_scores(
    flow: Flow,
    training: DataLoader,
    validation: DataLoader,
    synthetic: DataLoader | None,
    size: int,
    device: torch.device,
) -> None:
    """Fits what scales the scores, and with synthetic defects how much each member counts; see `train`."""
    # Unseen images score higher than those that were fitted, but a few say nothing about their spread.
    unseen = [validation] if len(validation) >= LEAST_STANDARD else [training, validation]
    flow.standardise(_Ordered(unseen, size, device))
    if synthetic is not None:
        # The defects are on validation images, which even without defects score higher than training images.
        good, defective = (_Ordered([each], size, device) for each in (validation, synthetic))
        flow.weigh(good, defective)


def _train_epoch(
    flow: Flow,
    dataloader: DataLoader,
    optimizer: torch.optim.Optimizer,
    settings: FitSettings,
    epoch: int,
    device: torch.device,
    group: ProcessGroup,
) -> tuple[float, float]:
    """One pass: the mean likelihood of the samples as the steps saw them, and the last learning rate."""
    if not list(flow.parameters()):
        return mean_nll(flow, dataloader, settings.batch_size, device, group), 0.0
    flow.train()
    per_epoch = math.ceil(len(dataloader) / settings.batch_size)
    total, rate = 0.0, 0.0
    for index, batch in enumerate(dataloader.shuffled(settings.batch_size)):
        rate = rate_at((epoch - 1) * per_epoch + index, settings.epochs * per_epoch, settings)
        for parameters in optimizer.param_groups:
            parameters["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        size = samples_in(batch)
        flow.shard = group.noise_shard(size)
        shard = to_device(group.shard(batch), device)
        if samples_in(shard):
            with torch.autocast(device.type, torch.bfloat16, enabled=trains_in_bfloat16(settings, device)):
                nll = flow.nll(shard).sum()
            (nll / size).backward()  # type: ignore[no-untyped-call]
            total += float(nll.detach())
        group.sum_gradients(flow)
        torch.nn.utils.clip_grad_norm_(flow.parameters(), settings.gradient_norm)
        optimizer.step()
    return group.all_reduce_sum(total, device) / len(dataloader), rate
