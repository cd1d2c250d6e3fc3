"""What a worker does of a step, where several fit one flow together.

Every worker sees the same batches and takes its samples of each; the gradients' sum is that of one worker with the
whole batch.

Shapes: B samples of a batch, C channels, H rows, W columns of a map.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor, nn

from defectflow.noise import Part


@dataclass(frozen=True)
class Share:
    """One of `count` workers; torch's default process group connects them if there are several.

    Attributes:
        rank: This worker's number, from 0.
        count: How many there are.
    """

    rank: int = 0
    count: int = 1

    def take(self, batch: Sequence[Tensor]) -> list[Tensor]:
        """This worker's samples of a batch's maps [B, C, H, W]."""
        return [map_BCHW[self.rank :: self.count] for map_BCHW in batch]

    def part(self, whole: int) -> Part | None:
        """What of a batch of `whole` samples is this worker's; None if it works alone."""
        return Part(self.rank, self.count, whole) if self.count > 1 else None

    def total(self, value: float, device: torch.device) -> float:
        """The sum of all workers' values."""
        if self.count == 1:
            return value
        sums = torch.tensor(value, dtype=torch.float64, device=device)
        torch.distributed.all_reduce(sums)
        return float(sums)

    def add_gradients(self, module: nn.Module) -> None:
        """Replaces each parameter's gradient by the sum of all workers', in one message."""
        if self.count == 1:
            return
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        # A worker whose share of the last batch is empty has no gradients.
        gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        torch.distributed.all_reduce(flat)
        for parameter, gradient in zip(
            parameters, torch.split(flat, [each.numel() for each in parameters]), strict=True
        ):
            parameter.grad = gradient.view_as(parameter)


ALONE = Share()
"""The share of a process that fits a flow by itself."""
