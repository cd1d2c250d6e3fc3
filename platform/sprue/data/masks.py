"""Ground truth: an image's mask, white where the image is anomalous.

Shapes: H rows, W columns of the mask, which are those of its image.
"""

import numpy as np
from numpy.typing import NDArray
from upath import UPath

from sprue.inference.images import open_image

WHITE = 128 / 255
"""Fraction of the full scale from which a mask's value is white."""


def read_mask(root: UPath, path: str) -> NDArray[np.bool_]:
    """Reads a mask [H, W] of the dataset in the folder `root`; True where it is white.

    Raises:
        UnreadableImageError: If the file can't be decoded.
    """
    grey_HW = np.asarray(open_image((root / path).read_bytes(), path).convert("L"))
    return grey_HW >= 255 * WHITE
