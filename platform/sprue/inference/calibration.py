"""Split-conformal calibration: what a score means, from held-out good pictures alone.

Shapes: N calibration pictures, B scored pictures.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sprue.errors import SprueError


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

    >>> calibration = Calibration(tuple(float(i) for i in range(19)), alpha=0.05, low=0.0, high=1.0)
    >>> calibration.p_values(np.array([-1.0, 9.0, 18.0, 18.5])).tolist()
    [1.0, 0.55, 0.1, 0.05]
    >>> calibration.threshold
    18.0
    """

    scores: tuple[float, ...]
    alpha: float
    low: float
    high: float

    @classmethod
    def fit(
        cls, scores_N: NDArray[np.floating[Any]], evidence: NDArray[np.floating[Any]], alpha: float
    ) -> "Calibration":
        """Calibrates on good pictures that had no part in fitting.

        Args:
            scores_N: Their scores.
            evidence: The evidence of all their positions, of any shape.
            alpha: The false-alarm rate wanted.

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
        return cls(tuple(sorted(float(score) for score in scores_N)), alpha, float(low), float(high))

    def p_values(self, scores_B: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        """Conformal p-values, ``(1 + #{calibration >= score}) / (N + 1)``, [B]."""
        at_least_B = len(self.scores) - np.searchsorted(self.scores, scores_B, side="left")
        return (1 + at_least_B) / (len(self.scores) + 1)

    @property
    def threshold(self) -> float:
        """A score is anomalous exactly if it is above this calibration score."""
        allowed = math.floor(self.alpha * (len(self.scores) + 1) + 1e-9) - 1
        return self.scores[len(self.scores) - 1 - allowed]
