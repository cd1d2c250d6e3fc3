"""The affine coupling block that every flow here is built of.

Shapes: B pictures, C channels, H rows, W columns of a feature map; a *node* is one feature map (the fused
pyramid, a scale or a view) of the graph that the block works on.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from FrEIA.modules import InvertibleModule
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Subnet = Callable[[int, int], nn.Module]
"""Builds a subnetwork from its input and output channels; it maps a list of maps (one a node) to another."""


def soft_clamp(s: Tensor, clamp: float) -> Tensor:
    """Bounds a log-scale to (-clamp, clamp): ``2 clamp / pi * atan(s / clamp)``; FrEIA rounds 2 / pi to 0.636."""
    return (2.0 * clamp / math.pi) * torch.atan(s / clamp)


class _Affine(torch.autograd.Function):
    """``x exp(s) + t`` and the sum of ``s`` over the channels, where ``s`` is the soft-clamped log-scale.

    On large maps a coupling's time goes into passes over memory. Torch's own backward of these operations makes
    twice as many, half of them to fill and add the gradients of slices.
    """

    @staticmethod
    def forward(ctx: Any, x_BCHW: Tensor, raw_BCHW: Tensor, clamp: float) -> tuple[Tensor, Tensor]:
        """`raw_BCHW` holds the log-scales before clamping, then the shifts, each as many as `x_BCHW` has channels."""
        raw_s, t = torch.split(raw_BCHW, x_BCHW.shape[1], dim=1)
        s = (raw_s / clamp).atan_().mul_(2.0 * clamp / math.pi)
        log_det_BHW = s.sum(1)
        scale = s.exp_()
        ctx.clamp = clamp
        ctx.save_for_backward(x_BCHW, raw_BCHW, scale)
        return torch.addcmul(t, x_BCHW, scale), log_det_BHW

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_y: Tensor, of_log_det: Tensor) -> tuple[Tensor, Tensor, None]:
        """Gradients of `x_BCHW` and `raw_BCHW`."""
        x, raw, scale = ctx.saved_tensors
        of_raw = torch.empty_like(raw)
        of_s, of_t = torch.split(of_raw, x.shape[1], dim=1)
        of_t.copy_(of_y)
        of_x = of_y * scale
        raw_s = raw[:, : x.shape[1]]
        # The derivative of the clamp is one over this.
        slope = torch.addcmul(raw.new_full((), math.pi / 2), raw_s, raw_s, value=math.pi / 2 / ctx.clamp**2)
        torch.addcmul(of_log_det[:, None], of_x, x, out=of_s).div_(slope)
        return of_x, of_raw, None


class _Halves(torch.autograd.Function):
    """A map's channels in a permutation's order, as two maps; their gradients are put back, not added up as torch's."""

    @staticmethod
    def forward(ctx: Any, map_BCHW: Tensor, permutation: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """The first channels of the permutation, and the others."""
        ctx.parts = permutation[:first], permutation[first:]
        return map_BCHW.index_select(1, ctx.parts[0]), map_BCHW.index_select(1, ctx.parts[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_a: Tensor, of_b: Tensor) -> tuple[Tensor, None, None]:
        """The halves' gradients in the map's order."""
        gradient = of_a.new_empty((len(of_a), of_a.shape[1] + of_b.shape[1], *of_a.shape[2:]))
        for part, half in zip(ctx.parts, (of_a, of_b), strict=True):
            gradient.index_copy_(1, part, half)
        return gradient, None, None


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
        first = self.channels // 2
        second = self.channels - first
        self.halves = [first, second]
        extra = dims_c[0][0] if dims_c else 0
        self.clamp = clamp
        self.s2 = subnet(second + extra, 2 * first)
        self.s1 = subnet(first + extra, 2 * second)
        for node in range(len(self.dims_in)):
            self.register_buffer(f"perm{node}", torch.randperm(self.channels))

    def _raw_affine(self, subnet: nn.Module, read: list[Tensor], condition: Sequence[Tensor] | None) -> list[Tensor]:
        """A subnetwork's map for each node: log-scales before they are clamped, then shifts."""
        inputs = read
        if condition is not None:
            inputs = [torch.cat(pair, dim=1) for pair in zip(read, condition, strict=True)]
        # Under autocast the subnetwork's matrix products are short floats; sums of log-scales must not be.
        return [out.to(half.dtype) for out, half in zip(subnet(inputs), read, strict=True)]

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
        permuted = [
            _Halves.apply(map_BCHW, self.get_buffer(f"perm{node}"), self.halves[0])
            for node, map_BCHW in enumerate(maps)
        ]
        a, b = ([halves[side] for halves in permuted] for side in (0, 1))
        a, log_dets_a = self._transform(a, self._raw_affine(self.s2, b, condition))
        b, log_dets_b = self._transform(b, self._raw_affine(self.s1, a, condition))
        outputs = [torch.cat(halves, dim=1) for halves in zip(a, b, strict=True)]
        return outputs, [of_a + of_b for of_a, of_b in zip(log_dets_a, log_dets_b, strict=True)]

    def _transform(self, halves: list[Tensor], parameters: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The halves, scaled and shifted, and the log-determinants."""
        results = [_Affine.apply(half, raw, self.clamp) for half, raw in zip(halves, parameters, strict=True)]
        return [y for y, _ in results], [log_det for _, log_det in results]

    def _restore(self, halves: list[Tensor], parameters: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Inverse of `_transform`; the log-determinants are those of the inverse."""
        restored, log_dets = [], []
        for half, raw in zip(halves, parameters, strict=True):
            raw_s, t = torch.split(raw, half.shape[1], dim=1)
            s = soft_clamp(raw_s, self.clamp)
            restored.append((half - t) * (-s).exp())
            log_dets.append(-s.sum(1))
        return restored, log_dets

    def uncouple(
        self, latents: Sequence[Tensor], condition: Sequence[Tensor] | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Inverse of `couple`; the log-determinants are those of the inverse."""
        split = [torch.split(z, self.halves, dim=1) for z in latents]
        a, b = ([halves[side] for halves in split] for side in (0, 1))
        b, log_dets_b = self._restore(b, self._raw_affine(self.s1, a, condition))
        a, log_dets_a = self._restore(a, self._raw_affine(self.s2, b, condition))
        outputs = [
            torch.cat(halves, dim=1).index_select(1, self.get_buffer(f"perm{node}").argsort())
            for node, halves in enumerate(zip(a, b, strict=True))
        ]
        return outputs, [of_a + of_b for of_a, of_b in zip(log_dets_a, log_dets_b, strict=True)]

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
