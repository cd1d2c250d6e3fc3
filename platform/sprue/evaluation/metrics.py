"""Metrics of detection and localisation, with their bootstrap intervals.

Shapes: N items (samples or images), D resamples of a bootstrap, G groups of items, H rows, W columns of an image,
Q bins.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, norm

from sprue.errors import SprueError
from sprue.evaluation.curves import Counts, Curve
from sprue.evaluation.pixels import PixelCounts

RESAMPLES = 1000
"""Resamples of a bootstrap."""

COVERAGE = 0.95
"""Of the intervals."""

WEIGHTS_AT_ONCE = 4_000_000
"""Resampled weights in memory at once, at most."""

RANKING_METRICS: Mapping[str, Callable[[Curve], Counts]] = {
    "auroc": Curve.area,
    "average_precision": Curve.average_precision,
    "best_f1": Curve.best_f1,
}
SCORE_METRICS: Mapping[str, Callable[[Curve], Counts]] = {
    **RANKING_METRICS,
    "pb2": Curve.tpr_at_fpr,
    "pg2": Curve.tnr_at_fnr,
}

Groups = NDArray[np.integer[Any]]
"""A number for each item; items of one number, such as the images of a sample, are resampled together."""


@dataclass(frozen=True)
class Estimate:
    """A metric and its 95 % interval; NaN where it does not exist. The interval is a bootstrap's unless said otherwise.

    The interval estimates how far the metric would vary over other test splits of the same kind, for this one detector;
    it does not cover the variation between fits. It is bias-corrected (Efron, 1981), because every resample flatters a
    metric that is the best over all thresholds. It is still too narrow with few items, and has no width where all
    resamples agree, as at an AUROC of 1.
    """

    value: float
    low: float
    high: float

    @classmethod
    def missing(cls) -> "Estimate":
        """The estimate of a metric that does not exist."""
        return cls(math.nan, math.nan, math.nan)

    def as_json(self) -> dict[str, float | None]:
        """The fields, None for NaN."""
        return {name: None if math.isnan(value) else value for name, value in asdict(self).items()}


def score_estimates(
    scores_N: NDArray[np.floating[Any]],
    labels_N: NDArray[np.integer[Any]],
    groups_N: Groups | None = None,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Metrics of items by their scores: AUROC, average precision, best F1, PB2 and PG2.

    Higher scores are more anomalous. Labels are 1 for a defective item, 0 for a good one. The bootstrap resamples good
    and defective items separately; with `groups_N`, groups without and with a defective item.

    Raises:
        SprueError: If a score is NaN or a label neither 0 nor 1.

    >>> estimates = score_estimates(np.array([0.1, 0.4, 0.3, 0.9]), np.array([0, 0, 1, 1]))
    >>> estimates["auroc"].value, round(estimates["average_precision"].value, 4)
    (0.75, 0.8333)
    """
    _check(scores_N, labels_N)

    def metrics(weights_DN: Counts | None = None) -> dict[str, Counts]:
        curve = Curve.of_scores(scores_N, labels_N, weights_DN)
        return {name: metric(curve) for name, metric in SCORE_METRICS.items()}

    return _estimates(metrics(), map(metrics, _weights(labels_N, len(scores_N), seed, groups_N)))


def auroc_difference(
    one_N: NDArray[np.floating[Any]],
    other_N: NDArray[np.floating[Any]],
    labels_N: NDArray[np.integer[Any]],
    groups_N: Groups | None = None,
    seed: int = 0,
) -> Estimate:
    """The AUROC of one detector minus that of another on the same samples, with a paired bootstrap.

    Scores and labels are those of `score_estimates`. Groups are resampled as units, each with all its variants of an
    image. Without them, good and defective samples are resampled separately, each on its own.

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

    strata_N = labels_N if groups_N is None else np.zeros_like(labels_N)
    resamples = [difference(weights_DN) for weights_DN in _weights(strata_N, len(one_N), seed, groups_N)]
    return _estimate(float(difference()), resamples)


def aupro_difference(one: PixelCounts, other: PixelCounts, groups_N: Groups | None = None, seed: int = 0) -> Estimate:
    """The AUPRO of one detector minus that of another on the same images, with a paired bootstrap.

    Both are resampled as in `pixel_estimates`; missing where there is no ground truth of a defect.
    """

    def difference(weights_DN: Counts) -> Counts:
        first, second = (
            curve.overlap_area(overlap) for curve, overlap in (_resampled(each, weights_DN) for each in (one, other))
        )
        return first - second

    width = max(each.anomalous_NQ.shape[1] for each in (one, other))
    strata_N = one.is_defective_N.astype(int)
    resamples = [difference(weights_DN) for weights_DN in _weights(strata_N, width, seed, groups_N)]
    return _estimate(float(one.aupro - other.aupro), resamples)


def pixel_estimates(counts: PixelCounts, groups_N: Groups | None = None, seed: int = 0) -> dict[str, Estimate]:
    """Metrics of pixels by their anomaly scores: AUROC, AUPRO, average precision, best F1.

    The values are exact. The intervals come from resampling images, those with and without anomalous pixels separately,
    or groups of images; in them, values within one of 1,024 bins are tied.

    >>> from sprue.evaluation.pixels import count_pixels
    >>> map_HW, mask_HW = np.array([[0.1, 0.4, 0.3, 0.9]]), np.array([[False, False, True, True]])
    >>> counts = count_pixels(lambda i: map_HW, lambda i: mask_HW, images=1)
    >>> round(pixel_estimates(counts)["auroc"].value, 4)
    0.75
    """

    def metrics(curve: Curve, overlap: Counts) -> dict[str, Counts]:
        ranking = {name: metric(curve) for name, metric in RANKING_METRICS.items()}
        return ranking | {"aupro": curve.overlap_area(overlap)}

    weights = _weights(counts.is_defective_N.astype(int), counts.anomalous_NQ.shape[1], seed, groups_N)
    resampled = (metrics(*_resampled(counts, weights_DN)) for weights_DN in weights)
    return _estimates(metrics(counts.curve, counts.overlap_K), resampled)


def fraction(is_anomalous_N: NDArray[np.bool_]) -> Estimate:
    """The fraction of items that are called anomalous, with its exact (Clopper-Pearson) interval."""
    if not len(is_anomalous_N):
        return Estimate.missing()
    interval = binomtest(int(is_anomalous_N.sum()), len(is_anomalous_N)).proportion_ci(COVERAGE, method="exact")
    return Estimate(float(is_anomalous_N.mean()), float(interval.low), float(interval.high))


def mean(values_N: NDArray[np.floating[Any]], groups_N: Groups | None = None, seed: int = 0) -> Estimate:
    """The mean of one value for each image, such as a fraction of its pixels; images may be resampled in groups.

    >>> mean(np.array([0.0, 0.5])).value
    0.25
    """
    if not len(values_N):
        return Estimate.missing()
    strata_N = np.zeros(len(values_N), int)
    weights = _weights(strata_N, len(values_N), seed, groups_N)
    resamples = [weights_DN @ values_N / weights_DN.sum(1) for weights_DN in weights]
    return _estimate(float(values_N.mean()), resamples)


def _resampled(counts: PixelCounts, weights_DN: Counts) -> tuple[Curve, Counts]:
    """The curve of each resample of images, and its regions' mean overlap, [D, Q]."""
    curve = Curve.of_bins(*(np.cumsum(weights_DN @ each, -1) for each in (counts.anomalous_NQ, counts.normal_NQ)))
    regions_D1 = np.maximum(weights_DN @ counts.regions_N, 1.0)[:, None]
    return curve, np.cumsum(weights_DN @ counts.overlap_NQ, -1) / regions_D1


def _weights(
    strata_N: NDArray[np.integer[Any]], width: int, seed: int, groups_N: Groups | None = None
) -> Iterator[Counts]:
    """How often each resample holds each item, [D, N], in parts; the size of each stratum is kept, in items or groups.

    A group belongs to the highest stratum of its items.
    """
    if groups_N is not None:
        numbers_N = np.unique(groups_N, return_inverse=True)[1]
        strata_G = np.zeros(numbers_N.max(initial=-1) + 1, int)
        np.maximum.at(strata_G, numbers_N, strata_N)
        yield from (weights_DG[:, numbers_N] for weights_DG in _weights(strata_G, max(width, len(strata_N)), seed))
        return
    rng = np.random.default_rng(seed)
    at_once = max(1, min(RESAMPLES, WEIGHTS_AT_ONCE // max(1, width, len(strata_N))))
    for start in range(0, RESAMPLES, at_once):
        weights_DN = np.zeros((min(at_once, RESAMPLES - start), len(strata_N)))
        for stratum in np.unique(strata_N):
            members = np.flatnonzero(strata_N == stratum)
            equally = np.full(len(members), 1 / len(members))
            weights_DN[:, members] = rng.multinomial(len(members), equally, len(weights_DN))
        yield weights_DN


def _estimates(exact: Mapping[str, Counts], resampled: Iterable[Mapping[str, Counts]]) -> dict[str, Estimate]:
    parts = list(resampled)
    return {name: _estimate(float(value), [part[name] for part in parts]) for name, value in exact.items()}


def _estimate(value: float, resamples: list[Counts]) -> Estimate:
    values_D = np.concatenate(resamples)
    values_D = values_D[np.isfinite(values_D)]
    if math.isnan(value) or not len(values_D):
        return Estimate(value, math.nan, math.nan)
    below = ((values_D < value).mean() + (values_D <= value).mean()) / 2
    shift = norm.ppf(np.clip(below, 0.5 / len(values_D), 1 - 0.5 / len(values_D)))
    levels = norm.cdf(2 * shift + norm.ppf([(1 - COVERAGE) / 2, (1 + COVERAGE) / 2]))
    low, high = np.quantile(values_D, levels)
    # The bins of pixels shift the resamples' values a little against the exact one.
    return Estimate(value, min(float(low), value), max(float(high), value))


def _check(scores_N: NDArray[np.floating[Any]], labels_N: NDArray[np.integer[Any]]) -> None:
    if scores_N.ndim != 1 or scores_N.shape != labels_N.shape:
        raise SprueError(f"scores and labels are lists of one length; they are {scores_N.shape} and {labels_N.shape}")
    if np.isnan(scores_N).any():
        raise SprueError(f"{int(np.isnan(scores_N).sum())} of {len(scores_N)} scores are NaN")
    if not np.isin(labels_N, (0, 1)).all():
        raise SprueError("labels are 0 (good) or 1 (defective)")
