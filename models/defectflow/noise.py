"""Noise on the features in training, and what the couplings are told of it.

Noise keeps a flow from fitting single pictures; a flow that is told how much there is can be asked for none.

Shapes: B pictures, C channels, H rows, W columns of a feature map.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

NoiseScheme = Literal["simplenet", "softflow", "uniform"]
"""How the noise's deviation is drawn: one for all and untold; one for each picture; one for each position."""

CONDITION_SCALE = 20.0
"""The condition is this times the deviation. (In Multi-Flow's code it is this times the noise itself.)"""


@dataclass(frozen=True)
class Part:
    """Which samples of a step's batch a process has, where several share it: every ``step``-th from ``first`` on.

    Each process draws the whole batch's noise and takes its part, so that all together add the noise that one would.

    Attributes:
        first: The first sample.
        step: How many processes there are.
        whole: Samples of the whole batch.
    """

    first: int
    step: int
    whole: int

    def of(self, whole: Tensor) -> Tensor:
        """This process's rows of a tensor for the whole batch."""
        return whole[self.first :: self.step]


def condition_channels(scheme: NoiseScheme, deviation: float) -> int:
    """Channels of the condition that a scheme tells the couplings: none without noise."""
    return 1 if deviation > 0 and scheme != "simplenet" else 0


def add_noise(
    nodes: Sequence[Tensor], scheme: NoiseScheme, deviation: float, part: Part | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Adds Gaussian noise to a graph's maps.

    With ``simplenet`` every position has the whole deviation; with ``softflow`` a picture's is uniform between 0
    and it, the same for all nodes; with ``uniform`` every position of every node has its own.

    Sources: Liu et al., "SimpleNet" (2023); Kim et al., "SoftFlow" (2020), section 3.2. Multi-Flow's code has schemes
    of the same names, but one noise map [B, 1, H, W] for all channels and views.

    Args:
        nodes: Maps [B, C, H, W].
        scheme: How deviations are drawn.
        deviation: The largest standard deviation.
        part: Which part of a batch the maps are; all of it if None.

    Returns:
        The noisy maps, and the condition [B, 1, H, W] of each.

    >>> import torch
    >>> noisy, conditions = add_noise([torch.zeros(2, 3, 4, 4)], "softflow", 0.2)
    >>> conditions[0].shape, bool((conditions[0] <= CONDITION_SCALE * 0.2).all())
    (torch.Size([2, 1, 4, 4]), True)
    """
    part = part or Part(0, 1, len(nodes[0]))

    def drawn(node: Tensor, *shape: int) -> Tensor:
        """Uniform between 0 and the deviation."""
        return part.of(node.new_empty(part.whole, *shape).uniform_(0, deviation))

    shared_B111 = drawn(nodes[0], 1, 1, 1)
    noisy, conditions = [], []
    for map_BCHW in nodes:
        size = map_BCHW.shape[2:]
        match scheme:
            case "simplenet":
                deviation_B1HW = map_BCHW.new_full((len(map_BCHW), 1, *size), deviation)
            case "softflow":
                deviation_B1HW = shared_B111.expand(-1, 1, *size)
            case "uniform":
                deviation_B1HW = drawn(map_BCHW, 1, *size)
        normal_BCHW = part.of(map_BCHW.new_empty(part.whole, *map_BCHW.shape[1:]).normal_())
        noisy.append(map_BCHW + deviation_B1HW * normal_BCHW)
        conditions.append(CONDITION_SCALE * deviation_B1HW)
    return noisy, conditions


def no_noise(nodes: Sequence[Tensor]) -> list[Tensor]:
    """The condition of maps without noise: zeros [B, 1, H, W] for each."""
    return [map_BCHW.new_zeros(len(map_BCHW), 1, *map_BCHW.shape[2:]) for map_BCHW in nodes]
