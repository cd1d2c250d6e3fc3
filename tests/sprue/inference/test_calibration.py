"""The false-alarm rate is what was promised, whatever the scores' distribution."""

import math

import numpy as np
import pytest

from sprue.errors import SprueError
from sprue.inference.calibration import Calibration, pictures_needed

EVIDENCE = np.linspace(0.0, 1.0, 1001)

DISTRIBUTIONS = {
    "normal": lambda rng, size: rng.normal(size=size),
    "heavy tails": lambda rng, size: rng.standard_cauchy(size=size),
    "many ties": lambda rng, size: rng.integers(0, 5, size=size).astype(float),
    "all equal": lambda rng, size: np.zeros(size),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize(("pictures", "alpha"), [(19, 0.05), (50, 0.05), (153, 0.05), (40, 0.2)])
def test_at_most_alpha_of_good_pictures_are_called_anomalous(name, pictures, alpha):
    rng = np.random.default_rng(0)
    trials = 4000
    false_alarms = 0
    for _ in range(trials):
        scores = DISTRIBUTIONS[name](rng, pictures + 1)
        p_value = Calibration.fit(scores[:-1], EVIDENCE, alpha).p_values(scores[-1:])[0]
        false_alarms += p_value <= alpha
    error = math.sqrt(alpha * (1 - alpha) / trials)
    assert false_alarms / trials <= alpha + 4 * error
    if name in ("normal", "heavy tails"):
        # Without ties the rate is exactly this; a calibration that never alarms would be no use.
        exact = math.floor(alpha * (pictures + 1) + 1e-9) / (pictures + 1)
        assert false_alarms / trials >= exact - 4 * error


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.07, 0.1, 0.15, 0.29, 1 / 3, 0.5])
def test_the_threshold_decides_as_the_p_values_do(alpha):
    rng = np.random.default_rng(1)
    needed = pictures_needed(alpha)
    for pictures in range(needed, needed + 40):
        calibration = Calibration.fit(rng.integers(0, 12, pictures).astype(float), EVIDENCE, alpha)
        scores = np.concatenate([np.array(calibration.scores), np.arange(-1, 14), rng.uniform(0, 12, 20)])
        assert np.array_equal(calibration.p_values(scores) <= alpha, scores > calibration.threshold)


def test_p_values_count_calibration_scores_that_are_at_least_as_high():
    rng = np.random.default_rng(2)
    calibrated, scores = rng.integers(0, 20, 57).astype(np.float32), rng.integers(-2, 24, 200).astype(np.float32)
    expected = [(1 + sum(other >= score for other in calibrated)) / 58 for score in scores]
    assert Calibration.fit(calibrated, EVIDENCE, 0.05).p_values(scores).tolist() == expected


@pytest.mark.parametrize("alpha", [0.01, 0.02, 0.05, 0.07, 0.1, 0.2, 1 / 3, 1 / 7, 0.5, 0.9])
def test_the_smallest_set_that_suffices_is_asked_for(alpha):
    needed = pictures_needed(alpha)
    assert needed >= 1
    assert 1 / (needed + 1) <= alpha
    assert needed == 1 or 1 / needed > alpha
    with pytest.raises(SprueError, match=f"needs at least {needed} calibration pictures; there are {needed - 1}"):
        Calibration.fit(np.zeros(needed - 1), EVIDENCE, alpha)
    top = Calibration.fit(np.arange(needed, dtype=float), EVIDENCE, alpha).p_values(np.array([needed + 1.0]))
    assert top[0] <= alpha


@pytest.mark.parametrize("alpha", [0, 1, -0.1, 1.5])
def test_alpha_is_a_rate(alpha):
    with pytest.raises(SprueError, match="not a false-alarm rate between 0 and 1"):
        Calibration.fit(np.zeros(100), EVIDENCE, alpha)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_diverged_fit_is_not_calibrated(value):
    with pytest.raises(SprueError, match="2 calibration scores are not finite"):
        Calibration.fit(np.array([value, value, *range(30)]), EVIDENCE, 0.05)


def test_heat_maps_span_from_the_median_to_one_position_in_a_thousand():
    calibration = Calibration.fit(np.arange(19.0), np.linspace(0, 1000, 100_001).reshape(-1, 1), 0.05)
    assert (calibration.low, calibration.high) == (pytest.approx(500), pytest.approx(999))
