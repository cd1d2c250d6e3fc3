"""Subnetworks of the coupling block: from the halves that are read to log-scales and shifts."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class BottleneckSubnet(nn.Module):
    """Three 1x1 convolutions through a bottleneck, the same for every node, without messages (PatchFlow).

    The output is multiplied by a learnable ``gamma`` per channel that starts at zero, so that a new coupling
    is the identity.
    """

    def __init__(self, c_in: int, bottleneck: int, c_out: int) -> None:
        """Makes the layers: `c_in` to `bottleneck` to `bottleneck` to `c_out` channels."""
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(c_in, bottleneck, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(bottleneck, bottleneck, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(bottleneck, c_out, 1),
        )
        self.gamma = nn.Parameter(torch.zeros(c_out, 1, 1))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps [B, c_in, H, W] to [B, c_out, H, W], node by node."""
        return [self.layers(map_BCHW) * self.gamma for map_BCHW in maps]
