"""The embedded dataset: crops of three photographs, with synthetic defects in some of the test crops.

The photographs brick, grass and gravel come with scikit-image. Each is cut into tiles that share no pixel. A tile
becomes one image, so no region of a photograph is in two splits.

Shapes: H rows, W columns, C channels of an image.
"""

import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from skimage import data

from sprue.data.layouts import GOOD
from sprue.data.synthetic import KINDS, synthesize_defect
from sprue.errors import SprueError

TEXTURES = ("brick", "grass", "gravel")

GRID = 12
"""Tiles along a side of a photograph."""

TILE = 42
"""Side of a tile, in pixels of the photograph."""

SCALE = 5
"""Pixels of an image for each pixel of the photograph, in both directions."""


class Tile(NamedTuple):
    """A tile's place in the grid, and its role: a good part, or one with a defect of a kind, contrast and size."""

    row: int
    column: int
    split: str
    kind: str = GOOD
    contrast: float | None = None
    size: float | None = None

    @property
    def name(self) -> str:
        """The name of its files."""
        return f"r{self.row:02d}c{self.column:02d}"


def assign_tiles(rng: np.random.Generator, test_good: int, defects_per_kind: int) -> Iterator[Tile]:
    """Assigns each tile of a photograph to training, to the good test parts or to a kind of defect, at random.

    The defects of a kind go from obvious to hard. Sizes are assigned to contrasts at random, so a faint defect may be a
    large one.
    """
    places = [divmod(int(number), GRID) for number in rng.permutation(GRID * GRID)]
    defective = defects_per_kind * len(KINDS)
    for place in places[defective + test_good :]:
        yield Tile(*place, "train")
    for place in places[defective : defective + test_good]:
        yield Tile(*place, "test")
    contrasts, sizes = np.linspace(1.0, 0.25, defects_per_kind), np.geomspace(0.5, 0.18, defects_per_kind)
    for first, kind in zip(range(0, defective, defects_per_kind), KINDS, strict=True):
        of_kind = places[first : first + defects_per_kind]
        for place, contrast, size in zip(of_kind, contrasts, rng.permutation(sizes), strict=True):
            yield Tile(*place, "test", kind, contrast, size)


def write_textures(root: Path, seed: int = 0) -> None:
    """Writes the three classes in MVTec's layout; the same seed gives the same bytes.

    Each class has 104 images in ``train/good``, 16 in ``test/good`` and 6 of each kind of defect with masks,
    grey PNG files of 210 x 210 pixels, named after the row and column of their tile in the photograph.

    Raises:
        SprueError: If ``root`` exists.
    """
    write_images(root, _images(seed))


def write_images(root: Path, images: Iterable[tuple[str, NDArray[np.uint8]]]) -> None:
    """Writes a folder of images atomically, from the path below it and the pixels of each.

    Raises:
        SprueError: If ``root`` exists.
    """
    if root.exists():
        raise SprueError(f"{root} exists already: remove it or give another folder for the images")
    temporary = root.with_name(f".{root.name}.{os.getpid()}")
    try:
        for path, image_HW in images:
            file = temporary / path
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image_HW).save(file)
        temporary.rename(root)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _images(seed: int) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """Path and pixels of every file of the dataset."""
    for number, texture in enumerate(TEXTURES):
        rng = np.random.default_rng([seed, number])
        photograph_HW = getattr(data, texture)()
        others = [getattr(data, other)() for other in TEXTURES if other != texture]
        for tile in assign_tiles(rng, test_good=16, defects_per_kind=6):
            image_HW1 = crop(photograph_HW, tile)[:, :, None]
            if tile.kind != GOOD:
                foreign_HW1 = _foreign(others[rng.integers(len(others))], rng)[:, :, None]
                image_HW1, mask_HW = synthesize_defect(image_HW1, tile.kind, rng, tile.contrast, tile.size, foreign_HW1)
                yield f"{texture}/ground_truth/{tile.kind}/{tile.name}_mask.png", mask_HW.astype(np.uint8) * 255
            yield f"{texture}/{tile.split}/{tile.kind}/{tile.name}.png", image_HW1[:, :, 0]


def crop(photograph_HW: NDArray[np.uint8], tile: Tile) -> NDArray[np.uint8]:
    """One tile, enlarged after it was cut, so that its pixels depend on no other tile."""
    top, left = tile.row * TILE, tile.column * TILE
    return _enlarge(photograph_HW[top : top + TILE, left : left + TILE])


def _foreign(photograph_HW: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """A random piece of another photograph, finer than the tiles: at their scale grass and gravel look alike."""
    side = TILE * SCALE // 2
    top, left = rng.integers(0, photograph_HW.shape[0] - side, size=2)
    return _enlarge(photograph_HW[top : top + side, left : left + side])


def _enlarge(piece_HW: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(piece_HW).resize((TILE * SCALE, TILE * SCALE), Image.Resampling.BICUBIC))
