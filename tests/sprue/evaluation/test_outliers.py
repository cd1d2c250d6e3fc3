"""Scores of foreign images among those for calibration are found, also several; skewed scores are none."""

import logging

import numpy as np
import pytest
from upath import UPath

from sprue.config import CalibrationSettings, ScoringSettings
from sprue.evaluation.calibrate import calibrate
from sprue.evaluation.outliers import Outlier, outliers, outlying_samples, undecided, warn_of_outliers
from sprue.features.tables import FeatureTable, write_part


def good_scores(count, seed=0):
    return np.random.default_rng(seed).gamma(9.0, 0.3, count).astype(np.float32)


@pytest.mark.parametrize("foreign", [[30.3], [30.3, 28.0], [30.3, 24.0, 900.0]])
def test_foreign_scores_are_found_the_highest_first(foreign):
    scores = np.concatenate([good_scores(16), np.array(foreign, np.float32)])
    shuffled = np.random.default_rng(1).permutation(len(scores))
    found = outliers(scores[shuffled])
    assert scores[shuffled][found].tolist() == sorted(np.float32(foreign).tolist(), reverse=True)


def test_an_outlier_that_is_far_less_than_another_counts_by_itself():
    scores = np.concatenate([good_scores(18), [1e7]])
    assert outliers(scores).tolist() == [18]


def test_good_scores_are_no_outliers():
    reported = sum(len(outliers(good_scores(19, seed))) > 0 for seed in range(1000))
    heavy = sum(len(outliers(np.random.default_rng(seed).lognormal(1.0, 0.5, 19))) > 0 for seed in range(1000))
    assert reported <= 1
    assert heavy <= 10


def test_a_fifth_of_the_scores_is_a_kind_of_part_of_its_own():
    scores = np.concatenate([good_scores(14), np.full(5, 50.0)])
    assert len(outliers(scores)) == 0


@pytest.mark.parametrize("count", [0, 1, 4])
def test_of_few_scores_nothing_can_be_said(count):
    assert len(outliers(np.linspace(1, 1000, count))) == 0


@pytest.fixture
def table_with_foreign(bench, tmp_path):
    """The calibration samples' maps, those of the fourth far off."""
    digests = bench.calibration["sha256"].tolist()
    (maps_NCHW,) = bench.table.read(digests)
    maps_NCHW[3] *= 20
    write_part(UPath(tmp_path), digests, [maps_NCHW])
    return FeatureTable(UPath(tmp_path))


def test_outlying_samples_are_named_with_their_images_until_the_user_keeps_them(bench, table_with_foreign):
    rows = bench.calibration
    detector = calibrate(
        "plant", "tile", bench.detector.spec, "patchflow", bench.held_out, ScoringSettings(), CalibrationSettings(),
        table_with_foreign,
    )  # fmt: skip
    (found,) = outlying_samples(detector, table_with_foreign, bench.held_out)
    assert (found.sample_id, found.paths) == (rows["sample_id"][3], ("good/3.png",))
    assert found.score == pytest.approx(detector.calibration.scores[-1])
    assert undecided([found], ["good/2.png"]) == [found]
    assert undecided([found], ["good/3.png", "good/2.png"]) == []


def test_most_classes_have_no_outlying_samples(bench):
    assert outlying_samples(bench.detector, bench.table, bench.held_out) == []


def test_the_warning_names_the_samples_and_what_to_do(caplog):
    found = Outlier(sample_id="18.png", paths=("tile/train/good/18.png",), score=30.3)
    with caplog.at_level(logging.WARNING):
        warn_of_outliers("tile", [found], 4.1)
    (text,) = [record.message for record in caplog.records]
    assert "18.png (30.3)" in text and "which end at 4.1" in text
    assert "manifest.drop" in text and "manifest.keep" in text


def test_nothing_is_said_without_outliers(caplog):
    with caplog.at_level(logging.WARNING):
        warn_of_outliers("tile", [], 4.1)
    assert caplog.records == []
