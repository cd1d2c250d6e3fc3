"""The embedded dataset of several views: tiles of two photographs, each seen by three cameras.

A part is a tile of a photograph that comes with scikit-image, with its own rotation, brightness and contrast. One
camera sees it from above, two see it from the sides, in perspective and each in its own light. So the views depend on
each other: they share the part's brightness and its texture. A defect lies on the part's surface, but only some
cameras see it, because scratches and stains often show in one light alone. A patch has the part's own texture, so it
looks normal in a single view. Tiles share no pixel, as in `sprue.demo.textures`.

Shapes: H rows, W columns of an image.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from skimage import data
from skimage.transform import ProjectiveTransform, warp

from sprue.data.layouts import GOOD
from sprue.data.synthetic import synthesize_defect
from sprue.demo.textures import Tile, assign_tiles, crop, write_images

PARTS = ("brick", "gravel")
VIEWS = ("0-top", "1-left", "2-right")

SIDE = 192
"""Side of an image, in pixels."""

TURN = np.deg2rad(8)
"""Parts lie in one of four directions, up to this angle off."""

SEEN = 1 / (np.cos(TURN) + np.sin(TURN))
"""Fraction of a tile's side that the cameras see, so that they see nothing beyond the tile."""

NEAR = 0.8
"""Length that a side camera sees of the near edge, as a fraction of that of the far edge."""

NOISE = 2.0
"""Standard deviation, in grey levels."""

LEAST_SEEN = 30
"""Fewest pixels with which a defect counts as seen by a camera."""

Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]


def write_views(root: Path, seed: int = 0) -> None:
    """Writes the two classes in the layout ``mvtec-views``; the same seed gives the same bytes.

    Each class has 88 samples in ``train/good``, 24 in ``test/good`` and 8 of each kind of defect, with masks for the
    views that show it. A sample is three grey PNG files of 192 x 192 pixels in a folder that is named after the row
    and column of its tile in the photograph.

    Raises:
        SprueError: If ``root`` exists.
    """
    write_images(root, _images(seed))


class _Scene:
    """A part with its own brightness and contrast, and the three cameras that see it."""

    def __init__(self, surface_HW: Pixels, rng: np.random.Generator) -> None:
        self.surface_HW = surface_HW
        turn = float(rng.integers(4) * np.pi / 2 + rng.uniform(-TURN, TURN))
        self.cameras = {view: _camera(view, turn, len(surface_HW), rng) for view in VIEWS}
        self.brightness, self.contrast = float(rng.normal(0, 15)), float(np.exp(rng.normal(0, 0.15)))

    def photograph(self, view: str, surface_HW: Pixels, rng: np.random.Generator) -> Pixels:
        """The image of a surface, in the view's light and with noise."""
        across_W = np.linspace(-1, 1, SIDE)
        light_W = {"0-top": 1 + 0 * across_W, "1-left": 1 - 0.25 * across_W, "2-right": 0.85 + 0.2 * across_W}[view]
        seen_HW = 128 + self.contrast * (self._seen(view, surface_HW) - 128) + self.brightness
        exposed_HW = seen_HW * light_W * rng.normal(1, 0.01) + rng.normal(0, NOISE, (SIDE, SIDE))
        return np.clip(np.rint(exposed_HW), 0, 255).astype(np.uint8)

    def mask(self, view: str, mask_HW: Mask) -> Mask:
        """The surface's mask as a view sees it."""
        return self._seen(view, mask_HW) >= 0.5

    def _seen(self, view: str, surface_HW: Pixels | Mask) -> NDArray[np.float64]:
        seen_HW = warp(
            surface_HW.astype(np.float64), self.cameras[view], order=1, mode="edge", output_shape=(SIDE, SIDE)
        )
        return np.asarray(seen_HW, np.float64)


def _camera(view: str, turn: float, side: int, rng: np.random.Generator) -> ProjectiveTransform:
    """Maps a view's pixels to those of a surface with this side; the camera's position varies a little."""
    corners = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], float)
    seen = SEEN * corners * rng.uniform(0.97, 1, (4, 1))
    if view != "0-top":
        near = corners[:, 0] < 0 if view == "1-left" else corners[:, 0] > 0
        seen[near, 1] *= NEAR
    cosine, sine = np.cos(turn), np.sin(turn)
    turned = seen @ np.array([(cosine, sine), (-sine, cosine)])
    return ProjectiveTransform.from_estimate((SIDE - 1) / 2 * (1 + corners), (side - 1) / 2 * (1 + turned))


def _images(seed: int) -> Iterator[tuple[str, Pixels]]:
    """Path and pixels of every file of the dataset."""
    for number, part in enumerate(PARTS):
        rng = np.random.default_rng([seed, number])
        photograph_HW = getattr(data, part)()
        for tile in assign_tiles(rng, test_good=24, defects_per_kind=8):
            scene = _Scene(crop(photograph_HW, tile), rng)
            for folder, name, image_HW in _photographs(scene, tile, rng):
                yield f"{part}/{folder}/{tile.kind}/{tile.name}/{name}.png", image_HW


def _photographs(scene: _Scene, tile: Tile, rng: np.random.Generator) -> Iterator[tuple[str, str, Pixels]]:
    """Folder, name and pixels of a part's images and masks; one or two cameras see the defect, if it has one."""
    good_HW1 = altered_HW1 = scene.surface_HW[:, :, None]
    masks: dict[str, Mask] = {}
    while tile.kind != GOOD and not masks:  # some defects lie outside of all views
        altered_HW1, mask_HW = synthesize_defect(good_HW1, tile.kind, rng, tile.contrast, tile.size)
        shown = {view: scene.mask(view, mask_HW) for view in VIEWS}
        able = [view for view in VIEWS if shown[view].sum() >= LEAST_SEEN]
        masks = {view: shown[view] for view in rng.permutation(able)[: rng.integers(1, 3)]}
    for view in VIEWS:
        surface_HW1 = altered_HW1 if view in masks else good_HW1
        yield tile.split, view, scene.photograph(view, surface_HW1[:, :, 0], rng)
        if view in masks:
            yield "ground_truth", f"{view}_mask", masks[view].astype(np.uint8) * 255
