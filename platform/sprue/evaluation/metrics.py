"""Figures of detection and localisation.

Shapes: N pictures, H rows, W columns of a picture (they may differ between pictures).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

Maps = Callable[[int], NDArray[np.floating[Any]]]
"""Gives picture i's anomaly map [H, W]; called twice for each picture, so that no two maps need be held at once."""


def image_auroc(scores_N: NDArray[np.floating[Any]], labels_N: NDArray[np.integer[Any]]) -> float:
    """Area under the ROC curve over pictures; NaN where one of the labels does not occur.

    >>> image_auroc(np.array([0.1, 0.4, 0.3, 0.9]), np.array([0, 0, 1, 1]))
    0.75
    """
    if len(np.unique(labels_N)) < 2:
        return math.nan
    return float(roc_auc_score(labels_N, scores_N))


def pixel_auroc(maps: Maps, masks: Sequence[NDArray[np.bool_] | None]) -> float:
    """Area under the ROC curve over all pixels of all pictures, exact, in memory that the anomalous pixels take.

    The area is the chance that an anomalous pixel's evidence is above a normal one's, ties counted half. So the
    anomalous values are sorted once, and each picture's normal values are ranked among them.

    Args:
        maps: Each picture's map.
        masks: Each picture's mask [H, W], True where anomalous, of its map's size; None for a good picture.

    Returns:
        The area; NaN where no pixel is anomalous, or all are.

    >>> pixel_auroc(lambda i: np.array([[0.1, 0.4, 0.3, 0.9]]), [np.array([[False, False, True, True]])])
    0.75
    """
    anomalous = np.sort(np.concatenate([np.empty(0), *(maps(i)[m] for i, m in enumerate(masks) if m is not None)]))
    normal_pixels, won = 0, 0.0
    if not len(anomalous):
        return math.nan
    for i, mask in enumerate(masks):
        map_HW = maps(i)
        normal = np.sort(map_HW.ravel() if mask is None else map_HW[~mask])
        above = len(anomalous) - np.searchsorted(anomalous, normal, side="right")
        at_least = len(anomalous) - np.searchsorted(anomalous, normal, side="left")
        normal_pixels += len(normal)
        won += float((above + at_least).sum()) / 2
    return won / (normal_pixels * len(anomalous)) if normal_pixels else math.nan
