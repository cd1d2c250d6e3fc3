"""Fusion of a backbone's maps of several blocks and scales into one map, as PatchFlow reads it.

Shapes: B pictures, C channels, H rows, W columns; D fused channels (the sum of all maps' C), A projected
ones; R rows, S columns of a grid.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def neighbourhood_mean(map_BCHW: Tensor, size: int) -> Tensor:
    """Mean over the size x size neighbourhood of each position; at the border over what lies inside.

    Source: PatchFlow, equation 2; after Roth et al., "Towards Total Recall in Industrial Anomaly Detection" (2022).
    """
    if size == 1:
        return map_BCHW
    return F.avg_pool2d(map_BCHW, size, stride=1, padding=size // 2, count_include_pad=False)


@dataclass(frozen=True)
class Grid:
    """The positions of the finest map that are read: every stride-th row and column from an offset.

    Attributes:
        size: Rows and columns of the finest map.
        stride: Step between positions.
        offset: First row and column.
    """

    size: tuple[int, int]
    stride: int = 1
    offset: tuple[int, int] = (0, 0)

    def sample(self, map_BCHW: Tensor) -> Tensor:
        """The grid's positions of a map: a slice if it is the finest, else bilinear upsampling at these positions.

        Two matrix products, which on CPUs are faster than torch's own bilinear upsampling of many channels.
        """
        if map_BCHW.shape[-2:] == self.size:
            rows, columns = (slice(first, None, self.stride) for first in self.offset)
            return map_BCHW[:, :, rows, columns]
        down_HR, across_WS = self._interpolations(map_BCHW)
        return (map_BCHW.transpose(2, 3) @ down_HR).transpose(2, 3) @ across_WS

    def add_sampled(self, total_BCRS: Tensor, map_BCHW: Tensor) -> None:
        """Adds the grid's positions of a smaller map to a contiguous sum in place, which spares two passes over it."""
        down_HR, across_WS = self._interpolations(map_BCHW)
        wide_NHS = (map_BCHW @ across_WS).flatten(0, 1)
        total_BCRS.view(-1, *total_BCRS.shape[2:]).baddbmm_(down_HR.T.expand(len(wide_NHS), -1, -1), wide_NHS)

    def _interpolations(self, map_BCHW: Tensor) -> list[Tensor]:
        """The matrices that upsample a map's columns [H, R] and its rows [W, S] to R x S positions."""
        return [
            _interpolation(length, size, map_BCHW)[:, first :: self.stride].contiguous()
            for length, size, first in zip(map_BCHW.shape[2:], self.size, self.offset, strict=True)
        ]


def _interpolation(length: int, size: int, like: Tensor) -> Tensor:
    """Linear interpolation from `length` to `size` values, as a matrix [length, size]."""
    eye = torch.eye(length, dtype=like.dtype, device=like.device)
    return F.interpolate(eye[None], size=size, mode="linear", align_corners=False)[0]


def finest_size(maps: Sequence[Tensor]) -> tuple[int, int]:
    """Rows and columns of the map with the most positions, which the others are brought to."""
    height, width = max((tuple(map_BCHW.shape[-2:]) for map_BCHW in maps), key=lambda size: size[0] * size[1])
    return height, width


def fuse(maps: Sequence[Tensor], neighbourhood: int) -> Tensor:
    """Neighbourhood means of all maps, upsampled to the finest and concatenated: [B, D, H, W].

    >>> fuse([torch.randn(2, 4, 8, 8), torch.randn(2, 6, 4, 4)], neighbourhood=3).shape
    torch.Size([2, 10, 8, 8])
    """
    grid = Grid(finest_size(maps))
    return torch.cat([grid.sample(neighbourhood_mean(map_BCHW, neighbourhood)) for map_BCHW in maps], dim=1)


def fuse_projected(maps: Sequence[Tensor], neighbourhood: int, weight_AD: Tensor, bias_A: Tensor, grid: Grid) -> Tensor:
    """The fused map under a linear projection of its channels, ``weight @ fuse(maps) + bias``, at a grid's positions.

    Averaging and upsampling work on space, the projection on channels, so they commute: maps are projected where
    they are small, those of one size together, and only the projections are upsampled. With the default backbone
    this takes a tenth of the multiplications and never holds the fused map.

    >>> maps = [torch.randn(2, 4, 8, 8), torch.randn(2, 6, 4, 4), torch.randn(2, 2, 4, 4)]
    >>> weight_AD, bias_A = torch.randn(3, 12), torch.randn(3)
    >>> plain = torch.einsum("ad,bdhw->bahw", weight_AD, fuse(maps, 3)) + bias_A[:, None, None]
    >>> whole = fuse_projected(maps, 3, weight_AD, bias_A, Grid((8, 8)))
    >>> part = fuse_projected(maps, 3, weight_AD, bias_A, Grid((8, 8), stride=2, offset=(1, 0)))
    >>> torch.allclose(whole, plain, atol=1e-5), torch.allclose(part, plain[:, :, 1::2, 0::2], atol=1e-5)
    (True, True)
    """
    weights = torch.split(weight_AD, [map_BCHW.shape[1] for map_BCHW in maps], dim=1)
    sizes: dict[tuple[int, ...], list[int]] = {}
    for place, map_BCHW in enumerate(maps):
        sizes.setdefault(tuple(map_BCHW.shape[-2:]), []).append(place)

    def projected(size: tuple[int, ...], bias: Tensor | None) -> Tensor:
        means = [neighbourhood_mean(maps[place], neighbourhood) for place in sizes[size]]
        read = [grid.sample(mean) for mean in means] if size == grid.size else means
        weight_AC = torch.cat([weights[place] for place in sizes[size]], dim=1)
        return F.conv2d(torch.cat(read, dim=1), weight_AC[:, :, None, None], bias)

    # Maps whose channels come last in memory, as some engines put them out, would have such a sum.
    total_BARS = projected(grid.size, bias_A).contiguous()
    for size in sizes:
        if size != grid.size:
            grid.add_sampled(total_BARS, projected(size, None))
    return total_BARS
