"""Converts images of any size and mode to what a backbone reads.

Shapes: H rows, W columns, C = 3 channels; S the side of the square input.
"""

import io
import struct
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

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
        UnreadableImageError: If the data is truncated or damaged.

    >>> open_image(b"text", "part.png")
    Traceback (most recent call last):
    ...
    sprue.inference.images.NotAnImageError: part.png is not an image (PNG, JPEG, BMP, TIFF, WEBP, PPM, GIF are read)
    """
    try:
        with warnings.catch_warnings():
            # `max_pixels` decides; Pillow warns at a limit of its own.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            # Decoding does not check a PNG's checksums. Verifying does, and leaves its image unusable.
            Image.open(io.BytesIO(data), formats=FORMATS).verify()
        if image.width * image.height > max_pixels:
            raise ImageTooLargeError(
                f"{name} has {image.width} x {image.height} pixels; at most {max_pixels:,} are read"
            )
        image.load()
        return _eight_bit(image).convert("RGB")
    except UnidentifiedImageError as error:
        raise NotAnImageError(f"{name} is not an image ({', '.join(FORMATS)} are read)") from error
    except Image.DecompressionBombError as error:
        raise ImageTooLargeError(f"{name} states more pixels than are read: {error}") from error
    except DAMAGE as error:
        raise UnreadableImageError(f"{name} is damaged: {error}") from error


def _eight_bit(image: Image.Image) -> Image.Image:
    """Converts 16-bit and float greyscale to 8 bits, where Pillow would clip at 255."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.mode == "F":
        values = np.nan_to_num(np.asarray(image))
        scale = 255.0 if values.max(initial=0.0) <= 1.0 else 1.0
        return Image.fromarray((values * scale).clip(0, 255).astype(np.uint8))
    return image


def model_input(image: Image.Image, side: int) -> NDArray[np.uint8]:
    """Resizes an image to a square [S, S, 3], whatever its aspect ratio; bicubic with antialiasing."""
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC, reducing_gap=3.0))
