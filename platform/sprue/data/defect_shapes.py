"""Shapes and places of synthetic defects.

Shapes: H rows, W columns, C channels. Opacities are in [0, 1].
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from skimage.filters import gaussian
from skimage.morphology import closing, disk, remove_small_holes, remove_small_objects
from skimage.transform import resize

Pixels = NDArray[np.uint8]
Field = NDArray[np.float64]


_LARGEST_RENDERED = 300


def canvas(extent: int, render: Callable[[int, int], Field]) -> Field:
    """Opacity of a shape on a square canvas 1.5 times as wide; `render` takes the sides of the canvas and the shape.

    Large shapes are rendered smaller and enlarged: wide smoothing is slow, and they have no finer detail.
    """
    rendered = min(extent, _LARGEST_RENDERED)
    opacity_HW = render(math.ceil(1.5 * rendered), rendered)
    if rendered == extent:
        return opacity_HW
    return np.asarray(resize(opacity_HW, (math.ceil(1.5 * extent),) * 2, order=1), np.float64)


def blob(side: int, extent: int, roughness: float, softness: float, rng: np.random.Generator) -> Field:
    """A rotated ellipse with a ragged, feathered border."""
    y, x = (np.mgrid[:side, :side] - (side - 1) / 2) / (extent / 2)
    angle, aspect = rng.uniform(0, np.pi), rng.uniform(0.4, 1)
    along, across = x * np.cos(angle) + y * np.sin(angle), (y * np.cos(angle) - x * np.sin(angle)) / aspect
    coarse = smooth(rng.standard_normal((side, side)), side / 9)
    fine = smooth(rng.standard_normal((side, side)), side / 28)
    depth = 1 - np.hypot(along, across) + roughness * (coarse + 0.35 * fine)
    return np.clip(depth / softness, 0, 1) * np.clip(3 * (1 - np.maximum(abs(x), abs(y)) / 1.45), 0, 1)


def smooth(noise: Field, sigma: float) -> Field:
    """Noise of zero mean and unit variance whose structures are `sigma` pixels wide."""
    smooth = gaussian(noise, sigma=sigma)
    return (smooth - smooth.mean()) / (smooth.std() + 1e-12)


def positioned(
    opacity_HW: Field, shape: tuple[int, ...], rng: np.random.Generator
) -> tuple[Field, tuple[slice, slice]]:
    """The part of the canvas that lies in the image, and its box there, for a random position."""
    box, inside = [], []
    for length, side in zip(shape, opacity_HW.shape, strict=True):
        start = math.floor(rng.uniform(0.08, 0.92) * length - side / 2)
        first, last = max(start, 0), min(start + side, length)
        box.append(slice(first, last))
        inside.append(slice(first - start, last - start))
    return opacity_HW[inside[0], inside[1]], (box[0], box[1])


def cut(texture_HWC: Pixels, shape: tuple[int, ...], rng: np.random.Generator) -> Field:
    """A random piece of a texture with the given height, width and channels; mirrored where it is too small."""
    height, width, channels = shape
    missing = [(0, max(0, need - have)) for need, have in zip((height, width), texture_HWC.shape[:2], strict=True)]
    padded_HWC = np.pad(texture_HWC, [*missing, (0, 0)], mode="symmetric")
    top, left = (
        int(rng.integers(0, have - need + 1)) for have, need in zip(padded_HWC.shape, (height, width), strict=False)
    )
    piece_HWC = padded_HWC[top : top + height, left : left + width].astype(np.float64)
    piece_HWC = np.flip(piece_HWC, axis=int(rng.integers(0, 2)))
    if piece_HWC.shape[2] == channels:
        return piece_HWC
    return np.repeat(piece_HWC.mean(axis=2, keepdims=True), channels, axis=2)


def visible(changed_HW: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Closes pinholes, where the new value equals the old one, and removes specks."""
    area = int(changed_HW.sum())
    closed_HW = closing(np.pad(changed_HW, 2), disk(2))[2:-2, 2:-2]
    filled_HW = remove_small_holes(closed_HW, max_size=area // 4)
    return np.asarray(remove_small_objects(filled_HW, max_size=max(3, area // 10)), np.bool_)
