"""The affine coupling block that all flows consist of.

Shapes: B images, C channels, H rows, W columns, K channels of a condition. A *node* is one feature map (the fused
pyramid, a scale or a view) of the graph that the block transforms.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from defectflow.freia import InvertibleModule

Subnet = Callable[[int, int], nn.Module]
"""Builds a subnetwork from its input and output channels. A subnetwork transforms a list of maps, one per node."""


def soft_clamp(s: Tensor, clamp: float) -> Tensor:
    """Bounds a log-scale to (-clamp, clamp): ``2 clamp / pi * atan(s / clamp)``. FrEIA rounds 2 / pi to 0.636."""
    return (2.0 * clamp / math.pi) * torch.atan(s / clamp)


class _Affine(torch.autograd.Function):
    """``x exp(s) + t`` and the sum of ``s`` over the channels, where ``s`` is the soft-clamped log-scale.

    On large maps, passes over memory take most of a coupling's time. Autograd's backward of these operations makes
    twice as many, half of them to fill and add the gradients of slices.
    """

    @staticmethod
    def forward(ctx: Any, x_BCHW: Tensor, raw_BCHW: Tensor, clamp: float) -> tuple[Tensor, Tensor]:
        """`raw_BCHW` holds the unclamped log-scales, then the shifts; each half has the channels of `x_BCHW`."""
        raw_s, t = torch.split(raw_BCHW, x_BCHW.shape[1], dim=1)
        s = (raw_s / clamp).atan_().mul_(2.0 * clamp / math.pi)
        log_det_BHW = s.sum(1)
        scale = s.exp_()
        ctx.clamp = clamp
        ctx.save_for_backward(x_BCHW, raw_BCHW, scale)
        return torch.addcmul(t, x_BCHW, scale), log_det_BHW

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_log_det: Tensor) -> tuple[Tensor, Tensor, None]:
        """Gradients of `x_BCHW` and `raw_BCHW`."""
        x, raw, scale = ctx.saved_tensors
        grad_raw = torch.empty_like(raw)
        grad_s, grad_t = torch.split(grad_raw, x.shape[1], dim=1)
        grad_t.copy_(grad_y)
        grad_x = grad_y * scale
        raw_s = raw[:, : x.shape[1]]
        # The reciprocal of the clamp's derivative.
        inverse_slope = torch.addcmul(raw.new_full((), math.pi / 2), raw_s, raw_s, value=math.pi / 2 / ctx.clamp**2)
        torch.addcmul(grad_log_det[:, None], grad_x, x, out=grad_s).div_(inverse_slope)
        return grad_x, grad_raw, None


class _Halves(torch.autograd.Function):
    """Permutes a map's channels and splits them in two. Backward writes the gradients; autograd's would add them."""

    @staticmethod
    def forward(ctx: Any, map_BCHW: Tensor, permutation: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """The map's first channels in the permuted order, and the others."""
        ctx.parts = permutation[:first], permutation[first:]
        return map_BCHW.index_select(1, ctx.parts[0]), map_BCHW.index_select(1, ctx.parts[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_a: Tensor, grad_b: Tensor) -> tuple[Tensor, None, None]:
        """Gradient of the map."""
        gradient = grad_a.new_empty((len(grad_a), grad_a.shape[1] + grad_b.shape[1], *grad_a.shape[2:]))
        for part, half in zip(ctx.parts, (grad_a, grad_b), strict=True):
            gradient.index_copy_(1, part, half)
        return gradient, None, None


class GraphCoupling(InvertibleModule):
    """A RealNVP coupling of a graph's feature maps, with a log-determinant for every position.

    The channels of each node are permuted and split into two halves (a, b). One subnetwork reads the b halves
    of all nodes and transforms the a halves. Another reads the transformed a halves and transforms the b
    halves: ``a' = a * exp(clamp(s)) + t``. Messages between nodes, if any, are inside the subnetwork.

    The block is a FrEIA module. `forward` follows FrEIA's interface and sums the log-determinant over positions;
    `couple` and `uncouple` keep it per position.

    Source: Dinh, Sohl-Dickstein, Bengio, "Density estimation using Real NVP" (2017), equations 7 and 8.

    In FrEIA's `SequenceINN`, a block transforms one node:

    >>> from functools import partial
    >>> import FrEIA.framework as ff, FrEIA.modules as fm
    >>> from defectflow.subnets import BottleneckSubnet, CrossViewSubnet
    >>> sequence = ff.SequenceINN(6, 4, 4)
    >>> sequence.append(fm.ActNorm)
    >>> sequence.append(GraphCoupling, subnet=partial(BottleneckSubnet, bottleneck=8), clamp=1.9)
    >>> sequence.append(fm.PermuteRandom)
    >>> x = torch.randn(2, 6, 4, 4)
    >>> z, log_det_B = sequence(x)
    >>> y, _ = sequence(z, rev=True)
    >>> torch.allclose(x, y, atol=1e-5), log_det_B.shape
    (True, torch.Size([2]))

    In a `GraphINN`, a block transforms as many nodes as it has inputs:

    >>> top, side = ff.InputNode(6, 4, 4), ff.InputNode(6, 4, 4)
    >>> views = partial(CrossViewSubnet, neighbours=[[1], [0]], hidden=8, kernel=3)
    >>> block = ff.Node([top.out0, side.out0], GraphCoupling, {"subnet": views, "clamp": 1.9})
    >>> nodes = [top, side, block, ff.OutputNode(block.out0), ff.OutputNode(block.out1)]
    >>> graph = ff.GraphINN(nodes)
    >>> latents, log_det_B = graph([x, x + 1])
    >>> (y_top, y_side), _ = graph(latents, rev=True)
    >>> torch.allclose(y_top, x, atol=1e-5), torch.allclose(y_side, x + 1, atol=1e-5)
    (True, True)
    """

    def __init__(
        self,
        dims_in: Sequence[tuple[int, int, int]],
        subnet: Subnet,
        clamp: float,
        dims_c: Sequence[tuple[int, ...]] | None = None,
    ) -> None:
        """Draws the permutations from torch's global generator.

        Args:
            dims_in: Channels, rows and columns of each node. All nodes have the same number of channels. Rows and
                columns are ignored: the block accepts maps of any size.
            subnet: Builds the two subnetworks.
            clamp: Bound of the log-scale.
            dims_c: Dimensions of the conditions; all have the first one's channels. A condition is concatenated to
                the half that a subnetwork reads.

        Raises:
            ValueError: If nodes differ in their channels or have fewer than two.
        """
        super().__init__(dims_in, dims_c)
        channels = {dims[0] for dims in dims_in}
        if len(channels) != 1 or min(channels) < 2:
            raise ValueError(
                f"dims_in: the nodes share one number of channels, at least 2; they have {sorted(channels)}"
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
        """A subnetwork's output for each node: unclamped log-scales, then shifts."""
        inputs = read
        if condition is not None:
            inputs = [torch.cat(pair, dim=1) for pair in zip(read, condition, strict=True)]
        # Under autocast the subnetwork returns bfloat16, too coarse for sums of log-scales.
        return [out.to(half.dtype) for out, half in zip(subnet(inputs), read, strict=True)]

    def couple(
        self, maps: Sequence[Tensor], condition: Sequence[Tensor] | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """From each node's map [B, C, H, W] and condition [B, K, H, W] to its latent [B, C, H, W].

        Also returns each node's log-determinant of every position, [B, H, W].
        """
        permuted = [
            _Halves.apply(map_BCHW, self.get_buffer(f"perm{node}"), self.halves[0])
            for node, map_BCHW in enumerate(maps)
        ]
        a, b = ([halves[side] for halves in permuted] for side in (0, 1))
        a, log_dets_a = self._transform(a, self._raw_affine(self.s2, b, condition))
        b, log_dets_b = self._transform(b, self._raw_affine(self.s1, a, condition))
        outputs = [torch.cat(halves, dim=1) for halves in zip(a, b, strict=True)]
        return outputs, [on_a + on_b for on_a, on_b in zip(log_dets_a, log_dets_b, strict=True)]

    def _transform(self, halves: list[Tensor], parameters: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The scaled and shifted halves, and the log-determinants."""
        results = [_Affine.apply(half, raw, self.clamp) for half, raw in zip(halves, parameters, strict=True)]
        return [y for y, _ in results], [log_det for _, log_det in results]

    def _restore(self, halves: list[Tensor], parameters: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The inverse of `_transform`, and the log-determinants of the inverse."""
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
        """From latents to maps: the inverse of `couple`, and the log-determinants of the inverse."""
        split = [torch.split(z, self.halves, dim=1) for z in latents]
        a, b = ([halves[side] for halves in split] for side in (0, 1))
        b, log_dets_b = self._restore(b, self._raw_affine(self.s1, a, condition))
        a, log_dets_a = self._restore(a, self._raw_affine(self.s2, b, condition))
        outputs = [
            torch.cat(halves, dim=1).index_select(1, self.get_buffer(f"perm{node}").argsort())
            for node, halves in enumerate(zip(a, b, strict=True))
        ]
        return outputs, [on_a + on_b for on_a, on_b in zip(log_dets_a, log_dets_b, strict=True)]

    def forward(
        self, x_or_z: Iterable[Tensor], c: Iterable[Tensor] | None = None, rev: bool = False, jac: bool = True
    ) -> tuple[list[Tensor], Tensor]:
        """FrEIA's interface.

        Args:
            x_or_z: A map [B, C, H, W] for each node.
            c: A condition [B, K, H, W] for each node, or one for all nodes.
            rev: Whether to invert.
            jac: Ignored; the log-determinant is always returned.

        Returns:
            The nodes' outputs, and the log-determinant of each image over all nodes, [B].
        """
        condition = list(c or ()) or None
        if condition is not None and len(condition) == 1:
            condition *= len(self.dims_in)
        outputs, log_dets = (self.uncouple if rev else self.couple)(list(x_or_z), condition)
        return outputs, torch.stack([log_det.sum((1, 2)) for log_det in log_dets]).sum(0)

    def output_dims(self, input_dims: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """The input's dimensions; a coupling keeps shapes."""
        return input_dims


def couple_all(
    blocks: Iterable[nn.Module], nodes: Sequence[Tensor], condition: Sequence[Tensor] | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Applies couplings in order; returns each node's latent [B, C, H, W] and summed log-determinants [B, H, W]."""
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
