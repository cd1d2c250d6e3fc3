"""Reads image files once: digest, size, whether they can be decoded, and a thumbnail that tells copies.

Shapes: H = W = 32 rows and columns of a thumbnail.
"""

import hashlib
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from upath import UPath

from sprue.inference.images import UnreadableImageError, deep_peak, open_image

THUMBNAIL = 32
"""Side of a thumbnail: at 16 distinct parts grow alike, at 64 a copy of half the size differs from its original."""


@dataclass(frozen=True)
class Inspection:
    """The facts about an image file that its content gives.

    Attributes:
        sha256: Hexadecimal digest of the file's bytes.
        width: Pixels per row, 0 if unknown.
        height: Rows, 0 if unknown.
        damage: Why the file can't be used; empty if it can.
        thumbnail_HW: The image's luminance in 0..255; None if the file can't be used.
        peak: The largest value as a fraction of the full scale, of masks and where values have more than 8 bits;
            otherwise None.
    """

    sha256: str
    width: int
    height: int
    damage: str = ""
    thumbnail_HW: NDArray[np.float32] | None = field(default=None, compare=False, repr=False)
    peak: float | None = None


def inspect_images(root: UPath, images: Collection[str], masks: Collection[str]) -> dict[str, Inspection]:
    """Reads and fully decodes files in threads; paths are relative to `root`, with forward slashes."""
    with ThreadPoolExecutor() as pool:
        of_images = pool.map(lambda path: _inspect(root / path, is_mask=False), images)
        of_masks = pool.map(lambda path: _inspect(root / path, is_mask=True), masks)
        return dict(zip([*images, *masks], [*of_images, *of_masks], strict=True))


def _inspect(path: UPath, *, is_mask: bool) -> Inspection:
    try:
        data = path.read_bytes()
    except (FileNotFoundError, PermissionError) as error:
        return Inspection("", 0, 0, f"cannot be read: {error.strerror or error}")
    sha256 = hashlib.sha256(data).hexdigest()
    if not data:
        return Inspection(sha256, 0, 0, "zero bytes")
    try:
        image = open_image(data, "the file")
    except UnreadableImageError as error:
        return Inspection(sha256, 0, 0, str(error))
    peak = deep_peak(data)
    if is_mask and peak is None:
        peak = float(np.asarray(image.convert("L")).max()) / 255
    return Inspection(sha256, image.width, image.height, thumbnail_HW=thumbnail(image), peak=peak)


def thumbnail(image: Image.Image) -> NDArray[np.float32]:
    """The luminance of an image of any size and aspect ratio, as a square [H, W] of 32 x 32 in 0..255."""
    bicubic = Image.Resampling.BICUBIC
    # Four times as large in 8 bits, so that a huge image is never held in floats; then the rounding averages out.
    grey = image.convert("L").resize((4 * THUMBNAIL, 4 * THUMBNAIL), bicubic)
    return np.asarray(grey.convert("F").resize((THUMBNAIL, THUMBNAIL), bicubic), np.float32)
