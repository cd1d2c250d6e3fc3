"""Figures of a ranking, from the counts at its thresholds.

Shapes: K thresholds from the highest to the lowest, P points of a curve, N items, D draws of a bootstrap; a dot stands
for leading dimensions, of which there are none or D.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.float64]

TOLERATED = 0.02
"""Share of good parts lost, or of bad parts missed, at which the plant's figures are read."""

PRO_LIMIT = 0.3
"""False-positive rate up to which the per-region overlap is integrated."""


@dataclass(frozen=True)
class Curve:
    """How much is called anomalous at each threshold; figures are NaN where one kind of items is missing.

    The thresholds are values of items; every value of an anomalous item is among them. A value of a normal item
    that is no threshold lies between two.

    Attributes:
        found: Weight of the anomalous items at or above each threshold, [., K].
        alarms: Weight of the normal items at or above, [., K].
        alarms_above: Weight of the normal items above, [., K].
        anomalous: Weight of all anomalous items, [.].
        normal: Weight of all normal items, [.].
    """

    found: Counts
    alarms: Counts
    alarms_above: Counts
    anomalous: Counts
    normal: Counts

    @classmethod
    def of_scores(
        cls,
        scores_N: NDArray[np.floating[Any]],
        labels_N: NDArray[np.integer[Any]],
        weights: NDArray[np.floating[Any]] | None = None,
    ) -> "Curve":
        """The curve of items by their scores, or several at once by weights [., N] of the items."""
        scores_N = np.asarray(scores_N, float)
        order = np.argsort(-scores_N, kind="stable")
        ranked_N = scores_N[order]
        last = np.flatnonzero(np.append(ranked_N[1:] != ranked_N[:-1], True)) if len(order) else order
        of_item = (np.ones(len(order)) if weights is None else weights)[..., order]
        is_anomalous_N = labels_N[order] == 1
        found = np.cumsum(of_item * is_anomalous_N, -1)[..., last]
        alarms = np.cumsum(of_item * ~is_anomalous_N, -1)[..., last]
        return cls.of_bins(found, alarms)

    @classmethod
    def of_bins(cls, found: Counts, alarms: Counts) -> "Curve":
        """The curve of items that count as tied within each of K bins; the lowest bin holds the last of them."""
        above = np.concatenate([np.zeros_like(alarms[..., :1]), alarms[..., :-1]], -1)
        nothing = np.zeros(found.shape[:-1])
        ends = (found[..., -1], alarms[..., -1]) if found.shape[-1] else (nothing, nothing)
        return cls(found, alarms, above, *ends)

    def polygon(self, heights: Counts) -> tuple[Counts, Counts]:
        """The points of a curve over the false-positive rate, from rate 0 to rate 1, two for each threshold.

        Between the thresholds the rate grows alone, and at one, where values are tied, rate and height grow together.

        Args:
            heights: The curve's height at each threshold, [., K].

        Returns:
            Rates and heights, [., 2 K + 2].
        """
        origin = np.zeros((*self.anomalous.shape, 1))
        before = np.concatenate([origin, heights], -1)
        rate = _over(np.stack([self.alarms_above, self.alarms], -1), self.normal[..., None, None])
        height = np.stack([before[..., :-1], heights], -1)
        flat = (*self.anomalous.shape, 2 * heights.shape[-1])
        return (
            np.concatenate([origin, rate.reshape(flat), origin + 1.0], -1),
            np.concatenate([origin, height.reshape(flat), before[..., -1:]], -1),
        )

    def roc(self) -> tuple[Counts, Counts]:
        """False-positive and true-positive rates from 0 to 1, [., P]."""
        return self.polygon(_over(self.found, self.anomalous[..., None]))

    def precision_recall(self) -> tuple[Counts, Counts]:
        """Recall and precision at the thresholds, [., K]."""
        return _over(self.found, self.anomalous[..., None]), _over(self.found, self.found + self.alarms)

    def area(self) -> Counts:
        """Area under the ROC curve, ties counted half, [.]."""
        gained = np.diff(self.found, axis=-1, prepend=0.0)
        lost = (gained * (self.alarms + self.alarms_above) / 2).sum(-1)
        return self._if_both(1.0 - _over(lost, self.anomalous * self.normal))

    def average_precision(self) -> Counts:
        """Mean precision over the anomalous items, without interpolation, [.]."""
        gained = np.diff(self.found, axis=-1, prepend=0.0)
        precision = _over(self.found, self.found + self.alarms)
        return self._if_both(_over((gained * precision).sum(-1), self.anomalous))

    def best_f1(self) -> Counts:
        """The largest F1 that a threshold reaches, [.]."""
        called = self.found + self.alarms
        return self._if_both(_over(2 * self.found, called + self.anomalous[..., None]).max(-1, initial=0.0))

    def caught(self, lost: float = TOLERATED) -> Counts:
        """Share of the anomalous items caught where at most the share `lost` of the normal ones is called, [.].

        Source, with 2 %: PB2 of Baitieva et al., "Beyond Academic Benchmarks" (2025).
        """
        allowed = self.alarms <= _rounded(lost * self.normal)[..., None]
        return self._if_both(_over((self.found * allowed).max(-1, initial=0.0), self.anomalous))

    def passed(self, missed: float = TOLERATED) -> Counts:
        """Share of the normal items passed where at most the share `missed` of the anomalous ones is, [.].

        Source, with 2 %: PG2 of Baitieva et al. (2025).
        """
        allowed = self.anomalous[..., None] - self.found <= _rounded(missed * self.anomalous)[..., None]
        fewest = np.where(allowed, self.alarms, self.normal[..., None]).min(-1, initial=np.inf)
        return self._if_both(1.0 - _over(fewest, self.normal))

    def overlap_area(self, overlap: Counts, limit: float = PRO_LIMIT) -> Counts:
        """Area under the per-region overlap up to a false-positive rate, over that rate (AUPRO), [.].

        Between two points of the curve the overlap is taken as linear, as it is where values are tied.

        Args:
            overlap: Mean over the regions of their share at or above each threshold, [., K].
            limit: The false-positive rate.

        Source: Bergmann et al., "The MVTec Anomaly Detection Dataset" (IJCV 2021).
        """
        rate_P, overlap_P = self.polygon(overlap)
        left, right = rate_P[..., :-1], rate_P[..., 1:]
        low, high = overlap_P[..., :-1], overlap_P[..., 1:]
        width = np.clip(right, None, limit) - np.clip(left, None, limit)
        inside = _over(width, right - left)
        area = (width * (low + (high - low) * inside / 2)).sum(-1)
        return self._if_both(area / limit)

    def _if_both(self, figure: Counts) -> Counts:
        return np.where((self.anomalous > 0) & (self.normal > 0), figure, np.nan)


def _over(part: Counts, whole: Counts) -> Counts:
    """``part / whole``; 0 where there is no whole."""
    part, whole = np.broadcast_arrays(part, whole)
    return np.divide(part, whole, out=np.zeros(part.shape), where=whole > 0)


def _rounded(count: Counts) -> Counts:
    # 2 % of 150 are 3, and not a little less.
    return count + 1e-9 * np.maximum(count, 1.0)
