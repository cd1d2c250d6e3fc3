"""What the guarantee implies for a count: how many false alarms there may be among so many good pictures.

Of n calibration scores, the threshold leaves a = floor(alpha (n + 1)) ranks above it. The share of good pictures above
it is then distributed over calibrations as Beta(a, n + 1 - a), and their number among m is beta-binomial, exactly where
scores have no ties. Source: Vovk, "Conditional validity of inductive conformal predictors" (2012), section 3.
"""

import math

from scipy.stats import betabinom, rv_discrete


def false_alarms(calibration: int, alpha: float, good: int) -> rv_discrete:
    """The distribution of the number of false alarms.

    Args:
        calibration: How many pictures the threshold was calibrated on.
        alpha: The false-alarm rate wanted.
        good: How many good pictures, exchangeable with these, are judged.

    >>> alarms = false_alarms(calibration=19, alpha=0.05, good=20)
    >>> round(float(alarms.mean()), 6), round(float(alarms.sf(0)), 3)
    (1.0, 0.513)
    """
    above = math.floor(alpha * (calibration + 1) + 1e-9)
    return betabinom(good, above, calibration + 1 - above)


def chance_of(alarms: int, calibration: int, alpha: float, good: int) -> float:
    """The probability of that many false alarms or more, if the guarantee's conditions hold.

    >>> chance_of(alarms=0, calibration=19, alpha=0.05, good=20)
    1.0
    """
    return float(false_alarms(calibration, alpha, good).sf(alarms - 1))
