"""Conformal calibration: what a score and an anomaly map mean, from held-out good samples alone.

Shapes: N calibration samples, B scored samples, H rows, W columns and P pixels of an image, K levels.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import betainc, betaincinv

from sprue.config import Guarantee
from sprue.errors import SprueError

VERSION = 1
"""Of scoring and calibration: changes when a sample's score, a threshold or a p-value changes.

A test pins a small numerical result to the version.
"""

LEVELS = 2001
"""Number of quantiles of the position scores that `pixel_threshold` chooses from."""

CONFIDENCE = 0.95
"""Of the conditional guarantee, if nothing else is said."""

RATE_COVERAGE = 0.9
"""Probability that the true false-alarm rate lies in `Calibration.false_alarm_rates`."""


def threshold_rank(
    samples: int, alpha: float, guarantee: Guarantee = "marginal", confidence: float = CONFIDENCE
) -> int:
    """Which calibration score, counted from the highest, is the threshold; 0 if there are too few samples for one.

    A score above the k-th highest of n calibration scores has a p-value of at most ``k / (n + 1)``. Over calibrations,
    the false-alarm rate of that threshold is distributed as Beta(k, n + 1 - k) if the scores are continuous, and
    stochastically smaller if they have ties (Vovk, "Conditional validity of inductive conformal predictors", 2012). The
    rank is the largest k at which the guarantee holds:

    - marginal: the mean rate ``k / (n + 1)`` is at most `alpha`;
    - conditional on the calibration: the rate is at most `alpha` with a probability of at least `confidence`.

    >>> threshold_rank(19, 0.05), threshold_rank(100, 0.05), threshold_rank(100, 0.05, "conditional")
    (1, 5, 2)
    """
    if guarantee == "marginal":
        return math.floor(alpha * (samples + 1) + 1e-9)
    ranks_K = np.arange(1, samples + 1)
    # The probability falls with the rank.
    return int((betainc(ranks_K, samples + 1 - ranks_K, alpha) >= confidence).sum())


def calibration_samples_needed(alpha: float, guarantee: Guarantee = "marginal", confidence: float = CONFIDENCE) -> int:
    """The size of the smallest calibration set that has a threshold.

    A p-value must be able to reach `alpha`: ``1 / (n + 1) <= alpha``. The pixel threshold needs that, too. The
    conditional guarantee needs ``1 - (1 - alpha) ** n >= confidence`` as well.

    Raises:
        SprueError: If `alpha` or `confidence` is not between 0 and 1.

    >>> calibration_samples_needed(0.05), calibration_samples_needed(0.01)
    (19, 99)
    >>> calibration_samples_needed(0.05, "conditional"), calibration_samples_needed(0.01, "conditional")
    (59, 299)
    """
    if not 0 < alpha < 1:
        raise SprueError(f"alpha: {alpha} is not a false-alarm rate between 0 and 1")
    if not 0 < confidence < 1:
        raise SprueError(f"confidence: {confidence} is not a probability between 0 and 1")
    n = math.ceil(1 / alpha) - 1
    # 1 / alpha may be a rounding error above or below an integer.
    n = n - 1 if n > 1 and 1 / n <= alpha else n
    if guarantee == "conditional":
        # The quotient may be such an error, too.
        n = max(n, math.floor(math.log1p(-confidence) / math.log1p(-alpha)) - 1)
        while not threshold_rank(n, alpha, guarantee, confidence):
            n += 1
    return n


def cross_conformal_bound(samples: int, folds: int, alpha: float) -> float:
    """The false-alarm rate that is proven for cross-conformal calibration, on average over calibrations.

    Source: Barber, Candès, Ramdas, Tibshirani, "Predictive inference with the jackknife+" (2021), theorem 4, which
    builds on Vovk, "Cross-conformal predictors" (2015). It is about the comparison of a new sample with each fold by
    the flow that was fitted without that fold. The mean of the flows, which `Calibration` compares with all folds at
    once, is not covered; its rate has to be measured.

    >>> round(cross_conformal_bound(760, 5, 0.05), 4)
    0.1105
    """
    excess = min(2 * (1 - 1 / folds) / (samples / folds + 1), (1 - folds / samples) / (folds + 1))
    return min(1.0, 2 * alpha + excess)


def pixel_threshold(
    samples: Iterable[Sequence[NDArray[np.floating[Any]]]], levels_K: NDArray[np.floating[Any]], alpha: float
) -> float:
    """The lowest level above which at most `alpha` of the pixels of a good sample's images are expected.

    This is conformal risk control (Angelopoulos, Bates, Fisch, Lei and Schuster, "Conformal Risk Control", 2022,
    theorem 1). A sample's loss at a level is the fraction of pixels above it, in the image where it is largest. The
    loss falls with the level and is at most 1. So at the lowest level with ``(1 + sum of the N losses) / (N + 1) <=
    alpha`` the expected loss of a good sample that is exchangeable with these N is at most `alpha`. That the levels are
    quantiles of the calibration's own position scores changes nothing: a choice of fewer levels can only raise the
    result.

    The bound is an expectation over samples and calibrations. Neighbouring pixels are correlated and no two positions
    of a part are exchangeable, so it does not hold for a single pixel, position or part.

    Args:
        samples: For each calibration sample the values of its images' anomaly maps, each [P].
        levels_K: The levels to choose from, ascending; above the last there is no pixel.
        alpha: The expected fraction.

    Raises:
        SprueError: If there are too few samples for `alpha`; see `calibration_samples_needed`.

    >>> samples = [[np.arange(100.0)]] * 19
    >>> pixel_threshold(samples, np.arange(100.0), alpha=0.05), pixel_threshold(samples, np.arange(100.0), alpha=0.1)
    (99.0, 94.0)
    """
    losses_K, count = np.zeros(len(levels_K)), 0
    for maps in samples:
        losses_K += np.max([_fractions_above(values_P, levels_K) for values_P in maps], axis=0)
        count += 1
    fits_K = (1 + losses_K) / (1 + count) <= alpha + 1e-12
    if not fits_K.any():
        raise SprueError(
            f"alpha {alpha} needs at least {calibration_samples_needed(alpha)} calibration samples; there are {count}"
        )
    return float(levels_K[fits_K.argmax()])


def _fractions_above(values_P: NDArray[np.floating[Any]], levels_K: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """The fraction of a map's values above each level, [K]."""
    between_K = np.bincount(np.searchsorted(levels_K, values_P), minlength=len(levels_K))[: len(levels_K)]
    return 1 - np.cumsum(between_K) / len(values_P)


@dataclass(frozen=True)
class Calibration:
    """Scores of held-out good samples, which turn a new score into a p-value and a decision.

    A good sample that is exchangeable with the calibration samples has a p-value of at most `alpha` with probability at
    most `alpha`, whatever the scores' distribution. Source: Vovk, Gammerman, Shafer, "Algorithmic Learning in a
    Random World" (2005); Laxhammar and Falkman (2015) for anomaly detection. The marginal guarantee calls these samples
    anomalous. The conditional one calls fewer of them anomalous; see `threshold_rank`.

    Attributes:
        scores: The calibration scores, ascending.
        alpha: The false-alarm rate.
        low: Median of the calibration samples' position scores; the heat map is 0 there.
        high: 99.9 % quantile of these position scores.
        pixel_threshold: The predicted mask is where the anomaly map is above it; see the function of that name. Its
            promise is an average over samples and calibrations under both guarantees.
        guarantee: What `alpha` promises of the decisions.
        confidence: Of the conditional guarantee.
        folds: How many flows have given the scores, each those of the fold that it was fitted without; 1 where a
            calibration set was held out. See `cross_conformal_bound`.

    >>> scores = tuple(float(i) for i in range(19))
    >>> calibration = Calibration(scores, alpha=0.05, low=0.0, high=1.0, pixel_threshold=1.0)
    >>> calibration.p_values(np.array([-1.0, 9.0, 18.0, 18.5])).tolist()
    [1.0, 0.55, 0.1, 0.05]
    >>> calibration.threshold
    18.0
    >>> [round(rate, 4) for rate in calibration.false_alarm_rates]
    [0.0027, 0.1459]
    """

    scores: tuple[float, ...]
    alpha: float
    low: float
    high: float
    pixel_threshold: float
    guarantee: Guarantee = "marginal"
    confidence: float = CONFIDENCE
    folds: int = 1

    @classmethod
    def fit(
        cls,
        scores_N: NDArray[np.floating[Any]],
        position_scores: NDArray[np.floating[Any]],
        alpha: float,
        maps: Iterable[Sequence[NDArray[np.floating[Any]]]] | None = None,
        guarantee: Guarantee = "marginal",
        confidence: float = CONFIDENCE,
        folds: int = 1,
    ) -> "Calibration":
        """Calibrates on good samples that were not used to fit.

        Args:
            scores_N: Their scores.
            position_scores: The scores of their positions, [N, ...].
            alpha: The false-alarm rate.
            maps: For each sample the pixels of its images' anomaly maps, each [P]. If None, each sample's position
                scores are the pixels of one map.
            guarantee: What `alpha` promises of the decisions; see `threshold_rank`.
            confidence: Of the conditional guarantee.
            folds: How many flows have given the scores.

        Raises:
            SprueError: If there are too few samples for `alpha` and the guarantee, or a score is not finite.
        """
        _require_enough(len(scores_N), alpha, guarantee, confidence)
        if not np.isfinite(scores_N).all():
            raise SprueError(
                f"{int((~np.isfinite(scores_N)).sum())} calibration scores are not finite: the fit has diverged"
            )
        low, high = np.quantile(position_scores, (0.5, 0.999))
        levels_K = np.quantile(position_scores, np.linspace(0, 1, LEVELS)).astype(np.float32)
        # A pixel between equal positions can be a rounding error above them.
        levels_K[-1] += 1e-6 * max(1.0, abs(levels_K[-1]))
        if maps is None:
            maps = position_scores.reshape(len(scores_N), 1, -1)
        return cls(
            scores=tuple(sorted(float(score) for score in scores_N)),
            alpha=alpha,
            low=float(low),
            high=float(high),
            pixel_threshold=pixel_threshold(maps, levels_K, alpha),
            guarantee=guarantee,
            confidence=confidence,
            folds=folds,
        )

    def predicted_mask(self, map_HW: NDArray[np.floating[Any]]) -> NDArray[np.bool_]:
        """The pixels of an anomaly map that are predicted to be defective, [H, W]."""
        return map_HW > self.pixel_threshold

    def p_values(self, scores_B: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        """Conformal p-values, ``(1 + #{calibration >= score}) / (N + 1)``, [B]; the same under both guarantees."""
        return (1 + self._at_least(scores_B)) / (len(self.scores) + 1)

    def is_anomalous(self, scores_B: NDArray[np.floating[Any]]) -> NDArray[np.bool_]:
        """Whether scores are above the threshold, [B]; under the marginal guarantee, p-values of at most `alpha`."""
        return self._at_least(scores_B) < self.rank

    def _at_least(self, scores_B: NDArray[np.floating[Any]]) -> NDArray[np.integer[Any]]:
        """Number of calibration scores that are at least as high as each score, [B]."""
        return len(self.scores) - np.searchsorted(self.scores, scores_B, side="left")

    @property
    def rank(self) -> int:
        """Which calibration score, counted from the highest, is the threshold; see `threshold_rank`."""
        return threshold_rank(len(self.scores), self.alpha, self.guarantee, self.confidence)

    @property
    def threshold(self) -> float:
        """The calibration score above which a score is anomalous."""
        return self.threshold_under(self.guarantee)

    def threshold_under(self, guarantee: Guarantee) -> float:
        """What the threshold is under a guarantee; infinite if there are too few samples for that one."""
        rank = threshold_rank(len(self.scores), self.alpha, guarantee, self.confidence)
        return self.scores[-rank] if rank else math.inf

    @property
    def false_alarm_rates(self) -> tuple[float, float]:
        """The rates between which the true false-alarm rate of this threshold lies, with probability `RATE_COVERAGE`.

        These are quantiles of Beta(k, n + 1 - k); see `threshold_rank`. Ties among the scores lower the true rate. With
        several folds it holds as far as the flows' mean scores new good samples as each flow scores its held-out ones.
        """
        tail = (1 - RATE_COVERAGE) / 2
        low, high = betaincinv(self.rank, len(self.scores) + 1 - self.rank, (tail, 1 - tail))
        return float(low), float(high)


def _require_enough(samples: int, alpha: float, guarantee: Guarantee, confidence: float) -> None:
    needed = calibration_samples_needed(alpha, guarantee, confidence)
    if samples >= needed:
        return
    found = f"needs at least {needed} calibration samples; there are {samples}"
    if guarantee == "marginal":
        raise SprueError(f"alpha {alpha} {found}")
    raise SprueError(
        f"alpha {alpha} with confidence {confidence} (calibration.guarantee: conditional) {found}. Hold out more good "
        "images (manifest.calibration), add some, raise calibration.alpha, or set calibration.guarantee to marginal"
    )
