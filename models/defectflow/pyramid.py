"""Fusion of a backbone's maps of several blocks and scales into one map, as PatchFlow reads it.

Shapes: B pictures, C channels, H rows, W columns; D fused channels (the sum of all maps' C).
"""

from collections.abc import Sequence

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


def upsample(map_BCHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear upsampling to `size` (rows, columns)."""
    if map_BCHW.shape[-2:] == size:
        return map_BCHW
    return F.interpolate(map_BCHW, size=size, mode="bilinear", align_corners=False)


def finest_size(maps: Sequence[Tensor]) -> tuple[int, int]:
    """Rows and columns of the map with the most positions, which the others are brought to."""
    height, width = max((tuple(map_BCHW.shape[-2:]) for map_BCHW in maps), key=lambda size: size[0] * size[1])
    return height, width


def fuse(maps: Sequence[Tensor], neighbourhood: int) -> Tensor:
    """Neighbourhood means of all maps, upsampled to the finest and concatenated: [B, D, H, W].

    >>> fuse([torch.randn(2, 4, 8, 8), torch.randn(2, 6, 4, 4)], neighbourhood=3).shape
    torch.Size([2, 10, 8, 8])
    """
    size = finest_size(maps)
    return torch.cat([upsample(neighbourhood_mean(map_BCHW, neighbourhood), size) for map_BCHW in maps], dim=1)


def fuse_projected(maps: Sequence[Tensor], neighbourhood: int, weight_AD: Tensor, bias_A: Tensor) -> Tensor:
    """The fused map under a linear projection of its channels: ``weight @ fuse(maps) + bias``, [B, A, H, W].

    Averaging and upsampling work on space, the projection on channels, so they commute: each map is projected
    where it is small, maps of one size are added, and only the sums are upsampled. With the default backbone
    this takes a tenth of the multiplications and never holds the fused map.

    >>> maps = [torch.randn(2, 4, 8, 8), torch.randn(2, 6, 4, 4), torch.randn(2, 2, 4, 4)]
    >>> weight_AD, bias_A = torch.randn(3, 12), torch.randn(3)
    >>> plain = torch.einsum("ad,bdhw->bahw", weight_AD, fuse(maps, 3)) + bias_A[:, None, None]
    >>> bool(torch.allclose(fuse_projected(maps, 3, weight_AD, bias_A), plain, atol=1e-5))
    True
    """
    sums: dict[tuple[int, int], Tensor] = {}
    weights = weight_AD.split([map_BCHW.shape[1] for map_BCHW in maps], dim=1)
    for map_BCHW, weight_AC in zip(maps, weights, strict=True):
        size = (map_BCHW.shape[-2], map_BCHW.shape[-1])
        projected = F.conv2d(map_BCHW, weight_AC[:, :, None, None])
        sums[size] = sums[size] + projected if size in sums else projected
    finest = finest_size(maps)
    # Of the neighbourhood means only the sums' are needed, for the mean is linear too.
    parts = [upsample(neighbourhood_mean(map_BAHW, neighbourhood), finest) for map_BAHW in sums.values()]
    total = bias_A[:, None, None] + parts[0]
    for part in parts[1:]:
        total = total + part
    return total
