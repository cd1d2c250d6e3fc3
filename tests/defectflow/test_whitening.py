"""The frozen linear map: which positions it is fitted on, and that it is fitted in one pass."""

import weakref

import pytest
import torch

from defectflow.adaptor import ChannelAdaptor
from defectflow.whitening import POSITIONS_PER_IMAGE, fit_whitening, sample_vectors


@pytest.mark.parametrize("size", [(24, 24), (32, 32), (48, 48), (64, 64), (96, 96), (48, 64), (64, 20)])
def test_all_rows_and_columns_are_sampled_equally_often(size):
    height, width = size
    places = torch.meshgrid(torch.arange(float(height)), torch.arange(float(width)), indexing="ij")
    sampled_N2 = sample_vectors(torch.stack(places)[None])
    for axis, length in enumerate(size):
        counts = torch.bincount(sampled_N2[:, axis].long(), minlength=length)
        assert counts.min() > 0 and counts.max() - counts.min() <= 1
    assert 0.75 * POSITIONS_PER_IMAGE <= len(sampled_N2) <= 1.25 * POSITIONS_PER_IMAGE


@pytest.mark.parametrize("size", [(32, 32), (48, 48), (64, 64), (96, 96)])
def test_no_position_is_far_from_a_sampled_one(size):
    places = torch.stack(torch.meshgrid(*map(torch.arange, map(float, size)), indexing="ij"))
    sampled_N2, all_P2 = sample_vectors(places[None]), places.flatten(1).T
    nearest_P = torch.cdist(all_P2, sampled_N2).amin(1)
    spacing = (len(all_P2) / len(sampled_N2)) ** 0.5
    inner_P = ((all_P2 >= spacing) & (all_P2 < torch.tensor(size) - spacing)).all(1)
    assert nearest_P[inner_P].max() <= 0.75 * spacing  # of an upright grid, half its diagonal: 0.71


@pytest.mark.parametrize("size", [(12, 12), (16, 16), (22, 23)])
def test_small_maps_are_read_whole(size):
    map_BCHW = torch.randn(2, 3, *size)
    assert torch.equal(sample_vectors(map_BCHW), map_BCHW.flatten(2).transpose(1, 2).flatten(0, 1))


def batches():
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        yield [torch.randn(2, 3, 8, 8, generator=generator) + node for node in range(2)]


def watched(batches, seen):
    """The batches, of which the reader keeps none but the last."""
    for maps in batches:
        assert sum(reference() is not None for reference in seen) <= len(maps)
        seen += [weakref.ref(map_BCHW) for map_BCHW in maps]
        yield maps
        del maps


@pytest.mark.parametrize("adaptation", ["whiten", "standardise"])
def test_an_adaptor_is_fitted_in_one_pass_that_keeps_no_batch(adaptation):
    adaptor, seen = ChannelAdaptor(nodes=2, channels=3, adaptation=adaptation), []
    adaptor.fit(watched(batches(), seen))
    assert len(seen) == 8
    for node, maps in enumerate(zip(*batches(), strict=True)):
        vectors = [sample_vectors(map_BCHW) for map_BCHW in maps]
        weight_CC, bias_C = fit_whitening(vectors, 3, decorrelate=adaptation == "whiten")
        assert torch.equal(adaptor.weight[node], weight_CC) and torch.equal(adaptor.bias[node], bias_C)
