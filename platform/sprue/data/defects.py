"""Drawn defects: scratches, stains, holes and foreign patches of irregular shape.

They validate a detector where no defective picture is known, and make the test pictures of the embedded
textures. Shapes in names: H rows, W columns, C channels; opacities are in [0, 1].
"""

import math

import numpy as np
from numpy.typing import NDArray
from skimage.draw import polygon2mask
from skimage.filters import gaussian
from skimage.morphology import closing, disk, remove_small_holes, remove_small_objects
from skimage.transform import downscale_local_mean, resize

from sprue.errors import SprueError

KINDS = ("scratch", "stain", "hole", "patch")

# A change of fewer grey levels is not seen, so it is not drawn either.
VISIBLE_LEVELS = 4
MINIMUM_SIDE = 32
_MINIMUM_AREA = 12
_ATTEMPTS = 10
_OVERSAMPLING = 3
_LARGEST_DRAWN = 300

Pixels = NDArray[np.uint8]
Field = NDArray[np.float64]


def draw_defect(
    image_HWC: Pixels,
    kind: str,
    rng: np.random.Generator,
    contrast: float | None = None,
    size: float | None = None,
    foreign_HWC: Pixels | None = None,
) -> tuple[Pixels, NDArray[np.bool_]]:
    """Draws one defect at a random place.

    Args:
        image_HWC: The good picture, any number of channels, at least 32 pixels a side; left as it is.
        kind: One of ``KINDS``.
        rng: Source of place, shape, orientation and polarity.
        contrast: From 0 (faint) to 1 (strong), seen against the texture; drawn from [0.25, 1] if not given.
        size: Extent as a fraction of the picture's shorter side, in (0, 1]; drawn from [0.08, 0.35], small ones
            more often, if not given.
        foreign_HWC: Texture that a patch is cut from; the picture itself, shifted and flipped, if not given
            (CutPaste, Li et al., CVPR 2021).

    Returns:
        A copy of the picture that differs inside the mask only, and the mask (H, W) of the visibly changed pixels,
        which is never empty.

    Raises:
        SprueError: The kind is unknown, or the picture, contrast or size is out of range.

    >>> rng = np.random.default_rng(0)
    >>> image, mask = draw_defect(np.full((64, 64, 1), 128, np.uint8), "scratch", rng)
    >>> image.shape, mask.shape, bool(mask.any())
    ((64, 64, 1), (64, 64), True)
    """
    contrast = float(rng.uniform(0.25, 1)) if contrast is None else contrast
    size = float(np.exp(rng.uniform(np.log(0.08), np.log(0.35)))) if size is None else size
    _check(image_HWC, kind, contrast, size)
    for _ in range(_ATTEMPTS):
        result_HWC, mask_HW = _draw(image_HWC, kind, rng, contrast, size, foreign_HWC)
        if mask_HW.sum() >= _MINIMUM_AREA:
            return result_HWC, mask_HW
        # Too faint, too small or mostly outside of the picture: try elsewhere and more clearly.
        contrast, size = min(1.0, 1.2 * contrast + 0.1), min(1.0, 1.2 * size)
    raise SprueError(f"No visible {kind} could be drawn into a picture of {image_HWC.shape}: give another one.")


def _check(image_HWC: Pixels, kind: str, contrast: float, size: float) -> None:
    if kind not in KINDS:
        raise SprueError(f"Defect kind {kind!r} is unknown: choose one of {', '.join(KINDS)}.")
    if image_HWC.ndim != 3 or image_HWC.dtype != np.uint8 or min(image_HWC.shape[:2]) < MINIMUM_SIDE:
        raise SprueError(
            f"A defect is drawn into uint8 pictures (H, W, C) of at least {MINIMUM_SIDE} pixels a side, "
            f"not into {image_HWC.dtype} {image_HWC.shape}."
        )
    if not 0 <= contrast <= 1:
        raise SprueError(f"contrast is {contrast}: give a number from 0 to 1.")
    if not 0 < size <= 1:
        raise SprueError(f"size is {size}: give a fraction of the picture's shorter side, above 0 and at most 1.")


def _draw(
    image_HWC: Pixels, kind: str, rng: np.random.Generator, contrast: float, size: float, foreign_HWC: Pixels | None
) -> tuple[Pixels, NDArray[np.bool_]]:
    extent = max(6, round(size * min(image_HWC.shape[:2])))
    opacity_HW, box = _place(_draw_shape(kind, extent, rng), image_HWC.shape[:2], rng)
    original_HWC = image_HWC[box].astype(np.float64)
    foreign_patch_HWC = _cut(image_HWC if foreign_HWC is None else foreign_HWC, original_HWC.shape, rng)
    painted_HWC = _paint(kind, original_HWC, opacity_HW, contrast, foreign_patch_HWC, rng)
    altered_HWC = np.clip(np.rint(painted_HWC), 0, 255).astype(np.uint8)
    mask_HW = _visible(np.abs(altered_HWC - original_HWC).max(axis=2) >= VISIBLE_LEVELS)
    result_HWC, result_mask_HW = image_HWC.copy(), np.zeros(image_HWC.shape[:2], np.bool_)
    result_HWC[box][mask_HW] = altered_HWC[mask_HW]
    result_mask_HW[box] = mask_HW
    return result_HWC, result_mask_HW


def _draw_shape(kind: str, extent: int, rng: np.random.Generator) -> Field:
    """Opacity of the defect on a square canvas that is half as wide again as the defect."""
    if kind == "scratch":
        extent = round(1.5 * extent)  # long for its area
    # Large defects are drawn smaller and enlarged: wide smoothing is slow, and they have no finer detail.
    drawn = min(extent, _LARGEST_DRAWN)
    side = math.ceil(1.5 * drawn)
    if kind == "scratch":
        opacity_HW = _stroke(side, drawn, rng)
    else:
        roughness = {"stain": 0.45, "hole": 0.2, "patch": 0.3}[kind]
        softness = {"stain": 0.35, "hole": 0.25, "patch": 0.3}[kind]
        opacity_HW = _blob(side, drawn, roughness, softness, rng)
    if drawn == extent:
        return opacity_HW
    return np.asarray(resize(opacity_HW, (math.ceil(1.5 * extent),) * 2, order=1), np.float64)


def _stroke(side: int, extent: int, rng: np.random.Generator) -> Field:
    """A bent line of varying width with tapered ends, in places interrupted."""
    points = 48
    heading = (
        rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, 0.06, points)) + np.linspace(0, rng.normal(0, 0.9), points)
    )
    line = np.cumsum(np.stack([np.sin(heading), np.cos(heading)], axis=1), axis=0) * extent / points
    line += side / 2 - (line.min(axis=0) + line.max(axis=0)) / 2
    taper = np.sin(np.linspace(0.12, np.pi - 0.12, points)) ** 0.3
    jitter = 1 + 0.5 * _smooth(rng.standard_normal(points), 3)
    half_width = (rng.uniform(0.004, 0.016) * extent + 0.6) * taper * np.clip(jitter, 0.3, 2)
    normal = np.stack([np.cos(heading), -np.sin(heading)], axis=1) * half_width[:, None]
    outline = np.concatenate([line + normal, (line - normal)[::-1]])
    fine = polygon2mask((side * _OVERSAMPLING, side * _OVERSAMPLING), outline * _OVERSAMPLING)
    opacity_HW = gaussian(downscale_local_mean(fine.astype(np.float64), _OVERSAMPLING), sigma=0.6)
    worn_HW = np.clip(0.9 + 0.5 * _smooth(rng.standard_normal((side, side)), side / 12), 0.1, 1)
    return np.clip(opacity_HW * worn_HW, 0, 1)


def _blob(side: int, extent: int, roughness: float, softness: float, rng: np.random.Generator) -> Field:
    """A turned ellipse with a ragged, feathered border."""
    y, x = (np.mgrid[:side, :side] - (side - 1) / 2) / (extent / 2)
    angle, aspect = rng.uniform(0, np.pi), rng.uniform(0.4, 1)
    along, across = x * np.cos(angle) + y * np.sin(angle), (y * np.cos(angle) - x * np.sin(angle)) / aspect
    coarse = _smooth(rng.standard_normal((side, side)), side / 9)
    fine = _smooth(rng.standard_normal((side, side)), side / 28)
    depth = 1 - np.hypot(along, across) + roughness * (coarse + 0.35 * fine)
    return np.clip(depth / softness, 0, 1) * np.clip(3 * (1 - np.maximum(abs(x), abs(y)) / 1.45), 0, 1)


def _smooth(noise: Field, sigma: float) -> Field:
    smooth = gaussian(noise, sigma=sigma)
    return (smooth - smooth.mean()) / (smooth.std() + 1e-12)


def _place(opacity_HW: Field, shape: tuple[int, ...], rng: np.random.Generator) -> tuple[Field, tuple[slice, slice]]:
    """Moves the canvas to a random place and cuts off what lies outside of the picture."""
    box, inside = [], []
    for length, side in zip(shape, opacity_HW.shape, strict=True):
        start = math.floor(rng.uniform(0.08, 0.92) * length - side / 2)
        first, last = max(start, 0), min(start + side, length)
        box.append(slice(first, last))
        inside.append(slice(first - start, last - start))
    return opacity_HW[inside[0], inside[1]], (box[0], box[1])


def _cut(texture_HWC: Pixels, shape: tuple[int, ...], rng: np.random.Generator) -> Field:
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


def _paint(
    kind: str, original_HWC: Field, opacity_HW: Field, contrast: float, foreign_HWC: Field, rng: np.random.Generator
) -> Field:
    opacity_HW1 = opacity_HW[:, :, None]
    level = float((original_HWC * opacity_HW1).sum() / max(opacity_HW1.sum() * original_HWC.shape[2], 1e-9))
    sign = _polarity(level, rng)
    strength = _strength(original_HWC, contrast)
    if kind == "scratch":
        return original_HWC + sign * (10 + 75 * strength) * opacity_HW1
    if kind == "stain":
        # What lies under a stain stays visible: dark ones absorb, light ones cover like dust.
        tint_C: Field = rng.uniform(0.7, 1, (original_HWC.shape[2],))
        if not np.ptp(original_HWC, axis=2).any():
            tint_C[:] = tint_C.mean()  # a grey picture stays grey, however many channels it is stored with
        cover_HWC = (0.12 + 0.63 * strength) * opacity_HW1 * tint_C
        return original_HWC * (1 - cover_HWC) + (255 * cover_HWC if sign > 0 else 0)
    if kind == "hole":
        bottom = level * (1 - 0.25 - 0.65 * strength) if sign < 0 else level + (255 - level) * (0.2 + 0.6 * strength)
        rim_HW = np.gradient(opacity_HW, axis=int(rng.integers(0, 2))) if min(opacity_HW.shape) > 1 else 0 * opacity_HW
        filled_HWC = original_HWC * (1 - opacity_HW1) + (bottom + 0.15 * (original_HWC - level)) * opacity_HW1
        return filled_HWC + 140 * strength * rim_HW[:, :, None]
    # A patch of about the same brightness differs by its texture alone; the offset keeps it from vanishing.
    offset = sign * (6 + 24 * strength) * rng.uniform(0.3, 1) + level - foreign_HWC.mean()
    return original_HWC + (0.5 + 0.5 * strength) * opacity_HW1 * (foreign_HWC + offset - original_HWC)


def _strength(original_HWC: Field, contrast: float) -> float:
    """Contrast raised where the texture is busy, which hides changes that show on a plain surface."""
    busyness = min(float(original_HWC.mean(axis=2).std()) / 32, 1)
    return min(contrast * (0.45 + 0.55 * busyness) + 0.15 * busyness, 1)


def _polarity(level: float, rng: np.random.Generator) -> int:
    """1 to brighten, -1 to darken: by chance, but away from the end of the scale that is near."""
    return 1 if rng.uniform(60, 195) > level else -1


def _visible(changed_HW: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Closes pinholes, where the drawn value happens to be the old one, and drops specks."""
    area = int(changed_HW.sum())
    closed_HW = closing(np.pad(changed_HW, 2), disk(2))[2:-2, 2:-2]
    whole_HW = remove_small_holes(closed_HW, max_size=area // 4)
    return np.asarray(remove_small_objects(whole_HW, max_size=max(3, area // 10)), np.bool_)
