"""Subnetworks of the coupling block: from the nodes' halves to log-scales and shifts.

Every output is multiplied by a learnable ``gamma`` that starts at zero, so a new coupling is the identity.

Shapes: B images, C channels, H rows, W columns, P positions of a node's map; D output channels; K kernel side.
"""

from collections.abc import Sequence
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defectflow.pyramid import Grid


class BottleneckSubnet(nn.Module):
    """Three 1x1 convolutions through a bottleneck, the same for every node, without messages (PatchFlow)."""

    def __init__(self, c_in: int, c_out: int, bottleneck: int) -> None:
        """Builds the layers: `c_in` to `bottleneck` to `bottleneck` to `c_out` channels."""
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
        *hidden, last = [layer for layer in self.layers if isinstance(layer, nn.Conv2d)]
        # The last layer has fewer weights than outputs, so scaling the weights by gamma is cheaper.
        weight = last.weight * self.gamma[..., None]
        bias = cast(Tensor, last.bias) * self.gamma.flatten()

        def one(map_BCHW: Tensor) -> Tensor:
            flat_BCP = map_BCHW.flatten(2)
            for layer in hidden:
                flat_BCP = _pointwise(flat_BCP, layer.weight, cast(Tensor, layer.bias)).relu_()
            return _pointwise(flat_BCP, weight, bias).view(len(map_BCHW), len(weight), *map_BCHW.shape[2:])

        return [one(map_BCHW) for map_BCHW in maps]


def _pointwise(map_BCP: Tensor, weight_DC11: Tensor, bias_D: Tensor) -> Tensor:
    """A 1x1 convolution as matrix products; on CPUs its backward is up to twice as fast as torch's convolution."""
    weight_BDC = weight_DC11.flatten(1).expand(len(map_BCP), -1, -1)
    return torch.baddbmm(bias_D[:, None], weight_BDC, map_BCP)


class CrossScaleSubnet(nn.Module):
    """Two convolutions per scale, and messages from the hidden maps to the next smaller and larger scale (CS-Flow).

    A message to the next larger scale is a convolution of the upsampled hidden map. It and the scale's own second
    convolution are computed as one convolution of both hidden maps, stacked.

    Source: Rudolph et al. (2022), figure 4; leaky ReLU of slope 0.1 from the authors' code.
    """

    def __init__(self, c_in: int, c_out: int, nodes: int, hidden: int, kernel: int) -> None:
        """Builds the convolutions of `nodes` scales, the largest first, with square kernels of side `kernel`."""
        super().__init__()
        self.lift = nn.ModuleList(nn.Conv2d(c_in, hidden, kernel, padding=kernel // 2) for _ in range(nodes))
        self.gather = nn.ModuleList(
            _stacked(hidden, 1 + (node < nodes - 1), c_out, kernel, padding_mode="zeros") for node in range(nodes)
        )
        self.down = nn.ModuleList(
            nn.Conv2d(hidden, c_out, kernel, stride=2, padding=kernel // 2) for _ in range(nodes - 1)
        )
        self.gamma = nn.Parameter(torch.zeros(nodes))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps [B, c_in, H, W], each half the size of the one before, to [B, c_out, H, W]."""
        hidden = [F.leaky_relu(lift(map_BCHW), 0.1) for lift, map_BCHW in zip(self.lift, maps, strict=True)]
        outputs = []
        for node, gather in enumerate(self.gather):
            stacked = [hidden[node]]
            if node + 1 < len(hidden):
                stacked.append(Grid((hidden[node].shape[2], hidden[node].shape[3])).sample(hidden[node + 1]))
            out = gather(torch.cat(stacked, dim=1))
            if node > 0:
                out = out + self.down[node - 1](hidden[node - 1])
            outputs.append(out * self.gamma[node])
        return outputs


class CrossViewSubnet(nn.Module):
    """Two convolutions per view, and the mean of messages from the neighbours' hidden maps (Multi-Flow).

    A view's second convolution and its messages are computed as one convolution of the stacked hidden maps of the view
    and of its neighbours, the latter divided by their number.

    Source: Kruse and Rosenhahn, "Multi-Flow" (2025); ReLU and replication at the border from the authors' code.
    """

    def __init__(self, c_in: int, c_out: int, neighbours: Sequence[Sequence[int]], hidden: int, kernel: int) -> None:
        """Builds the convolutions with square kernels of side `kernel`; `neighbours` lists each view's senders."""
        super().__init__()
        self.neighbours = [tuple(sources) for sources in neighbours]
        self.lift = nn.ModuleList(
            nn.Conv2d(c_in, hidden, kernel, padding=kernel // 2, padding_mode="replicate") for _ in neighbours
        )
        self.gather = nn.ModuleList(
            _stacked(hidden, 1 + len(sources), c_out, kernel, padding_mode="replicate") for sources in neighbours
        )
        self.gamma = nn.Parameter(torch.zeros(len(neighbours)))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps [B, c_in, H, W] of equal sizes to [B, c_out, H, W]."""
        hidden = [F.relu(lift(map_BCHW)) for lift, map_BCHW in zip(self.lift, maps, strict=True)]
        outputs = []
        for node, (gather, sources) in enumerate(zip(self.gather, self.neighbours, strict=True)):
            stacked = [hidden[node], *(hidden[source] / len(sources) for source in sources)]
            outputs.append(gather(torch.cat(stacked, dim=1)) * self.gamma[node])
        return outputs


class DynamicSpatialAttention(nn.Module):
    """Spatial attention with input-dependent kernels (the attention of DNFAD's DSAM).

    A depthwise convolution filters the mean and the maximum over the channels. Its kernel is a mixture of `groups`
    kernels with weights that depend on the image. A second convolution combines both channels into one. This channel
    times its own sigmoid is added to every channel of the map.

    Sources: DNFAD, figure of the DSAM; the input-dependent convolution is of Lou et al., "TransXNet" (2023).
    """

    KERNEL = 3

    def __init__(self, groups: int = 8) -> None:
        """Initialises `groups` kernels."""
        super().__init__()
        self.groups = groups
        self.kernels = nn.Parameter(torch.empty(groups, 2, self.KERNEL, self.KERNEL))
        self.biases = nn.Parameter(torch.zeros(groups, 2))
        nn.init.trunc_normal_(self.kernels, std=0.02)
        self.mixture = nn.Sequential(nn.Conv2d(2, 1, 1), nn.Conv2d(1, 2 * groups, 1))
        self.combine = nn.Conv2d(2, 1, self.KERNEL, padding=1, bias=False)

    def forward(self, map_BCHW: Tensor) -> Tensor:
        """Adds the attention to a map [B, C, H, W]."""
        if not len(map_BCHW):
            return map_BCHW  # torch has no convolution with zero groups
        pooled = torch.cat([map_BCHW.mean(1, keepdim=True), map_BCHW.amax(1, keepdim=True)], dim=1)
        images, channels, rows, columns = pooled.shape
        kernels = self._mix(F.adaptive_avg_pool2d(pooled, self.KERNEL), self.kernels)
        biases = self._mix(pooled.mean((2, 3), keepdim=True), self.biases[:, :, None, None])
        filtered = F.conv2d(
            pooled.reshape(1, images * channels, rows, columns),
            kernels.reshape(images * channels, 1, self.KERNEL, self.KERNEL),
            biases.flatten(),
            padding=1,
            groups=images * channels,
        )
        attention = self.combine(filtered.reshape(images, channels, rows, columns))
        return map_BCHW + attention * attention.sigmoid()

    def _mix(self, pooled: Tensor, components: Tensor) -> Tensor:
        """Each image's mixture [B, 2, K, K] of `components` [groups, 2, K, K], with weights computed from `pooled`."""
        weights = self.mixture(pooled).reshape(len(pooled), self.groups, 2, *pooled.shape[2:]).softmax(1)
        return (weights * components).sum(1)


class AttentionSubnet(nn.Module):
    """Dynamic spatial attention and two 3x3 convolutions, the same for every node (DNFAD's DSAM subnetwork)."""

    def __init__(self, c_in: int, c_out: int, hidden: int, rectified: bool = True) -> None:
        """Builds the layers: `c_in` to `hidden` to `c_out` channels; ends in a ReLU if `rectified`."""
        super().__init__()
        self.rectified = rectified
        self.attention = DynamicSpatialAttention()
        self.first = nn.Conv2d(c_in, hidden, 3, padding=1, padding_mode="replicate")
        self.norm = nn.LayerNorm(hidden)
        self.second = nn.Conv2d(hidden, c_out, 3, padding=1, padding_mode="replicate")
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps [B, c_in, H, W] to [B, c_out, H, W], node by node."""
        return [self._one(map_BCHW) * self.gamma for map_BCHW in maps]

    def _one(self, map_BCHW: Tensor) -> Tensor:
        hidden = self.first(self.attention(map_BCHW))
        hidden = self.norm(hidden.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        out = self.second(F.relu(hidden))
        return F.relu(out) if self.rectified else out


def _stacked(
    hidden: int, sources: int, c_out: int, kernel: int, padding_mode: Literal["zeros", "replicate"]
) -> nn.Conv2d:
    """A convolution of stacked hidden maps, initialised as one convolution per hidden map."""
    stacked = nn.Conv2d(hidden * sources, c_out, kernel, padding=kernel // 2, padding_mode=padding_mode)
    with torch.no_grad():
        # The default range is proportional to one over the root of all input channels; this restores that of one map.
        stacked.weight.mul_(sources**0.5)
    return stacked
