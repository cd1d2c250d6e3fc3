"""The memory bank: what its score is, and that its vectors cover the good ones."""

import pytest
import torch

from defectflow import build_flow
from defectflow.memorybank import coreset, random_subset
from defectflow.pyramid import fuse


def maps_of(images, seed=0):
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    return [torch.randn(images, channels, side, side, generator=generator) for channels, side in ((4, 8), (3, 4))]


def test_a_score_is_half_the_squared_distance_to_the_nearest_vector_of_a_channel():
    training, images = maps_of(6), maps_of(2, seed=1)
    bank = build_flow("memorybank", channels=(4, 3), size=6 * 64).fit_adaptor([training])
    training_N7, images_P7 = (fuse(maps, 3).movedim(1, 3).flatten(0, 2) for maps in (training, images))
    expected_P = (images_P7[:, None] - training_N7[None]).square().sum(2).amin(1) / 14
    torch.testing.assert_close(bank.position_scores(images)[0].flatten(), expected_P, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(bank.position_scores(training)[0].max(), torch.tensor(0.0), rtol=0, atol=1e-4)


def test_a_coreset_leaves_no_vector_far_away():
    """Greedy k-centre is at most twice as far as the best choice (Gonzalez, 1985); a random one misses the rare."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    centres_M3 = 10 * torch.randn(30, 3, generator=generator)
    near_N = torch.cat([torch.zeros(5000, dtype=torch.long), torch.arange(30)])  # nearly all are near the first
    vectors_N3 = centres_M3[near_N] + 0.1 * torch.randn(len(near_N), 3, generator=generator)
    assert sorted(near_N[coreset(vectors_N3, 30)].tolist()) == list(range(30))


@pytest.mark.parametrize("adaptation", ["none", "standardise", "whiten"])
def test_a_defect_glows_where_it_is_in_any_unit(adaptation):
    training, images = maps_of(30), maps_of(2, seed=1)
    images[0][1, :, 5, 2] += 8
    if adaptation != "none":
        for maps in (training, images):
            maps[1] *= 1000
    bank = build_flow("memorybank", channels=(4, 3), size=300, neighbourhood=1, adaptation=adaptation)
    scores_B, map_BHW = bank.fit_adaptor([training]).predict(images)
    assert scores_B[1] > scores_B[0]
    assert divmod(int(map_BHW[1].argmax()), 8) == (5, 2)


def test_fewer_vectors_than_the_bank_holds_are_enough():
    bank = build_flow("memorybank", channels=(4, 3), size=500).fit_adaptor([maps_of(1)])
    assert torch.isfinite(bank.score(maps_of(3, seed=1))).all()


def test_features_that_are_not_finite_are_refused():
    maps = maps_of(2)
    maps[0][0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="memory bank: the features are not finite"):
        build_flow("memorybank", channels=(4, 3), size=5).fit_adaptor([maps])


def test_candidates_come_from_all_positions_of_all_images():
    """Each image has 256 positions: a regular stride would read the same few of each."""
    vectors = [torch.stack([torch.full((256,), float(image)), torch.arange(256.0)], dim=1) for image in range(64)]
    subset_N2 = random_subset(vectors, 4096)
    assert len(subset_N2) == len({tuple(each) for each in subset_N2.tolist()}) == 4096
    assert len(subset_N2[:, 0].unique()) == 64 and len(subset_N2[:, 1].unique()) == 256
    assert torch.equal(random_subset([torch.cat(vectors)], 4096), subset_N2), "the batches' sizes do not matter"


def test_the_background_does_not_count():
    training, images = maps_of(6), maps_of(2, seed=1)
    bank = build_flow("memorybank", channels=(4, 3), size=100).fit_adaptor([training])
    mask_B1HW = torch.zeros(2, 1, 8, 8)
    mask_B1HW[:, :, 2:6, 2:6] = 1
    inside = (slice(None), slice(2, 6), slice(2, 6))
    nll_BHW, scores_BHW = bank.position_nll(images)[1][0], bank.position_scores(images, mask=[mask_B1HW])[0]
    torch.testing.assert_close(bank.nll(images, mask=[mask_B1HW]), nll_BHW[inside].mean((1, 2)))
    torch.testing.assert_close(scores_BHW.amin((1, 2)), scores_BHW[inside].amin((1, 2)))
    torch.testing.assert_close(scores_BHW[:, 0, 0], scores_BHW[inside].amin((1, 2)))


def test_there_are_no_latents():
    bank = build_flow("memorybank", channels=(4, 3), size=5)
    for call in (bank, bank.inverse):
        with pytest.raises(NotImplementedError, match="no latents"):
            call(maps_of(1))
