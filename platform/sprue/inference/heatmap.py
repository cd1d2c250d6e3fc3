"""Heat maps for people: evidence as colour, with one scale for all pictures of a class.

Shapes: H rows, W columns of a picture.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from scipy.ndimage import minimum_filter1d

from sprue.inference.calibration import Calibration

OUTLINE = "#1565ff"
"""Colour of the border of what is marked, which no heat has."""


def heat(evidence_HW: NDArray[np.float32], calibration: Calibration) -> NDArray[np.float32]:
    """Evidence to 0..1: 0 at a good position's median, 1/2 where one good position in a thousand lies."""
    span = max(calibration.high - calibration.low, 1e-12)
    return np.clip((evidence_HW - calibration.low) / (2 * span), 0.0, 1.0).astype(np.float32)


def colour(heat_HW: NDArray[np.float32]) -> Image.Image:
    """Heat as an RGB picture, black over red to pale yellow."""
    grey = Image.fromarray((heat_HW * 255).astype(np.uint8))
    return ImageOps.colorize(grey, black="#000004", mid="#d0352b", white="#fcffa4", midpoint=140)


def overlay(image: Image.Image, heat_HW: NDArray[np.float32], marked_HW: NDArray[np.bool_]) -> Image.Image:
    """The picture with its heat laid over it, the more opaque the hotter, and an outline of what is marked."""
    opacity = Image.fromarray((np.clip(heat_HW * 1.6 - 0.2, 0.0, 0.75) * 255).astype(np.uint8))
    laid = Image.composite(colour(heat_HW), image.convert("RGB"), opacity)
    if marked_HW.any():
        laid.paste(OUTLINE, mask=_outline(marked_HW))
    return laid


def _outline(marked_HW: NDArray[np.bool_]) -> Image.Image:
    """The border of an area, inside of it and at the picture's edge too, about a two-hundredth of the picture wide."""
    inner_HW = marked_HW.astype(np.uint8)
    width = 2 * max(1, min(marked_HW.shape) // 200) + 1
    for axis in range(2):
        inner_HW = minimum_filter1d(inner_HW, width, axis, mode="constant", cval=0)
    return Image.fromarray((marked_HW & (inner_HW == 0)).astype(np.uint8) * 255)
