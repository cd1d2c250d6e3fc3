"""Defects of regions: missing, surplus, misplaced, tinted or blurred, from a few pixels to a third of the image."""

import hashlib

import numpy as np
import pytest
from skimage import data

from sprue.data.region_defects import REGION_KINDS, VERSION, alter_region
from sprue.data.synthetic import VISIBLE_LEVELS
from sprue.errors import SprueError


def textured(channels: int) -> np.ndarray:
    return np.repeat(data.gravel()[:200, :160, None], channels, axis=2)


FOREIGN = np.repeat(data.brick()[:180, :220, None], 3, axis=2)


@pytest.mark.parametrize("kind", REGION_KINDS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_only_pixels_of_the_mask_change_and_most_of_them_visibly(kind, channels, seed):
    image_HWC = textured(channels)
    before = image_HWC.copy()
    result_HWC, mask_HW = alter_region(image_HWC, kind, np.random.default_rng(seed), FOREIGN)
    change_HW = np.abs(result_HWC.astype(int) - before).max(axis=2)
    assert np.array_equal(image_HWC, before)
    assert result_HWC.dtype == np.uint8 and mask_HW.dtype == np.bool_
    assert mask_HW.any() and not change_HW[~mask_HW].any()
    assert (change_HW[mask_HW] >= VISIBLE_LEVELS).mean() > 0.5
    if channels == 3:
        assert not np.ptp(result_HWC, axis=2).any(), "a grey image stays grey"


@pytest.mark.parametrize("kind", REGION_KINDS)
@pytest.mark.parametrize("level", [0, 128, 255])
def test_a_plain_image_gets_a_visible_defect_whatever_the_kind(kind, level):
    plain_HWC = np.full((40, 60, 3), level, np.uint8)
    result_HWC, mask_HW = alter_region(plain_HWC, kind, np.random.default_rng(0), plain_HWC)
    assert mask_HW.any() and np.abs(result_HWC.astype(int) - level).max() >= VISIBLE_LEVELS


def test_sizes_reach_from_a_few_pixels_to_a_third_of_the_image():
    def extents(kind):
        masks = (alter_region(textured(1), kind, np.random.default_rng(seed), FOREIGN)[1] for seed in range(40))
        return [float(np.sqrt(mask_HW.sum()) / 160) for mask_HW in masks]

    specks, covers = extents("speck"), extents("cover")
    assert max(specks) < 0.08 < max(covers) and 0.15 < max(covers) < 0.4 and min(covers) < 0.06


def test_the_same_seed_gives_the_same_defect_and_another_seed_another():
    for kind in REGION_KINDS:
        rngs = [np.random.default_rng(seed) for seed in (3, 3, 4)]
        first, again, other = (alter_region(textured(1), kind, rng, FOREIGN) for rng in rngs)
        assert all(np.array_equal(one, two) for one, two in zip(first, again, strict=True))
        assert not np.array_equal(first[1], other[1])


def test_bad_arguments_are_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(SprueError, match="defect kind 'dent' is unknown: choose one of speck, cover"):
        alter_region(textured(1), "dent", rng, FOREIGN)
    with pytest.raises(SprueError, match="at least 32 pixels a side"):
        alter_region(textured(1)[:20], "cover", rng, FOREIGN)


def test_pixels_change_only_with_the_version():
    digest = hashlib.sha256()
    for seed, kind in enumerate(REGION_KINDS):
        for pixels in alter_region(textured(3), kind, np.random.default_rng(seed), FOREIGN):
            digest.update(pixels.tobytes())
    assert {1: "0161d5de6e4eb3c3"}[VERSION] == digest.hexdigest()[:16]
