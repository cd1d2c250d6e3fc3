"""The distribution of the number of false alarms that the conformal guarantee implies.

The threshold is the k-th highest of n calibration scores; the guarantee chooses k. Over calibrations, the fraction of
good samples above it is distributed as Beta(k, n + 1 - k), so their number among m is beta-binomial; this is exact if
scores have no ties, and approximate where cross-conformal calibration has given them. Source: Vovk, "Conditional
validity of inductive conformal predictors" (2012), section 3.
"""

from scipy.stats import betabinom, rv_discrete

from sprue.inference.calibration import Calibration


def false_alarms(calibration: Calibration, good: int) -> rv_discrete:
    """The distribution of the number of false alarms.

    Args:
        calibration: What decides.
        good: Good samples, exchangeable with the calibration samples, that are scored.

    >>> calibration = Calibration(tuple(map(float, range(19))), alpha=0.05, low=0.0, high=1.0, pixel_threshold=1.0)
    >>> alarms = false_alarms(calibration, good=20)
    >>> round(float(alarms.mean()), 6), round(float(alarms.sf(0)), 3)
    (1.0, 0.513)
    """
    return betabinom(good, calibration.rank, len(calibration.scores) + 1 - calibration.rank)


def chance_of(alarms: int, calibration: Calibration, good: int) -> float:
    """The probability of at least this many false alarms, if the samples are exchangeable.

    >>> calibration = Calibration(tuple(map(float, range(19))), alpha=0.05, low=0.0, high=1.0, pixel_threshold=1.0)
    >>> chance_of(0, calibration, good=20), round(chance_of(1, calibration, good=20), 3)
    (1.0, 0.513)
    """
    return float(false_alarms(calibration, good).sf(alarms - 1))
