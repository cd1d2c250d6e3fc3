"""The affine coupling block that every flow here is built of.

Shapes: B pictures, C channels, H rows, W columns of a feature map; a *node* is one feature map (the fused
pyramid, a scale or a view) of the graph that the block works on.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch
from FrEIA.modules import InvertibleModule
from torch import Tensor, nn

Subnet = Callable[[int, int], nn.Module]
"""Builds a subnetwork from its input and output channels; it maps a list of maps (one a node) to another."""


def soft_clamp(s: Tensor, clamp: float) -> Tensor:
    """Bounds a log-scale to (-clamp, clamp): ``2 clamp / pi * atan(s / clamp)``; FrEIA rounds 2 / pi to 0.636."""
    return (2.0 * clamp / math.pi) * torch.atan(s / clamp)


class GraphCoupling(InvertibleModule):
    """A RealNVP coupling of a graph's feature maps, with a log-determinant for every position.

    The channels of each node are permuted and split into two halves (a, b). One subnetwork reads the b halves
    of all nodes and transforms the a halves, another reads the transformed a halves and transforms the b
    halves: ``a' = a * exp(clamp(s)) + t``. Messages between nodes, if any, are the subnetwork's own matter.

    Source: Dinh, Sohl-Dickstein, Bengio, "Density estimation using Real NVP" (2017), equations 7 and 8.

    >>> from functools import partial
    >>> from defectflow.subnets import BottleneckSubnet
    >>> block = GraphCoupling([(6, 4, 4)], partial(BottleneckSubnet, bottleneck=8), clamp=1.9)
    >>> x = torch.randn(2, 6, 4, 4)
    >>> (z,), log_det_B = block([x])
    >>> (y,), _ = block([z], rev=True)
    >>> bool(torch.allclose(x, y, atol=1e-6)), log_det_B.shape
    (True, torch.Size([2]))
    """

    def __init__(
        self,
        dims_in: Sequence[tuple[int, int, int]],
        subnet: Subnet,
        clamp: float,
        dims_c: Sequence[tuple[int, ...]] = (),
    ) -> None:
        """Draws the permutations from torch's global generator.

        Args:
            dims_in: Channels, rows and columns of each node; all nodes have the same number of channels. Rows
                and columns are not held to, since the block works on maps of any size.
            subnet: Builds the two subnetworks.
            clamp: Bound of the log-scale.
            dims_c: Dimensions of the nodes' conditions, of which only the first's channels are read; a condition is
                concatenated after the half that a subnetwork reads.

        Raises:
            ValueError: If nodes differ in their channels or have fewer than two.
        """
        super().__init__(dims_in, dims_c)
        channels = {dims[0] for dims in dims_in}
        if len(channels) != 1 or min(channels) < 2:
            raise ValueError(
                f"the nodes of a coupling share one number of channels, at least 2; got {sorted(channels)}"
            )
        (self.channels,) = channels
        self.first = self.channels // 2
        second = self.channels - self.first
        extra = dims_c[0][0] if dims_c else 0
        self.clamp = clamp
        self.s2 = subnet(second + extra, 2 * self.first)
        self.s1 = subnet(self.first + extra, 2 * second)
        self.permutations: list[Tensor]
        for node in range(len(self.dims_in)):
            self.register_buffer(f"perm{node}", torch.randperm(self.channels))

    def _affine(
        self, subnet: nn.Module, read: list[Tensor], condition: Sequence[Tensor] | None, count: int
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The clamped log-scales and the shifts that a subnetwork makes of the halves it reads."""
        inputs = read
        if condition is not None:
            inputs = [torch.cat(pair, dim=1) for pair in zip(read, condition, strict=True)]
        log_scales, shifts = [], []
        for out, half in zip(subnet(inputs), read, strict=True):
            # Under autocast the subnetwork's matrix products are short floats; sums of log-scales must not be.
            out = out.to(half.dtype)
            log_scales.append(soft_clamp(out[:, :count], self.clamp))
            shifts.append(out[:, count:])
        return log_scales, shifts

    def couple(
        self, maps: Sequence[Tensor], condition: Sequence[Tensor] | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Forward pass.

        Args:
            maps: A map [B, C, H, W] for each node.
            condition: A map [B, K, H, W] for each node, or None.

        Returns:
            The transformed maps, and for each the log-determinant of every position, [B, H, W].
        """
        permuted = [map_BCHW[:, getattr(self, f"perm{node}")] for node, map_BCHW in enumerate(maps)]
        a = [x[:, : self.first] for x in permuted]
        b = [x[:, self.first :] for x in permuted]
        s_a, t_a = self._affine(self.s2, b, condition, self.first)
        a = [x * s.exp() + t for x, s, t in zip(a, s_a, t_a, strict=True)]
        s_b, t_b = self._affine(self.s1, a, condition, self.channels - self.first)
        b = [x * s.exp() + t for x, s, t in zip(b, s_b, t_b, strict=True)]
        outputs = [torch.cat(halves, dim=1) for halves in zip(a, b, strict=True)]
        return outputs, [sa.sum(1) + sb.sum(1) for sa, sb in zip(s_a, s_b, strict=True)]

    def uncouple(
        self, latents: Sequence[Tensor], condition: Sequence[Tensor] | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Inverse of `couple`; the log-determinants are those of the inverse."""
        a = [z[:, : self.first] for z in latents]
        b = [z[:, self.first :] for z in latents]
        s_b, t_b = self._affine(self.s1, a, condition, self.channels - self.first)
        b = [(x - t) * (-s).exp() for x, s, t in zip(b, s_b, t_b, strict=True)]
        s_a, t_a = self._affine(self.s2, b, condition, self.first)
        a = [(x - t) * (-s).exp() for x, s, t in zip(a, s_a, t_a, strict=True)]
        outputs = [
            torch.cat(halves, dim=1)[:, getattr(self, f"perm{node}").argsort()]
            for node, halves in enumerate(zip(a, b, strict=True))
        ]
        return outputs, [-(sa.sum(1) + sb.sum(1)) for sa, sb in zip(s_a, s_b, strict=True)]

    def forward(
        self, x_or_z: Iterable[Tensor], c: Iterable[Tensor] | None = None, rev: bool = False, jac: bool = True
    ) -> tuple[list[Tensor], Tensor]:
        """FrEIA's interface: the maps and the log-determinant of each picture, [B], over all nodes.

        There is a condition for each node, or one for all.
        """
        condition = list(c or ()) or None
        if condition is not None and len(condition) == 1:
            condition *= len(self.dims_in)
        outputs, log_dets = (self.uncouple if rev else self.couple)(list(x_or_z), condition)
        return outputs, torch.stack([log_det.sum((1, 2)) for log_det in log_dets]).sum(0)

    def output_dims(self, input_dims: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """A coupling keeps the shape of its maps."""
        return input_dims


def couple_all(
    blocks: Iterable[nn.Module], nodes: Sequence[Tensor], condition: Sequence[Tensor] | None
) -> tuple[list[Tensor], list[Tensor]]:
    """A chain of couplings: the latents [B, C, H, W] and the sums of the log-determinants [B, H, W], node by node."""
    latents = list(nodes)
    log_dets = [node.new_zeros(len(node), *node.shape[2:]) for node in nodes]
    for block in blocks:
        latents, more = cast(GraphCoupling, block).couple(latents, condition)
        log_dets = [log_det + added for log_det, added in zip(log_dets, more, strict=True)]
    return latents, log_dets


def uncouple_all(
    blocks: Iterable[nn.Module], latents: Sequence[Tensor], condition: Sequence[Tensor] | None
) -> list[Tensor]:
    """The inverse of `couple_all`."""
    nodes = list(latents)
    for block in reversed(list(blocks)):
        nodes, _ = cast(GraphCoupling, block).uncouple(nodes, condition)
    return nodes
