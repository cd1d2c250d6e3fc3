"""The false-alarm rate is at most alpha, whatever the scores' distribution: on average, or with confidence."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import beta, binom

from defectflow import build_flow
from sprue.config import ScoringSettings
from sprue.errors import SprueError
from sprue.inference.calibration import (
    VERSION,
    Calibration,
    calibration_samples_needed,
    pixel_threshold,
    threshold_rank,
)
from sprue.inference.detector import anomaly_map, score_features

DISTRIBUTIONS = {
    "normal": lambda rng, size: rng.normal(size=size),
    "heavy tails": lambda rng, size: rng.standard_cauchy(size=size),
    "many ties": lambda rng, size: rng.integers(0, 5, size=size).astype(float),
    "all equal": lambda rng, size: np.zeros(size),
}


def calibrated(scores: np.ndarray, alpha: float, guarantee="marginal", confidence=0.95) -> Calibration:
    """Of images with one position each."""
    return Calibration.fit(scores, scores, alpha, guarantee=guarantee, confidence=confidence)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize(("images", "alpha"), [(19, 0.05), (50, 0.05), (153, 0.05), (40, 0.2)])
def test_at_most_alpha_of_good_images_are_called_anomalous(name, images, alpha):
    rng = np.random.default_rng(0)
    trials = 4000
    false_alarms = 0
    for _ in range(trials):
        scores = DISTRIBUTIONS[name](rng, images + 1)
        calibration = Calibration(tuple(np.sort(scores[:-1])), alpha, low=0.0, high=1.0, pixel_threshold=1.0)
        p_value = calibration.p_values(scores[-1:])[0]
        false_alarms += p_value <= alpha
    error = math.sqrt(alpha * (1 - alpha) / trials)
    assert false_alarms / trials <= alpha + 4 * error
    if name in ("normal", "heavy tails"):
        # Without ties the rate is exactly this; a calibration that never alarms would be no use.
        exact = math.floor(alpha * (images + 1) + 1e-9) / (images + 1)
        assert false_alarms / trials >= exact - 4 * error


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.07, 0.1, 0.15, 0.29, 1 / 3, 0.5])
def test_the_threshold_decides_as_the_p_values_do(alpha):
    rng = np.random.default_rng(1)
    needed = calibration_samples_needed(alpha)
    for images in range(needed, needed + 40):
        calibration = calibrated(rng.integers(0, 12, images).astype(float), alpha)
        scores = np.concatenate([np.array(calibration.scores), np.arange(-1, 14), rng.uniform(0, 12, 20)])
        assert np.array_equal(calibration.p_values(scores) <= alpha, scores > calibration.threshold)
        assert np.array_equal(calibration.is_anomalous(scores), scores > calibration.threshold)


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.07, 0.1, 1 / 3])
def test_the_conditional_guarantee_chooses_the_lowest_threshold_that_keeps_it(alpha):
    """The rate above the k-th highest score is at most alpha where k scores or more are among the highest alpha."""
    for confidence in (0.8, 0.95, 0.99):
        needed = calibration_samples_needed(alpha, "conditional", confidence)
        for samples in (needed, needed + 1, 2 * needed, 1000):
            rank = threshold_rank(samples, alpha, "conditional", confidence)
            assert rank >= 1
            assert binom.sf(rank - 1, samples, alpha) >= confidence > binom.sf(rank, samples, alpha)


def test_the_conditional_threshold_decides_ties_and_p_values_stay():
    rng = np.random.default_rng(6)
    for samples in range(59, 140):
        held_out = rng.integers(0, 12, samples).astype(float)
        marginal, conditional = calibrated(held_out, 0.05), calibrated(held_out, 0.05, "conditional")
        scores = np.concatenate([held_out, np.arange(-1, 14), rng.uniform(0, 12, 20)])
        assert np.array_equal(conditional.is_anomalous(scores), scores > conditional.threshold)
        assert np.array_equal(conditional.p_values(scores), marginal.p_values(scores))
        assert conditional.threshold == marginal.threshold_under("conditional") >= marginal.threshold
        assert marginal.threshold == conditional.threshold_under("marginal")
        # The limits of the pixels are a promise of their own.
        assert conditional.pixel_threshold == marginal.pixel_threshold


def test_more_samples_a_higher_alpha_and_a_lower_confidence_never_lower_the_rank():
    ranks = np.array(
        [
            [
                [threshold_rank(samples, alpha, "conditional", confidence) for confidence in (0.99, 0.95, 0.8)]
                for alpha in (0.01, 0.05, 0.1, 0.3)
            ]
            for samples in range(10, 400, 7)
        ]
    )
    for axis in range(3):
        steps = np.diff(ranks, axis=axis)
        assert steps.min() >= 0 and steps.max() > 0


@pytest.mark.parametrize(
    ("alpha", "confidence", "needed"), [(0.05, 0.95, 59), (0.01, 0.95, 299), (0.1, 0.95, 29), (0.05, 0.99, 90)]
)
def test_the_samples_that_the_conditional_guarantee_needs_are_told(alpha, confidence, needed):
    assert calibration_samples_needed(alpha, "conditional", confidence) == needed
    assert 1 - (1 - alpha) ** needed >= confidence > 1 - (1 - alpha) ** (needed - 1)
    calibrated(np.arange(float(needed)), alpha, "conditional", confidence)
    with pytest.raises(SprueError, match=f"needs at least {needed} calibration samples; there are {needed - 1}"):
        calibrated(np.arange(float(needed - 1)), alpha, "conditional", confidence)


def test_too_few_samples_for_the_other_guarantee_have_no_finite_threshold():
    calibration = calibrated(np.arange(58.0), 0.05)
    assert calibration.threshold_under("conditional") == math.inf


def test_a_low_confidence_needs_no_fewer_samples_than_a_p_value_of_alpha():
    assert calibration_samples_needed(0.05, "conditional", 0.5) == calibration_samples_needed(0.05)
    assert calibrated(np.arange(19.0), 0.05, "conditional", 0.5).rank == 1


@pytest.mark.parametrize("confidence", [0, 1, -0.1, 1.5])
def test_confidence_is_a_probability(confidence):
    with pytest.raises(SprueError, match="not a probability between 0 and 1"):
        calibrated(np.arange(100.0), 0.05, "conditional", confidence)


@pytest.mark.parametrize(("samples", "alpha", "guarantee"), [(19, 0.05, "marginal"), (100, 0.1, "conditional")])
def test_the_true_false_alarm_rate_lies_between_quantiles_of_the_beta_law(samples, alpha, guarantee):
    calibration = calibrated(np.arange(float(samples)), alpha, guarantee)
    law = beta(calibration.rank, samples + 1 - calibration.rank)
    assert calibration.false_alarm_rates == pytest.approx((law.ppf(0.05), law.ppf(0.95)), rel=1e-9)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("samples", "alpha"), [(59, 0.05), (150, 0.05), (99, 0.1)])
def test_both_guarantees_keep_their_promise(samples, alpha, ties):
    """Of uniform scores the true rate of a threshold is known: what is above it. Ties are scores rounded up."""
    rng, trials, steps = np.random.default_rng(7), 3000, 40
    rates = {"marginal": [], "conditional": []}
    inside = 0
    for _ in range(trials):
        scores = rng.uniform(size=samples)
        scores = np.sort(np.ceil(scores * steps) / steps if ties else scores)
        for guarantee, found in rates.items():
            calibration = Calibration(tuple(scores), alpha, 0.0, 1.0, 1.0, guarantee)
            found.append(1 - calibration.threshold)
        low, high = calibration.false_alarm_rates
        inside += low <= found[-1] <= high
    mean, exceed = np.mean(rates["marginal"]), np.mean(np.array(rates["conditional"]) > alpha + 1e-12)
    error = math.sqrt(0.05 * 0.95 / trials)
    assert mean <= alpha + 4 * np.std(rates["marginal"]) / math.sqrt(trials)
    assert exceed <= 0.05 + 4 * error
    # On average is not for sure: without ties, the rate is above alpha in about four calibrations of ten.
    assert ties or np.mean(np.array(rates["marginal"]) > alpha) > 0.35
    if not ties:
        rank = calibration.rank
        assert exceed == pytest.approx(beta.sf(alpha, rank, samples + 1 - rank), abs=4 * error)
        assert inside / trials == pytest.approx(0.9, abs=4 * math.sqrt(0.09 / trials))


def test_p_values_count_calibration_scores_that_are_at_least_as_high():
    rng = np.random.default_rng(2)
    held_out, scores = rng.integers(0, 20, 57).astype(np.float32), rng.integers(-2, 24, 200).astype(np.float32)
    expected = [(1 + sum(other >= score for other in held_out)) / 58 for score in scores]
    assert calibrated(held_out, 0.05).p_values(scores).tolist() == expected


@pytest.mark.parametrize("alpha", [0.01, 0.02, 0.05, 0.07, 0.1, 0.2, 1 / 3, 1 / 7, 0.5, 0.9])
def test_the_smallest_set_that_suffices_is_asked_for(alpha):
    needed = calibration_samples_needed(alpha)
    assert needed >= 1
    assert 1 / (needed + 1) <= alpha
    assert needed == 1 or 1 / needed > alpha
    with pytest.raises(SprueError, match=f"needs at least {needed} calibration samples; there are {needed - 1}"):
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


def blotched(rng: np.random.Generator, images: int) -> np.ndarray:
    """Maps whose pixels are alike: an image is dull all over, or has a blotch of any size and height."""
    maps = np.repeat(rng.normal(size=(images, 1)), 64, axis=1)
    for each, size, height in zip(maps, rng.integers(0, 65, images), rng.exponential(3, images), strict=True):
        each[:size] += height
    return maps


MAPS = {
    "blotches": blotched,
    "heavy tails": lambda rng, images: rng.standard_cauchy((images, 64)),
    "ties": lambda rng, images: rng.integers(0, 4, (images, 64)).astype(float),
    "constant images": lambda rng, images: np.repeat(rng.normal(size=(images, 1)), 64, axis=1),
}


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize(("images", "alpha"), [(19, 0.05), (39, 0.05), (40, 0.2)])
def test_of_a_good_samples_images_at_most_alpha_of_the_pixels_are_predicted_on_average(name, images, alpha, views):
    rng = np.random.default_rng(3)
    fractions = []
    for _ in range(1000):
        samples = MAPS[name](rng, images + 1).reshape(images + 1, views, -1)
        levels = np.quantile(samples[:-1], np.linspace(0, 1, 501))
        fractions.append((samples[-1] > pixel_threshold(samples[:-1], levels, alpha)).mean(1).max())
    assert np.mean(fractions) <= alpha + 4 * np.std(fractions) / math.sqrt(len(fractions))
    if name == "heavy tails" and images > 19 and views == 1:
        # The price of a finite sample is one image, all of it; a threshold above every pixel would be no use.
        exact = alpha - (1 - alpha) / images
        assert np.mean(fractions) >= exact - 0.01


def test_rounding_between_equal_positions_predicts_no_pixel():
    position_scores = np.full((19, 4), 0.1, np.float32)
    above = np.nextafter(np.float32(0.1), np.float32(1))
    calibration = Calibration.fit(np.arange(19.0), position_scores, 0.05, [[np.array([0.1, above], np.float32)]] * 19)
    assert not calibration.predicted_mask(np.array([[0.1, above]], np.float32)).any()
    assert calibration.predicted_mask(np.array([[0.11]], np.float32)).all()


def test_pixels_between_the_positions_count_as_they_are_shown():
    position_scores = np.repeat([[0.0, 1.0]], 19, axis=0)
    coarse = Calibration.fit(np.arange(19.0), position_scores, 0.6)
    fine = Calibration.fit(np.arange(19.0), position_scores, 0.6, [[np.linspace(0, 1, 1001)]] * 19)
    # (1 + 19 / 2) / 20 is below 0.6 at once; (1 + 19 (1 - t)) / 20 is from t = 8 / 19 on, and so from the next level.
    assert coarse.pixel_threshold == 0
    assert 8 / 19 <= fine.pixel_threshold < 8 / 19 + 0.02


PINNED = {
    1: {
        "p_values": [38 / 41, 14 / 41, 4 / 41, 1 / 41],
        "threshold": 3.680027,
        "pixels": [2.081572, 0.678605, 5.789745],
        "predicted": 50,
        "scores": [[1.282754, 1.961733, 1.088337], [0.849308, 1.138991, 0.945192], [2.201692, 2.880671, 2.007275]],
    }
}
"""By version of scoring and calibration: its results for fixed scores, anomaly maps and features."""


def test_the_results_of_this_version_of_scoring_and_calibration():
    """If a change of the results is intended, raise `VERSION` and pin the new ones to it."""
    pinned = PINNED[VERSION]
    rng = np.random.default_rng(5)
    scores_N, maps_NHW = rng.gamma(2.0, size=40), rng.gamma(1.0, size=(40, 6, 6)).astype(np.float32)
    maps_Nhw = [anomaly_map(map_HW, (20, 30)) for map_HW in maps_NHW]
    calibration = Calibration.fit(scores_N, maps_NHW, 0.1, [[map_hw.ravel()] for map_hw in maps_Nhw])
    assert calibration.p_values(np.array([0.5, 2.0, 4.0, 9.0])).tolist() == pytest.approx(pinned["p_values"])
    assert calibration.threshold == pytest.approx(pinned["threshold"], rel=1e-5)
    pixels = [calibration.pixel_threshold, calibration.low, calibration.high]
    assert pixels == pytest.approx(pinned["pixels"], rel=1e-5)
    assert calibration.predicted_mask(maps_Nhw[0]).sum() == pinned["predicted"]

    features_NCHW = rng.normal(size=(30, 4, 5, 5)).astype(np.float16)
    flow = build_flow("patchflow", channels=(4,), adapted=4, bottleneck=2, steps=1)  # the couplings are the identity
    flow.fit_adaptor([[torch.from_numpy(features_NCHW).float()]])
    settings = (ScoringSettings(), ScoringSettings(top=0.2), ScoringSettings(score_type="likelihood"))
    scores = [score_features(flow, scoring, [features_NCHW[:3]])[0] for scoring in settings]
    np.testing.assert_allclose(scores, pinned["scores"], rtol=1e-4)
