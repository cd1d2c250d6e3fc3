"""Metrics of a ranking, from the counts at its thresholds.

Shapes: K thresholds from the highest to the lowest, P points of a curve, N items; a dot stands for leading dimensions:
none, or the resamples of a bootstrap.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.float64]

TOLERATED = 0.02
"""The false-positive rate of PB2 and the false-negative rate of PG2."""

PRO_LIMIT = 0.3
"""False-positive rate up to which the per-region overlap is integrated."""


@dataclass(frozen=True)
class Curve:
    """True and false positives at each threshold; metrics are NaN where one kind of items is missing.

    Every value of an anomalous item is a threshold. A normal item's value may lie between two thresholds.

    Attributes:
        true_positives: Weight of the anomalous items at or above each threshold, [., K].
        false_positives: Weight of the normal items at or above it, [., K].
        false_positives_above: Weight of the normal items above it, [., K].
        anomalous: Weight of all anomalous items, [.].
        normal: Weight of all normal items, [.].
    """

    true_positives: Counts
    false_positives: Counts
    false_positives_above: Counts
    anomalous: Counts
    normal: Counts

    @classmethod
    def of_scores(
        cls,
        scores_N: NDArray[np.floating[Any]],
        labels_N: NDArray[np.integer[Any]],
        weights: NDArray[np.floating[Any]] | None = None,
    ) -> "Curve":
        """The curve of items by their scores, or several curves at once by weights [., N] of the items."""
        scores_N = np.asarray(scores_N, float)
        order = np.argsort(-scores_N, kind="stable")
        ranked_N = scores_N[order]
        last = np.flatnonzero(np.append(ranked_N[1:] != ranked_N[:-1], True)) if len(order) else order
        of_item = (np.ones(len(order)) if weights is None else weights)[..., order]
        is_anomalous_N = labels_N[order] == 1
        true_positives = np.cumsum(of_item * is_anomalous_N, -1)[..., last]
        false_positives = np.cumsum(of_item * ~is_anomalous_N, -1)[..., last]
        return cls.of_bins(true_positives, false_positives)

    @classmethod
    def of_bins(cls, true_positives: Counts, false_positives: Counts) -> "Curve":
        """The curve of items in K bins from the highest to the lowest; the items of a bin are tied.

        Weights [., K] are of the anomalous and of the normal items in each bin and the bins above it.
        """
        above = np.concatenate([np.zeros_like(false_positives[..., :1]), false_positives[..., :-1]], -1)
        nothing = np.zeros(true_positives.shape[:-1])
        totals = (true_positives[..., -1], false_positives[..., -1]) if true_positives.shape[-1] else (nothing, nothing)
        return cls(true_positives, false_positives, above, *totals)

    def polygon(self, heights: Counts) -> tuple[Counts, Counts]:
        """Rates and heights [., 2 K + 2] of a curve over the false-positive rate, from rate 0 to rate 1.

        The curve's height [., K] at each threshold gives two points: between thresholds the rate grows alone; at a
        threshold, where values are tied, rate and height grow together.
        """
        origin = np.zeros((*self.anomalous.shape, 1))
        before = np.concatenate([origin, heights], -1)
        rate = _ratio(np.stack([self.false_positives_above, self.false_positives], -1), self.normal[..., None, None])
        height = np.stack([before[..., :-1], heights], -1)
        flat = (*self.anomalous.shape, 2 * heights.shape[-1])
        return (
            np.concatenate([origin, rate.reshape(flat), origin + 1.0], -1),
            np.concatenate([origin, height.reshape(flat), before[..., -1:]], -1),
        )

    def roc(self) -> tuple[Counts, Counts]:
        """False-positive and true-positive rates from 0 to 1, [., P]."""
        return self.polygon(_ratio(self.true_positives, self.anomalous[..., None]))

    def precision_recall(self) -> tuple[Counts, Counts]:
        """Recall and precision at the thresholds, [., K]."""
        return (
            _ratio(self.true_positives, self.anomalous[..., None]),
            _ratio(self.true_positives, self.true_positives + self.false_positives),
        )

    def area(self) -> Counts:
        """Area under the ROC curve (AUROC), ties counted half, [.]."""
        gained = np.diff(self.true_positives, axis=-1, prepend=0.0)
        misordered = (gained * (self.false_positives + self.false_positives_above) / 2).sum(-1)
        return self._nan_unless_both(1.0 - _ratio(misordered, self.anomalous * self.normal))

    def average_precision(self) -> Counts:
        """Mean precision over the anomalous items, without interpolation, [.]."""
        gained = np.diff(self.true_positives, axis=-1, prepend=0.0)
        _, precision = self.precision_recall()
        return self._nan_unless_both(_ratio((gained * precision).sum(-1), self.anomalous))

    def best_f1(self) -> Counts:
        """The largest F1 over all thresholds, [.]."""
        positives = self.true_positives + self.false_positives
        f1 = _ratio(2 * self.true_positives, positives + self.anomalous[..., None])
        return self._nan_unless_both(f1.max(-1, initial=0.0))

    def tpr_at_fpr(self, fpr: float = TOLERATED) -> Counts:
        """The largest true-positive rate at a false-positive rate of at most `fpr`, [.].

        Source, with 2 %: PB2 of Baitieva et al., "Beyond Academic Benchmarks" (2025).
        """
        allowed = self.false_positives <= _rounded(fpr * self.normal)[..., None]
        return self._nan_unless_both(_ratio((self.true_positives * allowed).max(-1, initial=0.0), self.anomalous))

    def tnr_at_fnr(self, fnr: float = TOLERATED) -> Counts:
        """The largest true-negative rate at a false-negative rate of at most `fnr`, [.].

        Source, with 2 %: PG2 of Baitieva et al. (2025).
        """
        false_negatives = self.anomalous[..., None] - self.true_positives
        allowed = false_negatives <= _rounded(fnr * self.anomalous)[..., None]
        fewest = np.where(allowed, self.false_positives, self.normal[..., None]).min(-1, initial=np.inf)
        return self._nan_unless_both(1.0 - _ratio(fewest, self.normal))

    def overlap_area(self, overlap: Counts, limit: float = PRO_LIMIT) -> Counts:
        """Area under the per-region overlap up to a false-positive rate, divided by that rate (AUPRO), [.].

        The overlap [., K] is the mean over the regions of their fraction at or above each threshold. It is linear
        between two points of the curve, as it is where values are tied.

        Source: Bergmann et al., "The MVTec Anomaly Detection Dataset" (IJCV 2021).
        """
        rate_P, overlap_P = self.polygon(overlap)
        left, right = rate_P[..., :-1], rate_P[..., 1:]
        low, high = overlap_P[..., :-1], overlap_P[..., 1:]
        width = np.clip(right, None, limit) - np.clip(left, None, limit)
        inside = _ratio(width, right - left)
        area = (width * (low + (high - low) * inside / 2)).sum(-1)
        return self._nan_unless_both(area / limit)

    def _nan_unless_both(self, metric: Counts) -> Counts:
        return np.where((self.anomalous > 0) & (self.normal > 0), metric, np.nan)


def _ratio(part: Counts, total: Counts) -> Counts:
    """``part / total``; 0 where the total is 0."""
    part, total = np.broadcast_arrays(part, total)
    return np.divide(part, total, out=np.zeros(part.shape), where=total > 0)


def _rounded(count: Counts) -> Counts:
    # 2 % of 150 are 3, but a little less in binary.
    return count + 1e-9 * np.maximum(count, 1.0)
