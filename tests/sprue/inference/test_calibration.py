"""The false-alarm rate is what was promised, whatever the scores' distribution."""

import math

import numpy as np
import pytest

from sprue.errors import SprueError
from sprue.inference.calibration import Calibration, pictures_needed, pixel_threshold

DISTRIBUTIONS = {
    "normal": lambda rng, size: rng.normal(size=size),
    "heavy tails": lambda rng, size: rng.standard_cauchy(size=size),
    "many ties": lambda rng, size: rng.integers(0, 5, size=size).astype(float),
    "all equal": lambda rng, size: np.zeros(size),
}


def calibrated(scores: np.ndarray, alpha: float) -> Calibration:
    """Of pictures with one position each."""
    return Calibration.fit(scores, scores, alpha)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize(("pictures", "alpha"), [(19, 0.05), (50, 0.05), (153, 0.05), (40, 0.2)])
def test_at_most_alpha_of_good_pictures_are_called_anomalous(name, pictures, alpha):
    rng = np.random.default_rng(0)
    trials = 4000
    false_alarms = 0
    for _ in range(trials):
        scores = DISTRIBUTIONS[name](rng, pictures + 1)
        calibration = Calibration(tuple(np.sort(scores[:-1])), alpha, low=0.0, high=1.0)
        p_value = calibration.p_values(scores[-1:])[0]
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
        calibration = calibrated(rng.integers(0, 12, pictures).astype(float), alpha)
        scores = np.concatenate([np.array(calibration.scores), np.arange(-1, 14), rng.uniform(0, 12, 20)])
        assert np.array_equal(calibration.p_values(scores) <= alpha, scores > calibration.threshold)


def test_p_values_count_calibration_scores_that_are_at_least_as_high():
    rng = np.random.default_rng(2)
    held_out, scores = rng.integers(0, 20, 57).astype(np.float32), rng.integers(-2, 24, 200).astype(np.float32)
    expected = [(1 + sum(other >= score for other in held_out)) / 58 for score in scores]
    assert calibrated(held_out, 0.05).p_values(scores).tolist() == expected


@pytest.mark.parametrize("alpha", [0.01, 0.02, 0.05, 0.07, 0.1, 0.2, 1 / 3, 1 / 7, 0.5, 0.9])
def test_the_smallest_set_that_suffices_is_asked_for(alpha):
    needed = pictures_needed(alpha)
    assert needed >= 1
    assert 1 / (needed + 1) <= alpha
    assert needed == 1 or 1 / needed > alpha
    with pytest.raises(SprueError, match=f"needs at least {needed} calibration pictures; there are {needed - 1}"):
        calibrated(np.zeros(needed - 1), alpha)
    top = calibrated(np.arange(needed, dtype=float), alpha).p_values(np.array([needed + 1.0]))
    assert top[0] <= alpha


@pytest.mark.parametrize("alpha", [0, 1, -0.1, 1.5])
def test_alpha_is_a_rate(alpha):
    with pytest.raises(SprueError, match="not a false-alarm rate between 0 and 1"):
        calibrated(np.zeros(100), alpha)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_diverged_fit_is_not_calibrated(value):
    with pytest.raises(SprueError, match="2 calibration scores are not finite"):
        calibrated(np.array([value, value, *range(30)]), 0.05)


def test_heat_maps_span_from_the_median_to_one_position_in_a_thousand():
    calibration = Calibration.fit(np.arange(19.0), np.linspace(0, 1000, 19 * 5000).reshape(19, -1), 0.05)
    assert (calibration.low, calibration.high) == (pytest.approx(500), pytest.approx(999))


def blotched(rng: np.random.Generator, pictures: int) -> np.ndarray:
    """Maps whose pixels are alike: a picture is dull all over, or has a blotch of any size and height."""
    maps = np.repeat(rng.normal(size=(pictures, 1)), 64, axis=1)
    for each, size, height in zip(maps, rng.integers(0, 65, pictures), rng.exponential(3, pictures), strict=True):
        each[:size] += height
    return maps


MAPS = {
    "blotches": blotched,
    "heavy tails": lambda rng, pictures: rng.standard_cauchy((pictures, 64)),
    "ties": lambda rng, pictures: rng.integers(0, 4, (pictures, 64)).astype(float),
    "whole pictures": lambda rng, pictures: np.repeat(rng.normal(size=(pictures, 1)), 64, axis=1),
}


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize(("pictures", "alpha"), [(19, 0.05), (39, 0.05), (40, 0.2)])
def test_of_a_good_samples_pictures_at_most_alpha_of_the_pixels_are_marked_on_average(name, pictures, alpha, views):
    rng = np.random.default_rng(3)
    shares = []
    for _ in range(1000):
        samples = MAPS[name](rng, pictures + 1).reshape(pictures + 1, views, -1)
        levels = np.quantile(samples[:-1], np.linspace(0, 1, 501))
        shares.append((samples[-1] > pixel_threshold(samples[:-1], levels, alpha)).mean(1).max())
    assert np.mean(shares) <= alpha + 4 * np.std(shares) / math.sqrt(len(shares))
    if name == "heavy tails" and pictures > 19 and views == 1:
        # The price of a finite sample is one picture, all of it; a threshold that never marks would be no use.
        exact = alpha - (1 - alpha) / pictures
        assert np.mean(shares) >= exact - 0.01


def test_rounding_between_equal_positions_marks_nothing_more():
    evidence = np.full((19, 4), 0.1, np.float32)
    above = np.nextafter(np.float32(0.1), np.float32(1))
    calibration = Calibration.fit(np.arange(19.0), evidence, 0.05, [[np.array([0.1, above], np.float32)]] * 19)
    assert not calibration.marked(np.array([[0.1, above]], np.float32)).any()
    assert calibration.marked(np.array([[0.11]], np.float32)).all()


def test_pixels_between_the_positions_count_as_they_are_shown():
    evidence = np.repeat([[0.0, 1.0]], 19, axis=0)
    coarse = Calibration.fit(np.arange(19.0), evidence, 0.6)
    fine = Calibration.fit(np.arange(19.0), evidence, 0.6, [[np.linspace(0, 1, 1001)]] * 19)
    # (1 + 19 / 2) / 20 is below 0.6 at once; (1 + 19 (1 - t)) / 20 is from t = 8 / 19 on, and so from the next level.
    assert coarse.pixel_threshold == 0
    assert 8 / 19 <= fine.pixel_threshold < 8 / 19 + 0.02
