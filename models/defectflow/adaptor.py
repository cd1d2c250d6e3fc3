"""The frozen linear map between the backbone's features and the couplings, for flows whose nodes are single maps.

Shapes: B pictures, C channels, H rows, W columns of a feature map, N feature vectors.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defectflow.whitening import fit_whitening

Adaptation = Literal["whiten", "standardise", "none"]
"""Whether a node's channels are decorrelated to unit variance, only brought to unit variance, or left as they are."""

POSITIONS = 256
"""Positions of a picture that an adaptor is fitted on; neighbours are nearly copies of each other."""


def check_adaptation(adaptation: str) -> None:
    """Raises: ValueError: If there is no such adaptation."""
    if adaptation not in get_args(Adaptation):
        raise ValueError(f"adaptation: {adaptation!r} is none of {', '.join(map(repr, get_args(Adaptation)))}")


class ChannelAdaptor(nn.Module):
    """Maps each node's channels by a matrix of its own, the same at every position.

    The papers feed raw backbone features, and spend their first epochs on learning the mean and the variance. The
    matrix is invertible and constant, so it changes the log-likelihood by a constant, which is left out.

    >>> adaptor = ChannelAdaptor(nodes=1, channels=3, adaptation="whiten")
    >>> maps = [5 + 4 * torch.randn(20, 3, 8, 8)]
    >>> adaptor.fit([maps])
    >>> (white_BCHW,) = adaptor(maps)
    >>> torch.allclose(torch.cov(white_BCHW.transpose(0, 1).flatten(1)), torch.eye(3), atol=0.01)
    True
    """

    def __init__(self, nodes: int, channels: int, adaptation: Adaptation) -> None:
        """Makes the identity."""
        super().__init__()
        self.adaptation = adaptation
        if adaptation != "none":
            self.register_buffer("weight", torch.eye(channels).repeat(nodes, 1, 1))
            self.register_buffer("bias", torch.zeros(nodes, channels))

    def fit(self, batches: Iterable[Sequence[Tensor]]) -> None:
        """Fits the matrices on batches of nodes, read once.

        Raises:
            ValueError: If there are too few positions for the channels, or features are not finite.
        """
        if self.adaptation == "none":
            return
        weight, bias = self.get_buffer("weight"), self.get_buffer("bias")
        channels = weight.shape[1]
        for node, vectors in enumerate(_vectors(batches, len(weight))):
            weight[node], bias[node] = fit_whitening(vectors, channels, decorrelate=self.adaptation == "whiten")

    def forward(self, nodes: Sequence[Tensor]) -> list[Tensor]:
        """Maps [B, C, H, W] to maps of the same shapes."""
        if self.adaptation == "none":
            return list(nodes)
        weight, bias = self.get_buffer("weight"), self.get_buffer("bias")
        return [
            F.conv2d(map_BCHW, weight_CC[:, :, None, None], bias_C)
            for map_BCHW, weight_CC, bias_C in zip(nodes, weight, bias, strict=True)
        ]


@torch.no_grad()
def _vectors(batches: Iterable[Sequence[Tensor]], nodes: int) -> Iterator[list[Tensor]]:
    """For each node, batches [N, C] of its feature vectors at positions on a fixed grid."""
    kept: list[list[Tensor]] = [[] for _ in range(nodes)]
    for batch in batches:
        for vectors, map_BCHW in zip(kept, batch, strict=True):
            map_BCP = map_BCHW.flatten(2)
            stride = max(1, map_BCP.shape[2] // POSITIONS)
            vectors.append(map_BCP[:, :, ::stride].transpose(1, 2).flatten(0, 1))
    yield from kept
