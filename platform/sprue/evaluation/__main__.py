"""All figures of scores and maps in a file, as JSON: ``python -m sprue.evaluation FILE.npz``.

The file holds ``scores_N`` and ``labels_N`` (0 or 1), and may hold ``maps_NHW`` and ``masks_NHW`` (anomalous where not
0). Figures that do not exist are null.
"""

import argparse
import json
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sprue.errors import SprueError
from sprue.evaluation.metrics import Figure, image_figures, pixel_figures
from sprue.evaluation.pixels import count_pixels

ARRAYS = ("scores_N", "labels_N", "maps_NHW", "masks_NHW")


def figures_of(path: Path) -> dict[str, Figure]:
    """The figures of a file, by names that begin with ``image_`` or ``pixel_``.

    Raises:
        SprueError: If the file is none of numpy's, or its arrays are missing, do not belong together or hold NaN.
    """
    arrays = _read(path)
    for name, partner in (("scores_N", ""), ("labels_N", ""), ("maps_NHW", "masks_NHW"), ("masks_NHW", "maps_NHW")):
        if name not in arrays and (not partner or partner in arrays):
            raise SprueError(f"{path} holds no {name}; it has {', '.join(arrays) or 'nothing'}")
    scores_N, labels_N = arrays["scores_N"], arrays["labels_N"]
    named = {f"image_{name}": figure for name, figure in image_figures(scores_N, labels_N).items()}
    if "maps_NHW" in arrays:
        maps_NHW, masks_NHW = arrays["maps_NHW"], arrays["masks_NHW"]
        if maps_NHW.shape != masks_NHW.shape or maps_NHW.ndim != 3 or len(maps_NHW) != len(scores_N):
            raise SprueError(
                f"{path}: maps_NHW and masks_NHW are a map and a mask for each of the {len(scores_N)} scores; they are "
                f"{maps_NHW.shape} and {masks_NHW.shape}"
            )
        if np.isnan(masks_NHW).any():
            raise SprueError(f"{path}: masks_NHW holds NaN")
        counts = count_pixels(lambda i: maps_NHW[i], lambda i: masks_NHW[i] != 0, len(maps_NHW))
        named |= {f"pixel_{name}": figure for name, figure in pixel_figures(counts).items()}
    return named


def _read(path: Path) -> dict[str, NDArray[Any]]:
    """The file's arrays of real numbers."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    # What numpy raises where a file is none of its own, is damaged, or claims to be larger than any memory.
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, MemoryError, NotImplementedError) as error:
        raise SprueError(f"{path} can't be read as an .npz file: {error}") from error
    except (AttributeError, TypeError) as error:
        raise SprueError(f"{path} is one array; an .npz file holds several by their names") from error
    for name, array in arrays.items():
        if name in ARRAYS and (not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf"):
            raise SprueError(f"{path}: {name} does not hold real numbers")
    return arrays


def as_json(figures: dict[str, Figure]) -> str:
    """Figures by name, and their intervals; null for what does not exist."""
    plain = {name: figure.as_json() for name, figure in figures.items()}
    intervals = {name: [each["low"], each["high"]] for name, each in plain.items()}
    return json.dumps({name: each["value"] for name, each in plain.items()} | {"intervals": intervals}, indent=2)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m sprue.evaluation", description=__doc__)
    parser.add_argument("file", type=Path)
    try:
        print(as_json(figures_of(parser.parse_args().file)))
    except SprueError as error:
        sys.exit(f"sprue.evaluation: {error}")
