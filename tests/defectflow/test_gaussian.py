"""The baseline: what its score is, and that few images are enough."""

import pytest
import torch

from defectflow import build_flow
from defectflow.whitening import fit_whitening, shrunk


def maps_of(images, channels=(4, 3), side=8, seed=0):
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    mixing = [torch.randn(count, count, generator=generator) for count in channels]
    return [
        torch.einsum(
            "cd,bdhw->bchw", matrix, torch.randn(images, len(matrix), side >> i, side >> i, generator=generator)
        )
        for i, matrix in enumerate(mixing)
    ]


def test_a_score_is_half_the_squared_mahalanobis_distance_of_a_channel():
    maps = maps_of(200, channels=(5,))
    flow = build_flow("gaussian", channels=(5,)).fit_adaptor([maps])
    vectors_N5 = maps[0].movedim(1, 3).flatten(0, 2).double()
    precision_55 = torch.linalg.inv(torch.cov(vectors_N5.T, correction=0))
    centred_N5 = vectors_N5 - vectors_N5.mean(0)
    expected_N = torch.einsum("nc,cd,nd->n", centred_N5, precision_55, centred_N5) / 10
    found_N = flow.position_scores(maps)[0].flatten().double()
    torch.testing.assert_close(found_N, expected_N, rtol=0.03, atol=0.03)  # a little shrinkage


def test_the_fit_does_not_depend_on_the_batches():
    maps = maps_of(40)
    at_once = build_flow("gaussian", channels=(4, 3)).fit_adaptor([maps])
    in_parts = build_flow("gaussian", channels=(4, 3)).fit_adaptor(
        [[each[i : i + 7] for each in maps] for i in range(0, 40, 7)]
    )
    torch.testing.assert_close(at_once.nll(maps), in_parts.nll(maps), rtol=1e-4, atol=1e-4)


def test_a_defect_glows_where_it_is():
    flow, maps = build_flow("gaussian", channels=(4, 3)).fit_adaptor([maps_of(30)]), maps_of(2, seed=1)
    maps[0][1, :, 5, 2] += 8
    scores_B, map_BHW = flow.predict(maps)
    assert scores_B[1] > scores_B[0]
    assert divmod(int(map_BHW[1].argmax()), 8) == (5, 2)


def test_fewer_vectors_than_channels_are_enough():
    """The covariance is shrunk to its diagonal: unseen vectors score about one, where the plain inverse explodes."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    scales_D = torch.linspace(0.1, 10, 60)
    few_ND, unseen_ND = (torch.randn(count, 60, generator=generator) * scales_D for count in (20, 500))
    weight_DD, bias_D = fit_whitening([few_ND], 60, shrink=True)
    mean_square = (unseen_ND @ weight_DD.T + bias_D).square().mean()
    assert 0.8 < mean_square < 2
    with pytest.raises(ValueError, match="at least two vectors"):
        fit_whitening([few_ND[:1]], 60)


def test_a_certain_covariance_is_hardly_shrunk():
    x_ND = torch.randn(100_000, 3, dtype=torch.float64) @ torch.tensor([[1.0, 0.9, 0], [0, 1, 0], [0, 0, 1]]).double()
    covariance = torch.cov(x_ND.T)
    torch.testing.assert_close(shrunk(covariance, len(x_ND)), covariance, rtol=0, atol=1e-3)
    assert float(shrunk(covariance, 3)[0, 1]) < 0.6 * float(covariance[0, 1])


def test_an_even_neighbourhood_is_refused():
    with pytest.raises(ValueError, match="neighbourhood: 2 is not an odd number from 1"):
        build_flow("gaussian", channels=(4,), neighbourhood=2)
