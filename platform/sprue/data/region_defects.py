"""Synthetic defects that alter a region: missing and surplus parts, misplaced pieces, other colours and gloss, blur.

With the kinds of `sprue.data.synthetic` they span what is known of real defects, from a few pixels to a third of the
image, so that a detector which finds most of them is likely to find real ones.

Shapes: H rows, W columns, C channels. Opacities are in [0, 1].
"""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray
from skimage.filters import gaussian
from skimage.transform import rotate

from sprue.data.defect_shapes import Field, Pixels, blob, canvas, cut, positioned, smooth, visible
from sprue.data.synthetic import MINIMUM_SIDE, VISIBLE_LEVELS
from sprue.errors import SprueError

VERSION = 1
"""Changes when a defect's pixels change."""

REGION_KINDS = ("speck", "cover", "missing", "surplus", "rotated", "tinted", "blurred", "swapped", "mottled")

_MINIMUM_AREA = 4
_ATTEMPTS = 20


def alter_region(
    image_HWC: Pixels, kind: str, rng: np.random.Generator, foreign_HWC: Pixels
) -> tuple[Pixels, NDArray[np.bool_]]:
    """Alters a region of random shape, size and position.

    Where a kind shows nowhere, as a turned piece of a plain surface, the region is covered instead.

    Args:
        image_HWC: The good image, at least 32 pixels a side; not changed.
        kind: One of ``REGION_KINDS``. ``speck`` and ``cover`` hide a few pixels, or a region, under one colour;
            ``missing`` fills it with the colour of its surroundings; ``surplus`` has a piece of the image itself,
            ``swapped`` one of another image, ``rotated`` its own, turned; ``tinted`` has another brightness or colour,
            ``blurred`` no detail; ``mottled`` shows another image through noise (as in DRAEM, Zavrtanik et al., ICCV
            2021, with Perlin's).
        rng: Source of everything that is random.
        foreign_HWC: Another image, of the same class or not.

    Returns:
        A copy of the image that differs inside the mask only, and the mask (H, W) of the visibly changed pixels,
        which is never empty.

    Raises:
        SprueError: If the kind is unknown, the image too small, or no visible change is found.

    >>> rng = np.random.default_rng(0)
    >>> image = rng.integers(0, 255, (64, 64, 3), np.uint8)
    >>> all(alter_region(image, kind, rng, image)[1].any() for kind in REGION_KINDS)
    True
    """
    if kind not in REGION_KINDS:
        raise SprueError(f"defect kind {kind!r} is unknown: choose one of {', '.join(REGION_KINDS)}")
    if image_HWC.ndim != 3 or min(image_HWC.shape[:2]) < MINIMUM_SIDE:
        raise SprueError(f"a defect needs an image (H, W, C) of at least {MINIMUM_SIDE} pixels a side")
    for shown in [kind] * _ATTEMPTS + ["cover"] * _ATTEMPTS:
        result_HWC, mask_HW = _altered(image_HWC, shown, rng, foreign_HWC)
        if mask_HW.sum() >= _MINIMUM_AREA:
            return result_HWC, mask_HW
    raise SprueError(f"no visible {kind} fits into an image of {image_HWC.shape}; give another image")


def _altered(
    image_HWC: Pixels, kind: str, rng: np.random.Generator, foreign_HWC: Pixels
) -> tuple[Pixels, NDArray[np.bool_]]:
    smallest, largest = (0.012, 0.04) if kind == "speck" else (0.04, 0.33)
    size = float(np.exp(rng.uniform(np.log(smallest), np.log(largest))))
    extent = max(3, round(size * min(image_HWC.shape[:2])))
    shape_HW = canvas(extent, lambda side, rendered: blob(side, rendered, 0.25, 0.2, rng))
    opacity_HW, box = positioned(shape_HW, image_HWC.shape[:2], rng)
    if kind == "mottled":
        opacity_HW = opacity_HW * np.clip(smooth(rng.standard_normal(opacity_HW.shape), extent / 12) / 0.1, 0, 1)
    original_HWC = image_HWC[box].astype(np.float64)
    source_HWC = image_HWC if kind == "surplus" else foreign_HWC
    fill_HWC = _FILLS[kind](original_HWC, opacity_HW, cut(source_HWC, original_HWC.shape, rng), rng)
    if not np.ptp(original_HWC, axis=2).any():
        fill_HWC = fill_HWC.mean(axis=2, keepdims=True)  # a grey image stays grey
    mixed_HWC = original_HWC + opacity_HW[:, :, None] * (fill_HWC - original_HWC)
    altered_HWC = np.clip(np.rint(mixed_HWC), 0, 255).astype(np.uint8)
    changed_HW = np.abs(altered_HWC - original_HWC).max(axis=2) >= VISIBLE_LEVELS
    mask_HW = changed_HW if kind == "mottled" else visible(changed_HW)
    result_HWC, result_mask_HW = image_HWC.copy(), np.zeros(image_HWC.shape[:2], np.bool_)
    result_HWC[box][mask_HW] = altered_HWC[mask_HW]
    result_mask_HW[box] = mask_HW
    return result_HWC, result_mask_HW


def _colour(original_HWC: Field, opacity_HW: Field, _: Field, rng: np.random.Generator) -> Field:
    """One colour, with some grain."""
    colour_C = rng.uniform(0, 255, original_HWC.shape[2])
    return colour_C + rng.normal(0, rng.uniform(2, 20), (*opacity_HW.shape, 1))


def _surroundings(original_HWC: Field, opacity_HW: Field, _: Field, rng: np.random.Generator) -> Field:
    """The median colour beside the region."""
    beside_HW = opacity_HW < 0.05
    colours = original_HWC[beside_HW] if beside_HW.any() else original_HWC.reshape(-1, original_HWC.shape[2])
    return np.median(colours, axis=0) + rng.normal(0, 2, (*opacity_HW.shape, 1))


def _piece(_: Field, __: Field, piece_HWC: Field, ___: np.random.Generator) -> Field:
    return piece_HWC


def _turned(original_HWC: Field, _: Field, __: Field, rng: np.random.Generator) -> Field:
    return np.asarray(rotate(original_HWC, rng.uniform(15, 345), preserve_range=True, mode="reflect"), np.float64)


def _gain(original_HWC: Field, _: Field, __: Field, rng: np.random.Generator) -> Field:
    """Another brightness, or another colour."""
    channels = original_HWC.shape[2] if rng.random() < 0.5 else 1
    return np.asarray(original_HWC * np.exp(rng.uniform(-0.7, 0.7, channels)), np.float64)


def _without_detail(original_HWC: Field, _: Field, __: Field, rng: np.random.Generator) -> Field:
    sigma = rng.uniform(0.05, 0.15) * max(original_HWC.shape[:2])
    return np.asarray(gaussian(original_HWC, sigma, channel_axis=2, preserve_range=True), np.float64)


def _shifted(_: Field, __: Field, piece_HWC: Field, rng: np.random.Generator) -> Field:
    """The piece, brighter or darker."""
    return piece_HWC * rng.uniform(0.6, 1.4) + rng.uniform(-60, 60)


_FILLS: Mapping[str, Callable[[Field, Field, Field, np.random.Generator], Field]] = {
    "speck": _colour,
    "cover": _colour,
    "missing": _surroundings,
    "surplus": _piece,
    "rotated": _turned,
    "tinted": _gain,
    "blurred": _without_detail,
    "swapped": _piece,
    "mottled": _shifted,
}
