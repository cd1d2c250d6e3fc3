"""Converts images of any size and mode to what a backbone reads.

Shapes: H rows, W columns, C = 3 channels; S the side of the square input.
"""

import io
import struct
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError

from sprue.errors import SprueError

MAX_PIXELS = 100_000_000
"""Images with more pixels are refused before they are decoded: the header of a small file can state any size."""

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM", "GIF")
"""The decoders that are tried, whatever a file's suffix."""

DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError, struct.error)
"""Pillow's decoders report damaged data with any of these."""


class UnreadableImageError(SprueError):
    """The bytes are an image that can't be decoded."""


class NotAnImageError(UnreadableImageError):
    """The bytes are not of a supported format."""


class ImageTooLargeError(UnreadableImageError):
    """The image's header states more pixels than the limit."""


def open_image(data: bytes, name: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes an image to 8-bit RGB, as it is stored: a camera's rotation tag is ignored, since masks have none.

    Messages call the file `name`. The limit is checked before decoding.

    Raises:
        NotAnImageError: If no decoder knows the format.
        ImageTooLargeError: If the header states more than `max_pixels`.
        UnreadableImageError: If the data is truncated or damaged, or has values above the full scale: 65535 of
            integers, 1 of floats.

    >>> open_image(b"text", "part.png")
    Traceback (most recent call last):
    ...
    sprue.inference.images.NotAnImageError: part.png is not an image (PNG, JPEG, BMP, TIFF, WEBP, PPM, GIF are read)
    """
    try:
        image = _undecoded(data)
        # Decoding does not check a PNG's checksums. Verifying does, and leaves its image unusable.
        _undecoded(data).verify()
        if image.width * image.height > max_pixels:
            raise ImageTooLargeError(
                f"{name} has {image.width} x {image.height} pixels; at most {max_pixels:,} are read"
            )
        image.load()
        return _eight_bit(image, name).convert("RGB")
    except UnidentifiedImageError as error:
        raise NotAnImageError(f"{name} is not an image ({', '.join(FORMATS)} are read)") from error
    except Image.DecompressionBombError as error:
        raise ImageTooLargeError(f"{name} states more pixels than are read: {error}") from error
    except DAMAGE as error:
        raise UnreadableImageError(f"{name} is damaged: {error}") from error


def deep_peak(data: bytes) -> float | None:
    """The largest value of an image that `open_image` reads, as a fraction of its full scale; None of 8-bit values."""
    image = _undecoded(data)
    # Pillow decodes 16-bit colour to 8 bits; then only the layout of the stored pixels tells.
    deep = image.mode[0] in "IF" or any(";16" in str(tile.args) for tile in image.tile)
    return float(np.nan_to_num(np.asarray(image)).max() / _full_scale(image)) if deep else None


def _undecoded(data: bytes) -> ImageFile.ImageFile:
    with warnings.catch_warnings():
        # `open_image` has a limit of its own; Pillow warns at another.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(io.BytesIO(data), formats=FORMATS)


def _eight_bit(image: Image.Image, name: str) -> Image.Image:
    """Converts 16-bit, 32-bit and float greyscale to 8 bits by one scale for all images, where Pillow would clip."""
    if image.mode[0] not in "IF":
        return image
    full = _full_scale(image)
    values_HW = np.nan_to_num(np.asarray(image))
    if values_HW.max(initial=0) > full:
        raise UnreadableImageError(
            f"{name} has values above {full}, which is white in images of {'floats' if full == 1 else 'integers'}: "
            f"scale them to 0..{full}"
        )
    values_HW = values_HW.clip(0, full)
    return Image.fromarray((values_HW * 255.0 if full == 1 else values_HW // 257).astype(np.uint8))


def _full_scale(image: Image.Image) -> int:
    """The value of white."""
    return {"F": 1, "I": 65535}.get(image.mode[0], 255)


def model_input(image: Image.Image, side: int) -> NDArray[np.uint8]:
    """Resizes an image to a square [S, S, 3], whatever its aspect ratio; bicubic with antialiasing."""
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC, reducing_gap=3.0))
