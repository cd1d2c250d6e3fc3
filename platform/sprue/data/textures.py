"""The embedded dataset: crops of three photographs, with drawn defects in some of the test crops.

The photographs brick, grass and gravel come with scikit-image. Each is cut into tiles that share no pixel, and a
tile becomes one picture of one role, so whatever the splits make of the training pictures, no region of a
photograph is in two splits.
"""

import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from skimage import data

from sprue.data.defects import KINDS, draw_defect
from sprue.errors import SprueError

TEXTURES = ("brick", "grass", "gravel")

GRID = 12  # tiles per side of a photograph
TILE = 42  # pixels of the photograph per side of a tile
SCALE = 5  # pixels written per pixel of the photograph

TEST_GOOD = 16
DEFECTS_PER_KIND = 6
_TEST_DEFECTIVE = DEFECTS_PER_KIND * len(KINDS)

# From obvious to hard; sizes are dealt to contrasts by chance, so a faint defect may be a large one.
CONTRASTS = np.linspace(1.0, 0.25, DEFECTS_PER_KIND)
SIZES = np.geomspace(0.5, 0.18, DEFECTS_PER_KIND)


def write_textures(root: Path, seed: int = 0) -> None:
    """Writes the three classes in MVTec's layout; the same seed gives the same bytes.

    Each class has 104 pictures in ``train/good``, 16 in ``test/good`` and 6 of each kind of defect with masks,
    grey PNG files of 210 x 210 pixels, named after the row and column of their tile in the photograph.

    Args:
        root: Folder to make; it must not exist.
        seed: Deals the tiles to their roles and draws the defects.

    Raises:
        SprueError: ``root`` exists.
    """
    write_pictures(root, _pictures(seed))


def write_pictures(root: Path, pictures: Iterable[tuple[str, NDArray[np.uint8]]]) -> None:
    """Writes a folder of pictures, whole or not at all.

    Args:
        root: Folder to make; it must not exist.
        pictures: Path below the folder and pixels of each.

    Raises:
        SprueError: ``root`` exists.
    """
    if root.exists():
        raise SprueError(f"{root} exists already: remove it or give another folder for the pictures.")
    temporary = root.with_name(f".{root.name}.{os.getpid()}")
    try:
        for path, picture_HW in pictures:
            file = temporary / path
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture_HW).save(file)
        temporary.rename(root)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _pictures(seed: int) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """Path and pixels of every file of the dataset."""
    for number, texture in enumerate(TEXTURES):
        rng = np.random.default_rng([seed, number])
        photograph_HW = getattr(data, texture)()
        others = [getattr(data, other)() for other in TEXTURES if other != texture]
        tiles = [(int(tile) // GRID, int(tile) % GRID) for tile in rng.permutation(GRID * GRID)]
        defective, good, train = np.split(tiles, [_TEST_DEFECTIVE, _TEST_DEFECTIVE + TEST_GOOD])
        for role, chosen in (("train/good", train), ("test/good", good)):
            for tile in chosen:
                yield f"{texture}/{role}/{_name(tile)}.png", crop(photograph_HW, tile)
        for kind, of_kind in zip(KINDS, np.split(defective, len(KINDS)), strict=True):
            for tile, contrast, size in zip(of_kind, CONTRASTS, rng.permutation(SIZES), strict=True):
                foreign_HW = _foreign(others[rng.integers(len(others))], rng)
                image_HWC, mask_HW = draw_defect(
                    crop(photograph_HW, tile)[:, :, None], kind, rng, contrast, size, foreign_HW[:, :, None]
                )
                yield f"{texture}/test/{kind}/{_name(tile)}.png", image_HWC[:, :, 0]
                yield f"{texture}/ground_truth/{kind}/{_name(tile)}_mask.png", mask_HW.astype(np.uint8) * 255


def _name(tile: NDArray[np.int64]) -> str:
    return f"r{tile[0]:02d}c{tile[1]:02d}"


def crop(photograph_HW: NDArray[np.uint8], tile: NDArray[np.int64]) -> NDArray[np.uint8]:
    """One tile, enlarged after it was cut: its pixels come from inside of it alone."""
    top, left = (int(index) * TILE for index in tile)
    cut = Image.fromarray(photograph_HW[top : top + TILE, left : left + TILE])
    return _enlarge(cut)


def _foreign(photograph_HW: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """A random piece of another photograph, finer than the tiles: at their scale grass and gravel look alike."""
    side = TILE * SCALE // 2
    top, left = rng.integers(0, photograph_HW.shape[0] - side, size=2)
    return _enlarge(Image.fromarray(photograph_HW[top : top + side, left : left + side]))


def _enlarge(piece: Image.Image) -> NDArray[np.uint8]:
    return np.asarray(piece.resize((TILE * SCALE, TILE * SCALE), Image.Resampling.BICUBIC))
