"""Synthetic defects: scratches, stains, holes and foreign patches of irregular shape.

They validate a detector where no defective image is known, and appear in the embedded datasets.

Shapes: H rows, W columns, C channels. Opacities are in [0, 1].
"""

import numpy as np
from numpy.typing import NDArray
from skimage.draw import polygon2mask
from skimage.filters import gaussian
from skimage.transform import downscale_local_mean

from sprue.data.defect_shapes import Field, Pixels, blob, canvas, cut, positioned, smooth, visible
from sprue.errors import SprueError

VERSION = 1
"""Changes when a synthetic defect's pixels change."""

KINDS = ("scratch", "stain", "hole", "patch")

VISIBLE_LEVELS = 4
"""Pixels that would change by fewer grey levels, invisibly, are not changed."""

MINIMUM_SIDE = 32
"""Of an image, in pixels."""

_MINIMUM_AREA = 12
_ATTEMPTS = 10
_OVERSAMPLING = 3


def synthesize_defect(
    image_HWC: Pixels,
    kind: str,
    rng: np.random.Generator,
    contrast: float | None = None,
    size: float | None = None,
    foreign_HWC: Pixels | None = None,
) -> tuple[Pixels, NDArray[np.bool_]]:
    """Renders one defect at a random position.

    Args:
        image_HWC: The good image, with any number of channels and at least 32 pixels a side; not changed.
        kind: One of ``KINDS``.
        rng: Source of position, shape, orientation and polarity.
        contrast: From 0 (faint) to 1 (strong), relative to the texture; if None, uniform in [0.25, 1].
        size: Extent as a fraction of the image's shorter side, in (0, 1]; if None, log-uniform in [0.08, 0.35].
        foreign_HWC: Texture that a patch is cut from; if None, the image itself, shifted and flipped (CutPaste, Li et
            al., CVPR 2021).

    Returns:
        A copy of the image that differs inside the mask only, and the mask (H, W) of the visibly changed pixels,
        which is never empty.

    Raises:
        SprueError: If the kind is unknown, or the image, contrast or size is out of range.

    >>> rng = np.random.default_rng(0)
    >>> image, mask = synthesize_defect(np.full((64, 64, 1), 128, np.uint8), "scratch", rng)
    >>> image.shape, mask.shape, bool(mask.any())
    ((64, 64, 1), (64, 64), True)
    """
    contrast = float(rng.uniform(0.25, 1)) if contrast is None else contrast
    size = float(np.exp(rng.uniform(np.log(0.08), np.log(0.35)))) if size is None else size
    _check(image_HWC, kind, contrast, size)
    for _ in range(_ATTEMPTS):
        result_HWC, mask_HW = _render(image_HWC, kind, rng, contrast, size, foreign_HWC)
        if mask_HW.sum() >= _MINIMUM_AREA:
            return result_HWC, mask_HW
        # Too faint, too small or mostly outside of the image: try another position, with a stronger defect.
        contrast, size = min(1.0, 1.2 * contrast + 0.1), min(1.0, 1.2 * size)
    raise SprueError(f"no visible {kind} fits into an image of {image_HWC.shape}; give another image")


def _check(image_HWC: Pixels, kind: str, contrast: float, size: float) -> None:
    if kind not in KINDS:
        raise SprueError(f"defect kind {kind!r} is unknown: choose one of {', '.join(KINDS)}")
    if image_HWC.ndim != 3 or image_HWC.dtype != np.uint8 or min(image_HWC.shape[:2]) < MINIMUM_SIDE:
        raise SprueError(
            f"a defect needs a uint8 image (H, W, C) of at least {MINIMUM_SIDE} pixels a side, "
            f"not {image_HWC.dtype} {image_HWC.shape}"
        )
    if not 0 <= contrast <= 1:
        raise SprueError(f"contrast is {contrast}: give a number from 0 to 1")
    if not 0 < size <= 1:
        raise SprueError(f"size is {size}: give a fraction of the image's shorter side, above 0 and at most 1")


def _render(
    image_HWC: Pixels, kind: str, rng: np.random.Generator, contrast: float, size: float, foreign_HWC: Pixels | None
) -> tuple[Pixels, NDArray[np.bool_]]:
    extent = max(6, round(size * min(image_HWC.shape[:2])))
    opacity_HW, box = positioned(_shape(kind, extent, rng), image_HWC.shape[:2], rng)
    original_HWC = image_HWC[box].astype(np.float64)
    foreign_patch_HWC = cut(image_HWC if foreign_HWC is None else foreign_HWC, original_HWC.shape, rng)
    painted_HWC = _paint(kind, original_HWC, opacity_HW, contrast, foreign_patch_HWC, rng)
    altered_HWC = np.clip(np.rint(painted_HWC), 0, 255).astype(np.uint8)
    mask_HW = visible(np.abs(altered_HWC - original_HWC).max(axis=2) >= VISIBLE_LEVELS)
    result_HWC, result_mask_HW = image_HWC.copy(), np.zeros(image_HWC.shape[:2], np.bool_)
    result_HWC[box][mask_HW] = altered_HWC[mask_HW]
    result_mask_HW[box] = mask_HW
    return result_HWC, result_mask_HW


def _shape(kind: str, extent: int, rng: np.random.Generator) -> Field:
    """Opacity of the defect on its canvas."""
    if kind == "scratch":
        return canvas(round(1.5 * extent), lambda side, rendered: _stroke(side, rendered, rng))  # long for its area
    roughness = {"stain": 0.45, "hole": 0.2, "patch": 0.3}[kind]
    softness = {"stain": 0.35, "hole": 0.25, "patch": 0.3}[kind]
    return canvas(extent, lambda side, rendered: blob(side, rendered, roughness, softness, rng))


def _stroke(side: int, extent: int, rng: np.random.Generator) -> Field:
    """A bent line of varying width with tapered ends and gaps."""
    points = 48
    heading = (
        rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, 0.06, points)) + np.linspace(0, rng.normal(0, 0.9), points)
    )
    line = np.cumsum(np.stack([np.sin(heading), np.cos(heading)], axis=1), axis=0) * extent / points
    line += side / 2 - (line.min(axis=0) + line.max(axis=0)) / 2
    taper = np.sin(np.linspace(0.12, np.pi - 0.12, points)) ** 0.3
    jitter = 1 + 0.5 * smooth(rng.standard_normal(points), 3)
    half_width = (rng.uniform(0.004, 0.016) * extent + 0.6) * taper * np.clip(jitter, 0.3, 2)
    normal = np.stack([np.cos(heading), -np.sin(heading)], axis=1) * half_width[:, None]
    outline = np.concatenate([line + normal, (line - normal)[::-1]])
    fine = polygon2mask((side * _OVERSAMPLING, side * _OVERSAMPLING), outline * _OVERSAMPLING)
    opacity_HW = gaussian(downscale_local_mean(fine.astype(np.float64), _OVERSAMPLING), sigma=0.6)
    worn_HW = np.clip(0.9 + 0.5 * smooth(rng.standard_normal((side, side)), side / 12), 0.1, 1)
    return np.clip(opacity_HW * worn_HW, 0, 1)


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
        # The texture under a stain stays visible: dark stains absorb, light ones cover like dust.
        tint_C: Field = rng.uniform(0.7, 1, (original_HWC.shape[2],))
        if not np.ptp(original_HWC, axis=2).any():
            tint_C[:] = tint_C.mean()  # a grey image stays grey, however many channels it is stored with
        cover_HWC = (0.12 + 0.63 * strength) * opacity_HW1 * tint_C
        return original_HWC * (1 - cover_HWC) + (255 * cover_HWC if sign > 0 else 0)
    if kind == "hole":
        bottom = level * (1 - 0.25 - 0.65 * strength) if sign < 0 else level + (255 - level) * (0.2 + 0.6 * strength)
        rim_HW = np.gradient(opacity_HW, axis=int(rng.integers(0, 2))) if min(opacity_HW.shape) > 1 else 0 * opacity_HW
        filled_HWC = original_HWC * (1 - opacity_HW1) + (bottom + 0.15 * (original_HWC - level)) * opacity_HW1
        return filled_HWC + 140 * strength * rim_HW[:, :, None]
    # A patch of about the same brightness would differ by its texture alone, so an offset keeps it visible.
    offset = sign * (6 + 24 * strength) * rng.uniform(0.3, 1) + level - foreign_HWC.mean()
    return original_HWC + (0.5 + 0.5 * strength) * opacity_HW1 * (foreign_HWC + offset - original_HWC)


def _strength(original_HWC: Field, contrast: float) -> float:
    """Contrast, raised where the texture is busy and would hide changes that show on a plain surface."""
    busyness = min(float(original_HWC.mean(axis=2).std()) / 32, 1)
    return min(contrast * (0.45 + 0.55 * busyness) + 0.15 * busyness, 1)


def _polarity(level: float, rng: np.random.Generator) -> int:
    """1 to brighten, -1 to darken; random, with a preference for the farther end of the grey scale."""
    return 1 if rng.uniform(60, 195) > level else -1
