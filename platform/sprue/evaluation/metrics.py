"""Figures of detection and localisation, with their bootstrap intervals.

Shapes: N items (samples or pictures), D draws of a bootstrap, H rows, W columns of a picture, K thresholds, Q bins.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, norm

from sprue.errors import SprueError
from sprue.evaluation.curves import Counts, Curve
from sprue.evaluation.pixels import PixelCounts

DRAWS = 1000
"""Draws of a bootstrap."""

COVERAGE = 0.95
"""Of the intervals."""

TOGETHER = 4_000_000
"""Weights that are held at once, at most."""

OF_CURVE: Mapping[str, Callable[[Curve], Counts]] = {
    "auroc": Curve.area,
    "average_precision": Curve.average_precision,
    "best_f1": Curve.best_f1,
}
OF_PLANT: Mapping[str, Callable[[Curve], Counts]] = {"pb2": Curve.caught, "pg2": Curve.passed}


@dataclass(frozen=True)
class Figure:
    """A figure and its 95 % interval, by the bootstrap where nothing else is said; NaN where it does not exist.

    An interval tells how far the figure would move with another test split of the same kind, for this one detector; it
    says nothing of another fit's. It is bias-corrected (Efron, 1981), for a figure that is the best over all thresholds
    is flattered by every draw. With few items it is too narrow all the same, and where no draw differs, as at an AUROC
    of 1, it has no width.
    """

    value: float
    low: float
    high: float

    def as_json(self) -> dict[str, float | None]:
        """As JSON has it: None for NaN."""
        return {name: None if math.isnan(value) else value for name, value in asdict(self).items()}


def image_figures(
    scores_N: NDArray[np.floating[Any]], labels_N: NDArray[np.integer[Any]], seed: int = 0
) -> dict[str, Figure]:
    """Figures of samples by their scores: AUROC, average precision, best F1, PB2 and PG2.

    Args:
        scores_N: Higher is more anomalous.
        labels_N: 1 for a defective sample, 0 for a good one.
        seed: Of the bootstrap, which draws good and defective samples apart.

    Raises:
        SprueError: If a score is NaN or a label neither 0 nor 1.

    >>> figures = image_figures(np.array([0.1, 0.4, 0.3, 0.9]), np.array([0, 0, 1, 1]))
    >>> figures["auroc"].value, round(figures["average_precision"].value, 4)
    (0.75, 0.8333)
    """
    _check(scores_N, labels_N)
    measures = {**OF_CURVE, **OF_PLANT}
    exact = Curve.of_scores(scores_N, labels_N)
    draws: dict[str, list[Counts]] = {name: [] for name in measures}
    for weights_DN in _weights(labels_N, len(scores_N), seed):
        drawn = Curve.of_scores(scores_N, labels_N, weights_DN)
        for name, measure in measures.items():
            draws[name].append(measure(drawn))
    return {name: _figure(float(measure(exact)), draws[name]) for name, measure in measures.items()}


def auroc_difference(
    one_N: NDArray[np.floating[Any]],
    other_N: NDArray[np.floating[Any]],
    labels_N: NDArray[np.integer[Any]],
    groups_N: NDArray[np.integer[Any]] | None = None,
    seed: int = 0,
) -> Figure:
    """How much higher one detector's AUROC is than another's on the same samples, each draw being of the same for both.

    Args:
        one_N: Scores of the one; higher is more anomalous.
        other_N: Scores of the other.
        labels_N: 1 for a defective sample, 0 for a good one.
        groups_N: Numbers, from 0, of what is drawn as a whole: samples that are variants of one picture are no
            independent ones. Without, each sample stands for itself, and good and defective ones are drawn apart.
        seed: Of the bootstrap.

    Raises:
        SprueError: If a score is NaN or a label neither 0 nor 1.

    >>> auroc_difference(np.array([0.1, 0.9]), np.array([0.8, 0.2]), np.array([0, 1])).value
    1.0
    """
    for scores_N in (one_N, other_N):
        _check(scores_N, labels_N)

    def difference(weights_DN: Counts | None = None) -> Counts:
        one, other = (Curve.of_scores(scores_N, labels_N, weights_DN).area() for scores_N in (one_N, other_N))
        return one - other

    if groups_N is None:
        draws = [difference(weights_DN) for weights_DN in _weights(labels_N, len(one_N), seed)]
    else:
        alike_G = np.zeros(groups_N.max() + 1, int)
        draws = [difference(weights_DG[:, groups_N]) for weights_DG in _weights(alike_G, len(one_N), seed)]
    return _figure(float(difference()), draws)


def pixel_figures(counts: PixelCounts, seed: int = 0) -> dict[str, Figure]:
    """Figures of pixels by the evidence for them: AUROC, AUPRO, average precision, best F1.

    They are exact; their intervals, which come of drawing pictures, take values within one of 1,024 bins as tied.

    Args:
        counts: Of the test split's pixels.
        seed: Of the bootstrap, which draws pictures with and without anomalous pixels apart.

    >>> from sprue.evaluation.pixels import count_pixels
    >>> values, truth = np.array([[0.1, 0.4, 0.3, 0.9]]), np.array([[False, False, True, True]])
    >>> counts = count_pixels(lambda i: values, lambda i: truth, pictures=1)
    >>> round(pixel_figures(counts)["auroc"].value, 4)
    0.75
    """
    draws: dict[str, list[Counts]] = {name: [] for name in (*OF_CURVE, "aupro")}
    shown_N = (counts.found_NQ.sum(1) > 0).astype(int)
    for weights_DN in _weights(shown_N, counts.found_NQ.shape[1], seed):
        drawn, overlap_DQ = _drawn(counts, weights_DN)
        for name, measure in OF_CURVE.items():
            draws[name].append(measure(drawn))
        draws["aupro"].append(drawn.overlap_area(overlap_DQ))
    values = {name: measure(counts.curve) for name, measure in OF_CURVE.items()}
    values["aupro"] = counts.curve.overlap_area(counts.overlap_K)
    return {name: _figure(float(value), draws[name]) for name, value in values.items()}


def share(called_N: NDArray[np.bool_]) -> Figure:
    """The share of items that are called anomalous, with its exact (Clopper-Pearson) interval."""
    if not len(called_N):
        return Figure(math.nan, math.nan, math.nan)
    interval = binomtest(int(called_N.sum()), len(called_N)).proportion_ci(COVERAGE, method="exact")
    return Figure(float(called_N.mean()), float(interval.low), float(interval.high))


def mean(values_N: NDArray[np.floating[Any]], seed: int = 0) -> Figure:
    """The mean of one value for each picture, such as a share of its pixels.

    >>> mean(np.array([0.0, 0.5])).value
    0.25
    """
    if not len(values_N):
        return Figure(math.nan, math.nan, math.nan)
    alike_N = np.zeros(len(values_N), int)
    draws = [weights_DN @ values_N / len(values_N) for weights_DN in _weights(alike_N, len(values_N), seed)]
    return _figure(float(values_N.mean()), draws)


def _drawn(counts: PixelCounts, weights_DN: Counts) -> tuple[Curve, Counts]:
    """The curve of each draw of pictures, and its regions' mean overlap, [D, Q]."""
    curve = Curve.of_bins(*(np.cumsum(weights_DN @ each, -1) for each in (counts.found_NQ, counts.alarms_NQ)))
    regions_D1 = np.maximum(weights_DN @ counts.regions_N, 1.0)[:, None]
    return curve, np.cumsum(weights_DN @ counts.overlap_NQ, -1) / regions_D1


def _weights(labels_N: NDArray[np.integer[Any]], width: int, seed: int) -> Iterator[Counts]:
    """How often each draw holds each item, [D, N], in parts; as many of each label as there are."""
    rng = np.random.default_rng(seed)
    together = max(1, min(DRAWS, TOGETHER // max(1, width)))
    for start in range(0, DRAWS, together):
        weights_DN = np.zeros((min(together, DRAWS - start), len(labels_N)))
        for label in np.unique(labels_N):
            of_label = np.flatnonzero(labels_N == label)
            equally = np.full(len(of_label), 1 / len(of_label))
            weights_DN[:, of_label] = rng.multinomial(len(of_label), equally, len(weights_DN))
        yield weights_DN


def _figure(value: float, draws: list[Counts]) -> Figure:
    drawn_D = np.concatenate(draws)
    drawn_D = drawn_D[np.isfinite(drawn_D)]
    if math.isnan(value) or not len(drawn_D):
        return Figure(value, math.nan, math.nan)
    below = ((drawn_D < value).mean() + (drawn_D <= value).mean()) / 2
    shift = norm.ppf(np.clip(below, 0.5 / len(drawn_D), 1 - 0.5 / len(drawn_D)))
    levels = norm.cdf(2 * shift + norm.ppf([(1 - COVERAGE) / 2, (1 + COVERAGE) / 2]))
    low, high = np.quantile(drawn_D, levels)
    # The draws of pixels know values by their bins alone.
    return Figure(value, min(float(low), value), max(float(high), value))


def _check(scores_N: NDArray[np.floating[Any]], labels_N: NDArray[np.integer[Any]]) -> None:
    if scores_N.ndim != 1 or scores_N.shape != labels_N.shape:
        raise SprueError(f"scores and labels are lists of one length; they are {scores_N.shape} and {labels_N.shape}")
    if np.isnan(scores_N).any():
        raise SprueError(f"{int(np.isnan(scores_N).sum())} of {len(scores_N)} scores are no numbers")
    if not np.isin(labels_N, (0, 1)).all():
        raise SprueError("labels are 0 (good) or 1 (defective)")
