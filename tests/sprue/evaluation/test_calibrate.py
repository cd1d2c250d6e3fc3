"""Several flows calibrate a detector, each on the fold that its fit did not see."""

import numpy as np
import pytest
import torch

from defectflow import Ensemble, build_flow
from sprue.config import CalibrationSettings, ScoringSettings
from sprue.data.samples import samples_of
from sprue.evaluation.calibrate import HeldOut, calibrate, score_held_out
from sprue.evaluation.outliers import outlying_samples
from sprue.evaluation.report import guarantee_in_words
from sprue.inference.calibration import cross_conformal_bound
from sprue.inference.detector import score_features

FOLDS = 3


@pytest.fixture
def held_out(bench):
    """A Gaussian for each of three folds of the calibration samples, fitted on the two others."""
    folds = [bench.calibration.iloc[fold::FOLDS].reset_index(drop=True) for fold in range(FOLDS)]
    found = []
    for fold in range(FOLDS):
        digests = [digest for other in range(FOLDS) if other != fold for digest in folds[other]["sha256"]]
        flow = build_flow("gaussian", channels=(6,))
        flow.fit_adaptor([[torch.from_numpy(bench.table.read(digests)[0]).float()]])
        found.append(HeldOut(flow, folds[fold]))
    return found


def calibrated(bench, held_out, alpha=0.1):
    promise = CalibrationSettings(alpha=alpha, folds=FOLDS)
    spec = bench.detector.spec
    return calibrate("plant", "tile", spec, "gaussian", held_out, ScoringSettings(), promise, bench.table)


def test_each_sample_is_scored_by_the_flow_that_has_not_seen_it(bench, held_out):
    detector = calibrated(bench, held_out)
    expected = [
        score_features(each.flow, ScoringSettings(), bench.table.read_samples(samples_of(each.rows), 1))[0]
        for each in held_out
    ]
    np.testing.assert_array_equal(detector.calibration.scores, np.sort(np.concatenate(expected)))
    seen = [score_features(held_out[0].flow, ScoringSettings(), bench.table.read_samples(samples_of(each.rows), 1))[0]
            for each in held_out]  # fmt: skip
    assert not np.array_equal(np.concatenate(seen), np.concatenate(expected))
    assert (len(detector.calibration.scores), detector.calibration.folds) == (30, FOLDS)


def test_new_samples_are_scored_by_the_mean_of_the_flows(bench, held_out):
    detector = calibrated(bench, held_out)
    maps = bench.table.read_samples(samples_of(bench.test), 1)
    predicted = detector.predict_features(maps)
    of_members = [score_features(each.flow, ScoringSettings(), maps)[0] for each in held_out]
    np.testing.assert_allclose(predicted.score_B, np.mean(of_members, axis=0), rtol=1e-6)
    assert isinstance(detector.flow, Ensemble)


def test_the_report_says_what_is_proven_and_what_is_not(bench, held_out):
    words = guarantee_in_words(calibrated(bench, held_out).calibration)
    bound = 100 * cross_conformal_bound(30, FOLDS, 0.1)
    assert "3 flows" in words and "30 good samples" in words and f"at most {bound:.3g} %" in words


def test_the_bound_is_twice_alpha_for_many_samples_and_never_above_one():
    assert cross_conformal_bound(10**6, 10, 0.05) == pytest.approx(0.1, abs=1e-4)
    # Barber et al. 2021, theorem 4: never above 2 alpha + sqrt(2 / n).
    for samples in (10, 19, 50, 760):
        for folds in (2, 5, samples):
            assert cross_conformal_bound(samples, folds, 0.05) + 1e-12 > 2 * 0.05
            assert cross_conformal_bound(samples, folds, 0.05) <= 2 * 0.05 + (2 / samples) ** 0.5
    assert cross_conformal_bound(10, 2, 0.9) == 1.0


def test_outliers_are_found_in_every_fold(bench, held_out, monkeypatch):
    detector = calibrated(bench, held_out)
    scores_N, _ = score_held_out(held_out, ScoringSettings(), bench.table)
    shifted = scores_N.copy()
    shifted[-1] = 1e3 * scores_N.max()  # of the last fold
    monkeypatch.setattr("sprue.evaluation.outliers.score_held_out", lambda *_: (shifted, None))
    object.__setattr__(detector.calibration, "scores", tuple(np.sort(shifted)))
    (found,) = outlying_samples(detector, bench.table, held_out)
    assert found.sample_id == held_out[-1].rows["sample_id"].iloc[-1]
