"""The frozen linear map between the backbone's features and the couplings, for flows whose nodes are single maps.

Shapes: B images, C channels, H rows, W columns of a feature map, N feature vectors.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defectflow.config import Adaptation
from defectflow.whitening import Moments, sample_vectors, whitening


class ChannelAdaptor(nn.Module):
    """Multiplies each node's channels by a matrix of the node, the same at every position.

    The papers use raw backbone features, so their first epochs learn the mean and the variance. The matrix is
    invertible and constant. It changes the log-likelihood by a constant, which the flows omit.

    >>> adaptor = ChannelAdaptor(nodes=1, channels=3, adaptation="whiten")
    >>> maps = [5 + 4 * torch.randn(20, 3, 8, 8)]
    >>> adaptor.fit([maps])
    >>> (white_BCHW,) = adaptor(maps)
    >>> torch.allclose(torch.cov(white_BCHW.transpose(0, 1).flatten(1)), torch.eye(3), atol=0.01)
    True
    """

    def __init__(self, nodes: int, channels: int, adaptation: Adaptation) -> None:
        """Starts as the identity."""
        super().__init__()
        self.adaptation = adaptation
        if adaptation != "none":
            self.register_buffer("weight", torch.eye(channels).repeat(nodes, 1, 1))
            self.register_buffer("bias", torch.zeros(nodes, channels))

    def fit(self, batches: Iterable[Sequence[Tensor]]) -> None:
        """Fits the matrices in one pass over batches of nodes.

        Raises:
            ValueError: If there are fewer than two positions, or a feature is not finite.
        """
        if self.adaptation == "none":
            return
        weight, bias = self.get_buffer("weight"), self.get_buffer("bias")
        moments = [Moments() for _ in weight]
        for batch in batches:
            for of_node, map_BCHW in zip(moments, batch, strict=True):
                of_node.add(sample_vectors(map_BCHW))
        for node, of_node in enumerate(moments):
            weight[node], bias[node] = whitening(of_node, weight.shape[1], decorrelate=self.adaptation == "whiten")

    def forward(self, nodes: Sequence[Tensor]) -> list[Tensor]:
        """Adapts the nodes' maps [B, C, H, W]; shapes stay."""
        if self.adaptation == "none":
            return list(nodes)
        weight, bias = self.get_buffer("weight"), self.get_buffer("bias")
        return [
            F.conv2d(map_BCHW, weight_CC[:, :, None, None], bias_C)
            for map_BCHW, weight_CC, bias_C in zip(nodes, weight, bias, strict=True)
        ]
