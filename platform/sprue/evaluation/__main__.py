"""All figures of scores and maps in a file, as JSON: ``python -m sprue.evaluation FILE.npz``.

The file holds ``scores_N`` and ``labels_N`` (0 or 1), and may hold ``maps_NHW`` and ``masks_NHW`` (anomalous where not
0). Figures that do not exist are null.
"""

import argparse
import json
import sys
import zipfile
from pathlib import Path

import numpy as np

from sprue.errors import SprueError
from sprue.evaluation.metrics import Figure, image_figures, pixel_figures


def figures_of(path: Path) -> dict[str, Figure]:
    """The figures of a file, by names that begin with ``image_`` or ``pixel_``.

    Raises:
        SprueError: If the file is none of numpy's, or its arrays are missing, do not belong together or hold NaN.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        raise SprueError(f"{path} can't be read as an .npz file: {error}") from error
    for name, partner in (("scores_N", ""), ("labels_N", ""), ("maps_NHW", "masks_NHW"), ("masks_NHW", "maps_NHW")):
        if name not in arrays and (not partner or partner in arrays):
            raise SprueError(f"{path} holds no {name}; it has {', '.join(arrays) or 'nothing'}")
    figures = image_figures(arrays["scores_N"].astype(float), arrays["labels_N"])
    named = {f"image_{name}": figure for name, figure in figures.items()}
    if "maps_NHW" in arrays:
        maps_NHW, masks_NHW = arrays["maps_NHW"], arrays["masks_NHW"] != 0
        if maps_NHW.shape != masks_NHW.shape or maps_NHW.ndim != 3:
            raise SprueError(f"{path}: maps_NHW is {maps_NHW.shape}, masks_NHW {masks_NHW.shape}")
        pixels = pixel_figures(maps_NHW.__getitem__, list(masks_NHW))
        named |= {f"pixel_{name}": figure for name, figure in pixels.items()}
    return named


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
