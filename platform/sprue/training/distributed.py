"""Data parallelism: several workers share each step of one flow's fit.

Every worker sees the same batches and takes its shard of each. The sum of the gradients is that of one worker with
the full batch.

Shapes: B samples of a batch, C channels, H rows, W columns of a map.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor, nn

from defectflow.noise import Shard


@dataclass(frozen=True)
class ProcessGroup:
    """This worker among all; torch's default process group connects them if there are several.

    Attributes:
        rank: This worker's number, from 0.
        world_size: How many workers there are.
    """

    rank: int = 0
    world_size: int = 1

    def shard(self, batch: Sequence[Tensor]) -> list[Tensor]:
        """This worker's samples of a batch's maps [B, C, H, W]."""
        return [map_BCHW[self.rank :: self.world_size] for map_BCHW in batch]

    def noise_shard(self, batch_size: int) -> Shard | None:
        """This worker's shard of the noise of a batch; None if it works alone."""
        return Shard(self.rank, self.world_size, batch_size) if self.world_size > 1 else None

    def all_reduce_sum(self, value: float, device: torch.device) -> float:
        """The sum of all workers' values."""
        if self.world_size == 1:
            return value
        sums = torch.tensor(value, dtype=torch.float64, device=device)
        torch.distributed.all_reduce(sums)
        return float(sums)

    def broadcast(self, module: nn.Module) -> None:
        """Gives all workers the first one's parameters and buffers.

        What each computes from the same data may differ: eigenvectors have no sign, and machines round differently.
        """
        if self.world_size == 1:
            return
        for tensor in module.state_dict().values():
            sent = tensor.contiguous()
            torch.distributed.broadcast(sent, src=0)
            tensor.copy_(sent)

    def sum_gradients(self, module: nn.Module) -> None:
        """Replaces each parameter's gradient by the sum over all workers, in one message."""
        if self.world_size == 1:
            return
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        # A worker whose shard of the last batch is empty has no gradients.
        gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        torch.distributed.all_reduce(flat)
        for parameter, gradient in zip(
            parameters, torch.split(flat, [each.numel() for each in parameters]), strict=True
        ):
            parameter.grad = gradient.view_as(parameter)


SINGLE_PROCESS = ProcessGroup()
"""The group of a process that fits a flow alone."""
