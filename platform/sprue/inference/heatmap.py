"""Heat maps for people: evidence as colour, with one scale for all pictures of a class.

Shapes: H rows, W columns of a picture.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from sprue.inference.calibration import Calibration


def heat(evidence_HW: NDArray[np.float32], calibration: Calibration) -> NDArray[np.float32]:
    """Evidence to 0..1: 0 at a good position's median, 1/2 where one good position in a thousand lies."""
    span = max(calibration.high - calibration.low, 1e-12)
    return np.clip((evidence_HW - calibration.low) / (2 * span), 0.0, 1.0).astype(np.float32)


def colour(heat_HW: NDArray[np.float32]) -> Image.Image:
    """Heat as an RGB picture, black over red to pale yellow."""
    grey = Image.fromarray((heat_HW * 255).astype(np.uint8))
    return ImageOps.colorize(grey, black="#000004", mid="#d0352b", white="#fcffa4", midpoint=140)


def overlay(image: Image.Image, heat_HW: NDArray[np.float32]) -> Image.Image:
    """The picture with its heat laid over it, the more opaque the hotter."""
    opacity = Image.fromarray((np.clip(heat_HW * 1.6 - 0.2, 0.0, 0.75) * 255).astype(np.uint8))
    return Image.composite(colour(heat_HW), image.convert("RGB"), opacity)
