"""Split-conformal calibration: what a score and a map mean, from held-out good pictures alone.

Shapes: N calibration pictures, B scored pictures, H rows, W columns and P pixels of a picture, K levels.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sprue.errors import SprueError

LEVELS = 2001
"""Quantiles of the positions' evidence that the pixels' threshold is chosen from."""


def pictures_needed(alpha: float) -> int:
    """The smallest calibration set with which a p-value can reach `alpha`: ``1 / (n + 1) <= alpha``.

    Raises:
        SprueError: If `alpha` is not between 0 and 1.

    >>> pictures_needed(0.05), pictures_needed(0.01)
    (19, 99)
    """
    if not 0 < alpha < 1:
        raise SprueError(f"alpha: {alpha} is not a false-alarm rate between 0 and 1")
    n = math.ceil(1 / alpha) - 1
    # 1 / alpha may be a rounding error above or below a whole number.
    return n - 1 if n > 1 and 1 / n <= alpha else n


def pixel_threshold(
    samples: Iterable[Sequence[NDArray[np.floating[Any]]]], levels_K: NDArray[np.floating[Any]], alpha: float
) -> float:
    """The lowest level above which at most `alpha` of the pixels of a good sample's pictures are to be expected.

    That is conformal risk control (Angelopoulos, Bates, Fisch, Lei and Schuster, "Conformal Risk Control", 2022,
    theorem 1). A sample's loss at a level is the share of pixels above it in its picture with the largest. It falls
    with the level and is at most 1, so at the lowest level with ``(1 + sum of the N losses) / (N + 1) <= alpha`` the
    expected loss of a good sample that is exchangeable with these N is at most `alpha`. Levels that are themselves
    quantiles of the calibration's evidence change nothing: to choose from fewer of them can only raise the level.

    It is an expectation over samples and calibrations. Neighbouring pixels are alike and no two places of a part are
    exchangeable, so nothing is promised of a single pixel, place or part.

    Args:
        samples: For each calibration sample the values of its pictures' maps, each [P].
        levels_K: The levels to choose from, ascending; above the last there is no pixel.
        alpha: The share that is wanted, for which there are enough samples; see `pictures_needed`.

    Raises:
        SprueError: If there are too few.

    >>> samples = [[np.arange(100.0)]] * 19
    >>> pixel_threshold(samples, np.arange(100.0), alpha=0.05), pixel_threshold(samples, np.arange(100.0), alpha=0.1)
    (99.0, 94.0)
    """
    losses_K, count = np.zeros(len(levels_K)), 0
    for maps in samples:
        losses_K += np.max([_shares_above(values_P, levels_K) for values_P in maps], axis=0)
        count += 1
    fits_K = (1 + losses_K) / (1 + count) <= alpha + 1e-12
    if not fits_K.any():
        raise SprueError(
            f"alpha {alpha} needs at least {pictures_needed(alpha)} calibration samples; there are {count}"
        )
    return float(levels_K[fits_K.argmax()])


def _shares_above(values_P: NDArray[np.floating[Any]], levels_K: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """The share of a map's values above each level, [K]."""
    between_K = np.bincount(np.searchsorted(levels_K, values_P), minlength=len(levels_K))[: len(levels_K)]
    return 1 - np.cumsum(between_K) / len(values_P)


@dataclass(frozen=True)
class Calibration:
    """Scores of held-out good pictures, which turn a new score into a p-value.

    A good picture that is exchangeable with the calibration pictures is called anomalous with probability at
    most `alpha`, whatever the scores' distribution. Source: Vovk, Gammerman, Shafer, "Algorithmic Learning in a
    Random World" (2005); Laxhammar and Falkman (2015) for anomaly detection.

    Attributes:
        scores: The calibration scores, ascending.
        alpha: The false-alarm rate.
        low: Median evidence of a position in the calibration pictures; where a heat map begins.
        high: 99.9 % quantile of that evidence.
        pixel_threshold: A pixel is marked exactly if its map is above it; see the function of that name. None in
            detectors of earlier releases, which mark nothing.

    >>> scores = tuple(float(i) for i in range(19))
    >>> calibration = Calibration(scores, alpha=0.05, low=0.0, high=1.0, pixel_threshold=1.0)
    >>> calibration.p_values(np.array([-1.0, 9.0, 18.0, 18.5])).tolist()
    [1.0, 0.55, 0.1, 0.05]
    >>> calibration.threshold
    18.0
    """

    scores: tuple[float, ...]
    alpha: float
    low: float
    high: float
    pixel_threshold: float | None = None

    @classmethod
    def fit(
        cls,
        scores_N: NDArray[np.floating[Any]],
        evidence: NDArray[np.floating[Any]],
        alpha: float,
        maps: Iterable[Sequence[NDArray[np.floating[Any]]]] | None = None,
    ) -> "Calibration":
        """Calibrates on good pictures that had no part in fitting.

        Args:
            scores_N: Their scores.
            evidence: The evidence of their positions, [N, ...].
            alpha: The false-alarm rate wanted.
            maps: For each the pixels of its pictures' maps, each [P], which lie between the positions; as if the
                positions were the pixels of one map if None.

        Raises:
            SprueError: If there are too few pictures for `alpha`, or a score is not finite.
        """
        needed = pictures_needed(alpha)
        if len(scores_N) < needed:
            raise SprueError(f"alpha {alpha} needs at least {needed} calibration pictures; there are {len(scores_N)}")
        if not np.isfinite(scores_N).all():
            raise SprueError(
                f"{int((~np.isfinite(scores_N)).sum())} calibration scores are not finite: the fit has diverged"
            )
        low, high = np.quantile(evidence, (0.5, 0.999))
        levels_K = np.quantile(evidence, np.linspace(0, 1, LEVELS)).astype(np.float32)
        # What lies between equal positions can be a rounding error above them.
        levels_K[-1] += 1e-6 * max(1.0, abs(levels_K[-1]))
        marked = pixel_threshold(evidence.reshape(len(scores_N), 1, -1) if maps is None else maps, levels_K, alpha)
        return cls(tuple(sorted(float(score) for score in scores_N)), alpha, float(low), float(high), marked)

    def marked(self, map_HW: NDArray[np.floating[Any]]) -> NDArray[np.bool_]:
        """Which pixels of an anomaly map are marked, [H, W]."""
        return map_HW > (np.inf if self.pixel_threshold is None else self.pixel_threshold)

    def p_values(self, scores_B: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        """Conformal p-values, ``(1 + #{calibration >= score}) / (N + 1)``, [B]."""
        at_least_B = len(self.scores) - np.searchsorted(self.scores, scores_B, side="left")
        return (1 + at_least_B) / (len(self.scores) + 1)

    @property
    def threshold(self) -> float:
        """A score is anomalous exactly if it is above this calibration score."""
        allowed = math.floor(self.alpha * (len(self.scores) + 1) + 1e-9) - 1
        return self.scores[len(self.scores) - 1 - allowed]
