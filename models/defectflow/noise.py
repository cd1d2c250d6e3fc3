"""Noise on the features in training, and the condition that reports its level to the couplings.

Noise keeps a flow from overfitting single images. A flow that is conditioned on the level can be evaluated at level 0.

Shapes: B images, C channels, H rows, W columns of a feature map.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from defectflow.config import NoiseScheme

CONDITION_SCALE = 20.0
"""The condition is this times the standard deviation. (Multi-Flow's code: this times the noise itself.)"""


@dataclass(frozen=True)
class Shard:
    """The samples of a global batch that one process has: every ``world_size``-th from ``rank`` on.

    Each process draws the noise of the global batch, of `batch_size` samples, and takes its own rows. So the noise does
    not depend on the world size.
    """

    rank: int
    world_size: int
    batch_size: int

    def select(self, batch: Tensor) -> Tensor:
        """This process's rows of a tensor for the global batch."""
        return batch[self.rank :: self.world_size]


def add_noise(
    nodes: Sequence[Tensor], scheme: NoiseScheme, deviation: float, shard: Shard | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Adds Gaussian noise to the maps of a graph.

    The standard deviation is `deviation` everywhere (``simplenet``); uniform in [0, `deviation`] per image, the same
    for all nodes (``softflow``); or uniform in [0, `deviation`] per position and node (``uniform``).

    Sources: Liu et al., "SimpleNet" (2023); Kim et al., "SoftFlow" (2020), section 3.2. Multi-Flow's code has schemes
    of the same names, but one noise map [B, 1, H, W] for all channels and views.

    Returns the noisy maps [B, C, H, W], and the condition [B, 1, H, W] of each. The shard says which samples of a
    global batch the maps are of; without it they are the global batch.

    >>> import torch
    >>> noisy, conditions = add_noise([torch.zeros(2, 3, 4, 4)], "softflow", 0.2)
    >>> conditions[0].shape, bool((conditions[0] <= CONDITION_SCALE * 0.2).all())
    (torch.Size([2, 1, 4, 4]), True)
    """
    shard = shard or Shard(0, 1, len(nodes[0]))

    def uniform(like: Tensor, *shape: int) -> Tensor:
        """Uniform in [0, deviation]."""
        return shard.select(like.new_empty(shard.batch_size, *shape).uniform_(0, deviation))

    shared_B111 = uniform(nodes[0], 1, 1, 1)
    noisy, conditions = [], []
    for map_BCHW in nodes:
        size = map_BCHW.shape[2:]
        match scheme:
            case "simplenet":
                deviation_B1HW = map_BCHW.new_full((len(map_BCHW), 1, *size), deviation)
            case "softflow":
                deviation_B1HW = shared_B111.expand(-1, 1, *size)
            case "uniform":
                deviation_B1HW = uniform(map_BCHW, 1, *size)
        normal_BCHW = shard.select(map_BCHW.new_empty(shard.batch_size, *map_BCHW.shape[1:]).normal_())
        noisy.append(map_BCHW + deviation_B1HW * normal_BCHW)
        conditions.append(CONDITION_SCALE * deviation_B1HW)
    return noisy, conditions


def no_noise(nodes: Sequence[Tensor]) -> list[Tensor]:
    """The condition of maps without noise: zeros [B, 1, H, W] for each."""
    return [map_BCHW.new_zeros(len(map_BCHW), 1, *map_BCHW.shape[2:]) for map_BCHW in nodes]
