"""Metrics of the scores and maps in a file.

The ``.npz`` file holds ``scores_N`` and ``labels_N`` (0 or 1), and may hold ``maps_NHW`` and ``masks_NHW`` (anomalous
where not 0).
"""

import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sprue.errors import SprueError
from sprue.evaluation.metrics import Estimate, pixel_estimates, score_estimates
from sprue.evaluation.pixels import count_pixels

ARRAYS = ("scores_N", "labels_N", "maps_NHW", "masks_NHW")


def metrics_of_file(path: Path) -> dict[str, Estimate]:
    """The metrics of a file, by names that begin with ``sample_`` or ``pixel_``.

    Raises:
        SprueError: If the file is no ``.npz`` file, or its arrays are missing, do not belong together or hold NaN.
    """
    arrays = _read(path)
    for name, partner in (("scores_N", ""), ("labels_N", ""), ("maps_NHW", "masks_NHW"), ("masks_NHW", "maps_NHW")):
        if name not in arrays and (not partner or partner in arrays):
            raise SprueError(f"{path} holds no {name}; it has {', '.join(arrays) or 'nothing'}")
    scores_N, labels_N = arrays["scores_N"], arrays["labels_N"]
    estimates = {f"sample_{name}": estimate for name, estimate in score_estimates(scores_N, labels_N).items()}
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
        estimates |= {f"pixel_{name}": estimate for name, estimate in pixel_estimates(counts).items()}
    return estimates


def as_json(estimates: dict[str, Estimate]) -> str:
    """Values by name, and intervals by name under ``intervals``; null for what does not exist."""
    fields = {name: estimate.as_json() for name, estimate in estimates.items()}
    intervals = {name: [each["low"], each["high"]] for name, each in fields.items()}
    return json.dumps({name: each["value"] for name, each in fields.items()} | {"intervals": intervals}, indent=2)


def _read(path: Path) -> dict[str, NDArray[Any]]:
    """The file's arrays of real numbers."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    # All that numpy raises for a file of another kind, a damaged one, or one that claims to exceed the memory.
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, MemoryError, NotImplementedError) as error:
        raise SprueError(f"{path} can't be read as an .npz file: {error}") from error
    except (AttributeError, TypeError) as error:
        raise SprueError(f"{path} is one array; an .npz file holds several by their names") from error
    for name, array in arrays.items():
        if name in ARRAYS and (not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf"):
            raise SprueError(f"{path}: {name} does not hold real numbers")
    return arrays
