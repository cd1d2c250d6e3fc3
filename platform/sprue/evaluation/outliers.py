"""Calibration scores that lie far beyond the others: one foreign image can raise the threshold above every defect.

Shapes: N samples.
"""

import logging
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import BaseModel

from sprue.evaluation.calibrate import HeldOut, score_held_out
from sprue.features.tables import FeatureTable
from sprue.inference.detector import Detector

logger = logging.getLogger(__name__)

FACTOR = 10.0
"""An outlier lies above the others' median by more than so many times the range from there to their 90 % quantile. For
normally distributed scores that is 13 standard deviations."""

MOST = 0.2
"""At most this fraction of the scores is called outliers: more would be a kind of part of their own."""


def outliers(scores_N: NDArray[np.floating[Any]]) -> NDArray[np.intp]:
    """Indices of the scores that lie far beyond the others, the highest first; there may be none.

    The highest m scores are outliers if each lies beyond the limit that the other scores give; the largest such m is
    taken, so that two outliers do not hide one another.

    >>> outliers(np.array([2.0, 30.3, 2.5, 3.0, 3.5, 4.1, 2.2, 2.8, 3.1, 29.0]))
    array([1, 9])
    >>> outliers(np.array([2.0, 4.1, 2.5, 3.0, 3.5]))
    array([], dtype=int64)
    """
    order_N = np.argsort(-scores_N, kind="stable")
    descending_N = scores_N[order_N].astype(np.float64)
    for count in range(int(MOST * len(scores_N)), 0, -1):
        median, upper = np.quantile(descending_N[count:], (0.5, 0.9))
        if descending_N[count - 1] > median + FACTOR * (upper - median):
            return order_N[:count]
    return order_N[:0]


class Outlier(BaseModel):
    """A calibration sample whose score is an outlier: its id, the paths of its images, its score."""

    sample_id: str
    paths: tuple[str, ...]
    score: float


def outlying_samples(detector: Detector, table: FeatureTable, held_out: Sequence[HeldOut]) -> list[Outlier]:
    """The calibration samples whose scores are outliers, the highest first; most classes have none.

    `held_out` is what the detector was calibrated on; it is scored again to find which.
    """
    if not len(outliers(np.array(detector.calibration.scores))):
        return []
    views = len(detector.views)
    scores_N, _ = score_held_out(held_out, detector.scoring, table)
    calibration = pd.concat([each.rows for each in held_out], ignore_index=True)
    paths_NV, ids_N = calibration["path"].to_numpy().reshape(-1, views), calibration["sample_id"].to_numpy()[::views]
    return [
        Outlier(sample_id=str(ids_N[index]), paths=tuple(map(str, paths_NV[index])), score=float(scores_N[index]))
        for index in outliers(scores_N)
    ]


def undecided(found: Sequence[Outlier], keep: Collection[str]) -> list[Outlier]:
    """The outliers of which the user has not said, by ``manifest.keep``, that they are good parts."""
    return [outlier for outlier in found if not set(outlier.paths) & set(keep)]


def warn_of_outliers(class_name: str, found: Sequence[Outlier], others_end: float) -> None:
    """Logs a warning that names the outliers, if there are any; `others_end` is the highest of the other scores."""
    if found:
        logger.warning(
            "class %s: calibration scores lie far beyond the others, which end at %.3g: %s. Such a sample raises the "
            "threshold, and defects are missed. Look at it; add its images to manifest.drop if it is no good part, to "
            "manifest.keep if it is one, and run again",
            class_name,
            others_end,
            ", ".join(f"{outlier.sample_id} ({outlier.score:.3g})" for outlier in found),
        )
