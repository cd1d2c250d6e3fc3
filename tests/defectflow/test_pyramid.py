"""Fusion equals torch's pooling and upsampling.

Shapes: B images, C channels, D fused channels, A projected channels, H rows, W columns.
"""

import pytest
import torch
import torch.nn.functional as F

from defectflow.pyramid import Grid, fuse, fuse_projected, neighbourhood_mean


def test_the_neighbourhood_mean_ignores_padding():
    map_BCHW = torch.arange(12.0).view(1, 1, 3, 4)
    mean_HW = neighbourhood_mean(map_BCHW, 3)[0, 0]
    for row in range(3):
        for column in range(4):
            inside = map_BCHW[0, 0, max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]
            assert mean_HW[row, column].item() == pytest.approx(inside.mean().item())
    assert neighbourhood_mean(map_BCHW, 1) is map_BCHW


@pytest.mark.parametrize(
    "sizes", [((8, 8), (4, 4)), ((48, 48), (24, 24), (12, 12)), ((9, 7), (4, 5), (1, 1)), ((6, 6),)]
)
@pytest.mark.parametrize(("stride", "offset"), [(1, (0, 0)), (2, (1, 0)), (3, (2, 1))])
def test_fusion_is_pooling_then_bilinear_upsampling_then_concatenation(sizes, stride, offset):
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    maps = [torch.randn(2, 3 + index, *size, generator=generator) for index, size in enumerate(sizes)]
    pooled = [F.avg_pool2d(each, 3, stride=1, padding=1, count_include_pad=False) for each in maps]
    expected_BDHW = torch.cat(
        [F.interpolate(each, size=sizes[0], mode="bilinear", align_corners=False) for each in pooled], dim=1
    )
    torch.testing.assert_close(fuse(maps, 3), expected_BDHW, atol=1e-5, rtol=1e-5)
    weight_AD, bias_A = torch.randn(4, expected_BDHW.shape[1], generator=generator), torch.randn(4, generator=generator)
    projected_BAHW = torch.einsum("ad,bdhw->bahw", weight_AD, expected_BDHW) + bias_A[:, None, None]
    grid_BAHW = projected_BAHW[:, :, offset[0] :: stride, offset[1] :: stride]
    for memory_format in (torch.contiguous_format, torch.channels_last):
        formatted = [each.to(memory_format=memory_format) for each in maps]
        result = fuse_projected(formatted, 3, weight_AD, bias_A, Grid(sizes[0], stride, offset))
        torch.testing.assert_close(result, grid_BAHW, atol=1e-5, rtol=1e-5)


def test_the_finest_map_may_have_any_index():
    coarse, fine = torch.randn(1, 2, 4, 4), torch.randn(1, 3, 8, 8)
    fused_BDHW = fuse([coarse, fine], 1)
    assert fused_BDHW.shape == (1, 5, 8, 8)
    assert torch.equal(fused_BDHW[:, 2:], fine)
