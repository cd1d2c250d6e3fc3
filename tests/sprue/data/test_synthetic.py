import hashlib

import numpy as np
import pytest
from skimage import data
from skimage.measure import label, regionprops

from sprue.data.synthetic import KINDS, VERSION, VISIBLE_LEVELS, synthesize_defect
from sprue.errors import SprueError


def textured(channels: int) -> np.ndarray:
    return np.repeat(data.gravel()[:200, :160, None], channels, axis=2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("seed", range(5))
def test_only_pixels_of_the_mask_change_and_most_of_them_visibly(kind, channels, seed):
    image_HWC = textured(channels)
    before = image_HWC.copy()
    result_HWC, mask_HW = synthesize_defect(image_HWC, kind, np.random.default_rng(seed))
    change_HW = np.abs(result_HWC.astype(int) - before).max(axis=2)
    assert np.array_equal(image_HWC, before)
    assert result_HWC.dtype == np.uint8
    assert mask_HW.dtype == np.bool_
    assert mask_HW.any()
    assert not change_HW[~mask_HW].any()
    assert (change_HW[mask_HW] >= VISIBLE_LEVELS).mean() > 0.7


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", [0, 3, 128, 252, 255])
@pytest.mark.parametrize("shape", [(32, 32), (33, 300)])
def test_a_plain_image_of_any_brightness_gets_a_visible_defect(kind, level, shape):
    image_HWC = np.full((*shape, 1), level, np.uint8)
    for seed in range(4):
        result_HWC, mask_HW = synthesize_defect(image_HWC, kind, np.random.default_rng(seed), contrast=0, size=0.05)
        assert mask_HW.sum() >= 12
        assert np.abs(result_HWC.astype(int) - level).max() >= VISIBLE_LEVELS


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_defect_and_another_seed_another(kind):
    first = synthesize_defect(textured(1), kind, np.random.default_rng(3))
    again = synthesize_defect(textured(1), kind, np.random.default_rng(3))
    other = synthesize_defect(textured(1), kind, np.random.default_rng(4))
    assert all(np.array_equal(one, two) for one, two in zip(first, again, strict=True))
    assert not np.array_equal(first[1], other[1])


@pytest.mark.parametrize("kind", KINDS)
def test_contrast_and_size_do_what_they_say(kind):
    image_HWC = np.full((200, 200, 1), 110, np.uint8)

    def mean_change_and_area(contrast, size):
        defects = [synthesize_defect(image_HWC, kind, np.random.default_rng(seed), contrast, size) for seed in range(8)]
        change = [np.abs(result.astype(int) - 110)[mask].mean() for result, mask in defects]
        return np.mean(change), np.mean([mask.sum() for _, mask in defects])

    faint, _ = mean_change_and_area(0.1, 0.3)
    strong, large = mean_change_and_area(1.0, 0.3)
    _, small = mean_change_and_area(1.0, 0.1)
    assert strong > 1.3 * faint
    assert large > 2 * small


@pytest.mark.parametrize("kind", KINDS)
def test_defects_vary_in_position_shape_and_orientation(kind):
    image_HWC = np.full((200, 200, 1), 110, np.uint8)
    masks = [synthesize_defect(image_HWC, kind, np.random.default_rng(seed), 1.0, 0.3)[1] for seed in range(16)]
    regions = [max(regionprops(label(mask)), key=lambda region: region.area) for mask in masks]
    assert np.ptp([region.centroid for region in regions], axis=0).min() > 80
    assert np.ptp([region.orientation for region in regions]) > 1.5
    # A disc and a straight stroke equal their convex hull.
    assert np.mean([region.solidity for region in regions]) < 0.97


@pytest.mark.parametrize("kind", KINDS)
def test_a_defect_is_about_as_long_as_its_size_says(kind):
    image_HWC = np.full((200, 200, 1), 110, np.uint8)
    for seed in range(10):
        _, mask_HW = synthesize_defect(image_HWC, kind, np.random.default_rng(seed), 1.0, 0.25)
        rows, columns = np.nonzero(mask_HW)
        assert 12 <= max(np.ptp(rows), np.ptp(columns)) <= 115


def test_a_patch_shows_the_foreign_texture():
    image_HWC = np.full((128, 128, 1), 128, np.uint8)
    stripes_HWC = np.tile(np.array([[[60]], [[200]]], np.uint8), (8, 16, 1))  # smaller than the patch: it is mirrored
    _, plain_HW = synthesize_defect(image_HWC, "patch", np.random.default_rng(1), 1.0, 0.5)
    result_HWC, mask_HW = synthesize_defect(image_HWC, "patch", np.random.default_rng(1), 1.0, 0.5, stripes_HWC)
    assert plain_HW.any()
    assert result_HWC[mask_HW].std() > 30


def test_a_grey_patch_fits_a_colour_image_and_the_other_way_round():
    for image_HWC, foreign_HWC in ((textured(3), data.brick()[:, :, None]), (textured(1), data.astronaut())):
        result_HWC, _ = synthesize_defect(image_HWC, "patch", np.random.default_rng(1), foreign_HWC=foreign_HWC)
        assert result_HWC.shape == image_HWC.shape


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "dent"}, "'dent' is unknown: choose one of scratch, stain, hole, patch"),
        ({"contrast": 1.5}, "contrast is 1.5"),
        ({"size": 0.0}, "size is 0.0"),
        ({"image_HWC": np.zeros((16, 64, 1), np.uint8)}, "at least 32 pixels a side, not uint8"),
        ({"image_HWC": np.zeros((64, 64, 1), np.float32)}, "not float32"),
        ({"image_HWC": np.zeros((64, 64), np.uint8)}, r"\(64, 64\)"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    usual = {"image_HWC": textured(1), "kind": "hole", "rng": np.random.default_rng(0)}
    with pytest.raises(SprueError, match=message):
        synthesize_defect(**(usual | arguments))


@pytest.mark.parametrize("kind", KINDS)
def test_a_large_defect_in_a_large_image_keeps_its_size(kind):
    image_HWC = np.full((1200, 1000, 1), 110, np.uint8)
    _, mask_HW = synthesize_defect(image_HWC, kind, np.random.default_rng(2), 1.0, 0.5)
    rows, columns = np.nonzero(mask_HW)
    assert 250 <= max(np.ptp(rows), np.ptp(columns)) <= 900


@pytest.mark.parametrize("kind", KINDS)
def test_a_grey_image_stored_in_colour_stays_grey(kind):
    result_HWC, _ = synthesize_defect(textured(3), kind, np.random.default_rng(5), contrast=1.0)
    assert not np.ptp(result_HWC, axis=2).any()


PINNED = {1: "2855c5544b14454705cc6a2c91bce73e6974f13f7e013abc7365cb41bd0dda93"}
"""By version: digest of the images and masks of a defect of each kind."""


def test_the_defects_of_this_version():
    """If a change of the pixels is intended, raise `VERSION` and pin the new ones to it."""
    sha = hashlib.sha256()
    for seed, kind in enumerate(KINDS):
        for pixels in synthesize_defect(textured(3), kind, np.random.default_rng(seed)):
            sha.update(pixels.tobytes())
    assert sha.hexdigest() == PINNED[VERSION]
