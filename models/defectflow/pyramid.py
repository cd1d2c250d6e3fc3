"""Fusion of a backbone's maps of several blocks and scales into one map.

Shapes: B images, C channels, N images times channels, H rows, W columns of a map; D fused channels (the sum of all
maps' C), A projected channels; R rows, S columns of a grid.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def neighbourhood_mean(map_BCHW: Tensor, size: int) -> Tensor:
    """Mean over the size x size neighbourhood of each position; padding does not count.

    Source: PatchFlow, equation 2; after Roth et al., "Towards Total Recall in Industrial Anomaly Detection" (2022).
    """
    if size == 1:
        return map_BCHW
    return F.avg_pool2d(map_BCHW, size, stride=1, padding=size // 2, count_include_pad=False)


@dataclass(frozen=True)
class Grid:
    """Positions of the finest map, of `size` rows and columns: every stride-th row and column from an offset."""

    size: tuple[int, int]
    stride: int = 1
    offset: tuple[int, int] = (0, 0)

    def sample(self, map_BCHW: Tensor) -> Tensor:
        """A map's values at the grid's positions: a slice of the finest map, bilinear upsampling of a smaller one.

        Upsampling is two matrix products, which on CPUs are faster than torch's bilinear upsampling of many channels.
        """
        if map_BCHW.shape[-2:] == self.size:
            rows, columns = (slice(first, None, self.stride) for first in self.offset)
            return map_BCHW[:, :, rows, columns]
        down_HR, across_WS = self._interpolations(map_BCHW)
        return (map_BCHW.transpose(2, 3) @ down_HR).transpose(2, 3) @ across_WS

    def add_sampled(self, total_BCRS: Tensor, map_BCHW: Tensor) -> None:
        """Adds `sample` of a smaller map to a contiguous sum in place, which saves two passes over it."""
        down_HR, across_WS = self._interpolations(map_BCHW)
        wide_NHS = (map_BCHW @ across_WS).flatten(0, 1)
        total_BCRS.view(-1, *total_BCRS.shape[2:]).baddbmm_(down_HR.T.expand(len(wide_NHS), -1, -1), wide_NHS)

    def _interpolations(self, map_BCHW: Tensor) -> list[Tensor]:
        """The matrices that upsample along a map's rows [H, R] and columns [W, S]."""
        return [
            _interpolation(length, size, map_BCHW)[:, first :: self.stride].contiguous()
            for length, size, first in zip(map_BCHW.shape[2:], self.size, self.offset, strict=True)
        ]


def _interpolation(length: int, size: int, like: Tensor) -> Tensor:
    """Linear interpolation from `length` to `size` values, as a matrix [length, size]."""
    eye = torch.eye(length, dtype=like.dtype, device=like.device)
    return F.interpolate(eye[None], size=size, mode="linear", align_corners=False)[0]


def finest_size(maps: Sequence[Tensor]) -> tuple[int, int]:
    """Rows and columns of the map with the most positions."""
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
    """A linear projection of the fused map's channels, ``weight @ fuse(maps) + bias``, at a grid's positions.

    Averaging and upsampling act on space and the projection on channels, so they commute. Maps are projected at
    their own size, those of one size together, and only the projections are upsampled. With the default backbone this
    takes a tenth of the multiplications and never allocates the fused map.

    >>> maps = [torch.randn(2, 4, 8, 8), torch.randn(2, 6, 4, 4), torch.randn(2, 2, 4, 4)]
    >>> weight_AD, bias_A = torch.randn(3, 12), torch.randn(3)
    >>> plain = torch.einsum("ad,bdhw->bahw", weight_AD, fuse(maps, 3)) + bias_A[:, None, None]
    >>> all_BAHW = fuse_projected(maps, 3, weight_AD, bias_A, Grid((8, 8)))
    >>> some_BARS = fuse_projected(maps, 3, weight_AD, bias_A, Grid((8, 8), stride=2, offset=(1, 0)))
    >>> torch.allclose(all_BAHW, plain, atol=1e-5), torch.allclose(some_BARS, plain[:, :, 1::2, 0::2], atol=1e-5)
    (True, True)
    """
    weights = torch.split(weight_AD, [map_BCHW.shape[1] for map_BCHW in maps], dim=1)
    sizes: dict[tuple[int, ...], list[int]] = {}
    for index, map_BCHW in enumerate(maps):
        sizes.setdefault(tuple(map_BCHW.shape[-2:]), []).append(index)

    def projected(size: tuple[int, ...], bias: Tensor | None) -> Tensor:
        means = [neighbourhood_mean(maps[index], neighbourhood) for index in sizes[size]]
        sampled = [grid.sample(mean) for mean in means] if size == grid.size else means
        weight_AC = torch.cat([weights[index] for index in sizes[size]], dim=1)
        return F.conv2d(torch.cat(sampled, dim=1), weight_AC[:, :, None, None], bias)

    # Some engines return maps in channels-last memory, and so would be the sum.
    total_BARS = projected(grid.size, bias_A).contiguous()
    for size in sizes:
        if size != grid.size:
            grid.add_sampled(total_BARS, projected(size, None))
    return total_BARS
