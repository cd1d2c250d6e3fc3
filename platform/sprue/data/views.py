"""The embedded dataset of several views: tiles of two photographs, each seen by three cameras.

A part is a tile of a photograph that comes with scikit-image, turned by an angle of its own and of its own brightness
and contrast. One camera looks at it from above, two look from the sides, in perspective and each in a light of its
own. So the views tell of each other: how bright a part is, and what is to be seen where. A defect lies on the part's
surface, but only some cameras see it, as scratches and stains often show in one light alone; a patch is of the part's
own texture, and so looks as good as any other place to whoever sees it alone. Tiles share no pixel, as in
`sprue.data.textures`.

Shapes: H rows, W columns of a picture.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from skimage import data
from skimage.transform import ProjectiveTransform, warp

from sprue.data.defects import KINDS, draw_defect
from sprue.data.textures import GRID, crop, write_pictures

PARTS = ("brick", "gravel")
VIEWS = ("0-top", "1-left", "2-right")

SIDE = 192  # pixels of a picture's side
TEST_GOOD = 24
DEFECTS_PER_KIND = 8
_TEST_DEFECTIVE = DEFECTS_PER_KIND * len(KINDS)

# From obvious to hard; sizes are dealt to contrasts by chance.
CONTRASTS = np.linspace(1.0, 0.25, DEFECTS_PER_KIND)
SIZES = np.geomspace(0.5, 0.18, DEFECTS_PER_KIND)

TURN = np.deg2rad(8)  # parts lie in one of four directions, at most this far off
SEEN = 1 / (np.cos(TURN) + np.sin(TURN))  # share of a tile's side that stays inside of it, however it is turned
NEAR = 0.8  # what a camera at the side sees of the edge near to it, as a share of the far one
NOISE = 2.0  # grey levels
LEAST_SEEN = 30  # pixels of a defect that a camera sees

Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]


def write_views(root: Path, seed: int = 0) -> None:
    """Writes the two classes in the layout ``mvtec-views``; the same seed gives the same bytes.

    Each class has 88 samples in ``train/good``, 24 in ``test/good`` and 8 of each kind of defect, with masks for the
    views that show it. A sample is three grey PNG files of 192 x 192 pixels in a folder that is named after the row
    and column of its tile in the photograph.

    Args:
        root: Folder to make; it must not exist.
        seed: Deals the tiles to their roles, places parts and cameras, and draws the defects.

    Raises:
        SprueError: ``root`` exists.
    """
    write_pictures(root, _pictures(seed))


@dataclass(frozen=True)
class _Scene:
    """A part and the three cameras that look at it.

    Attributes:
        surface_HW: The part's surface.
        brightness: Grey levels that the part is brighter than others.
        contrast: Of the part, as a multiple of others'.
        cameras: Where on the surface each pixel of a view lies.
    """

    surface_HW: Pixels
    brightness: float
    contrast: float
    cameras: dict[str, ProjectiveTransform]

    @classmethod
    def set_up(cls, surface_HW: Pixels, rng: np.random.Generator) -> "_Scene":
        turn = float(rng.integers(4) * np.pi / 2 + rng.uniform(-TURN, TURN))
        cameras = {view: _camera(view, turn, len(surface_HW), rng) for view in VIEWS}
        return cls(surface_HW, float(rng.normal(0, 15)), float(np.exp(rng.normal(0, 0.15))), cameras)

    def photograph(self, view: str, surface_HW: Pixels, rng: np.random.Generator) -> Pixels:
        """The picture of a surface, in the view's own light and with noise of its own."""
        across_W = np.linspace(-1, 1, SIDE)
        light_W = {"0-top": 1 + 0 * across_W, "1-left": 1 - 0.25 * across_W, "2-right": 0.85 + 0.2 * across_W}[view]
        seen_HW = 128 + self.contrast * (self._seen(view, surface_HW) - 128) + self.brightness
        exposed_HW = seen_HW * light_W * rng.normal(1, 0.01) + rng.normal(0, NOISE, (SIDE, SIDE))
        return np.clip(np.rint(exposed_HW), 0, 255).astype(np.uint8)

    def mask(self, view: str, mask_HW: Mask) -> Mask:
        """Where a view shows what is masked on the surface."""
        return self._seen(view, mask_HW) >= 0.5

    def _seen(self, view: str, surface_HW: Pixels | Mask) -> NDArray[np.float64]:
        seen_HW = warp(
            surface_HW.astype(np.float64), self.cameras[view], order=1, mode="edge", output_shape=(SIDE, SIDE)
        )
        return np.asarray(seen_HW, np.float64)


def _camera(view: str, turn: float, side: int, rng: np.random.Generator) -> ProjectiveTransform:
    """From a view's pixels to those of a surface of some side; no two shots are from quite the same place."""
    corners = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], float)
    seen = SEEN * corners * rng.uniform(0.97, 1, (4, 1))
    if view != "0-top":
        near = corners[:, 0] < 0 if view == "1-left" else corners[:, 0] > 0
        seen[near, 1] *= NEAR
    cosine, sine = np.cos(turn), np.sin(turn)
    turned = seen @ np.array([(cosine, sine), (-sine, cosine)])
    return ProjectiveTransform.from_estimate((SIDE - 1) / 2 * (1 + corners), (side - 1) / 2 * (1 + turned))


def _pictures(seed: int) -> Iterator[tuple[str, Pixels]]:
    """Path and pixels of every file of the dataset."""
    for number, part in enumerate(PARTS):
        rng = np.random.default_rng([seed, number])
        photograph_HW = getattr(data, part)()
        tiles = [(int(tile) // GRID, int(tile) % GRID) for tile in rng.permutation(GRID * GRID)]
        defective, good, train = np.split(tiles, [_TEST_DEFECTIVE, _TEST_DEFECTIVE + TEST_GOOD])
        for role, chosen in (("train/good", train), ("test/good", good)):
            for tile in chosen:
                scene = _Scene.set_up(crop(photograph_HW, tile), rng)
                for view in VIEWS:
                    yield f"{part}/{role}/{_name(tile)}/{view}.png", scene.photograph(view, scene.surface_HW, rng)
        for kind, of_kind in zip(KINDS, np.split(defective, len(KINDS)), strict=True):
            for tile, contrast, size in zip(of_kind, CONTRASTS, rng.permutation(SIZES), strict=True):
                scene = _Scene.set_up(crop(photograph_HW, tile), rng)
                for folder, name, picture_HW in _defective(scene, kind, contrast, size, rng):
                    yield f"{part}/{folder}/{kind}/{_name(tile)}/{name}.png", picture_HW


def _defective(
    scene: _Scene, kind: str, contrast: float, size: float, rng: np.random.Generator
) -> Iterator[tuple[str, str, Pixels]]:
    """Folder, name and pixels of the pictures of a part with a defect that one or two cameras see, and of the masks."""
    masks: dict[str, Mask] = {}
    while not masks:  # some places lie outside of every view
        surface_HW1, mask_HW = draw_defect(scene.surface_HW[:, :, None], kind, rng, contrast, size)
        shown = {view: scene.mask(view, mask_HW) for view in VIEWS}
        able = [view for view in VIEWS if shown[view].sum() >= LEAST_SEEN]
        masks = {view: shown[view] for view in rng.permutation(able)[: rng.integers(1, 3)]}
    for view in VIEWS:
        surface_HW = surface_HW1[:, :, 0] if view in masks else scene.surface_HW
        yield "test", view, scene.photograph(view, surface_HW, rng)
        if view in masks:
            yield "ground_truth", f"{view}_mask", masks[view].astype(np.uint8) * 255


def _name(tile: NDArray[np.int64]) -> str:
    return f"r{tile[0]:02d}c{tile[1]:02d}"
