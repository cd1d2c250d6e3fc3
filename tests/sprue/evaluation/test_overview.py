"""The overview shows every class, the classes that failed, and what needs a decision."""

import re

import numpy as np
import pytest

from sprue.config import CalibrationSettings
from sprue.data.layouts import SkippedFile
from sprue.evaluation.metrics import Estimate
from sprue.evaluation.outliers import Outlier
from sprue.evaluation.overview import LISTED, Bar, ClassResult, FailedClass, overview
from sprue.evaluation.summary import Errors, Summary

NONE = Errors(count=0, samples=20)
ONE = Errors(count=1, samples=20, path="tile/test/dent/3.png", kind="dent", score=1.234, width=212, height=104)
OUTLIER = Outlier(sample_id="7", paths=("tile/train/good/7.png",), score=30.3)


def result(auroc=0.9, misses=NONE, false_alarms=NONE, outliers=(), **metrics):
    estimates = {
        "sample_auroc": Estimate(auroc, auroc - 0.1, min(1.0, auroc + 0.05)),
        "false_alarm_rate": Estimate(0.1, 0.02, 0.3),
        "image_auroc": Estimate(auroc, auroc - 0.1, min(1.0, auroc + 0.05)),
    }
    facts = {"test_good": 20.0, "test_defective": 20.0, "alpha": 0.05, "threshold": 2.0}
    rates = {"false_alarm_rate_low": 0.00171, "false_alarm_rate_high": 0.0951}
    over = {
        "gaussian_sample_auroc": 0.85,
        "sample_auroc_over_gaussian": auroc - 0.85,
        "sample_auroc_over_gaussian_low": auroc - 0.9,
        "sample_auroc_over_gaussian_high": auroc - 0.8,
    }
    summary = Summary(flow_name="csflow", misses=misses, false_alarms=false_alarms, outliers=list(outliers))
    return ClassResult(estimates, facts | rates | over | metrics, summary)


def test_every_class_has_a_row_with_its_worst_errors_and_the_lowest_auroc_is_first(read_page):
    results = {"a": result(0.99), "tile b": result(0.7, misses=ONE), "c": result(0.9, false_alarms=ONE)}
    page = read_page(overview("plant", results, CalibrationSettings()))
    reports = [link for link in page.links if "report.html" in link]
    assert reports == [
        "tile%20b/report.html", "tile%20b/report.html#misses",
        "c/report.html", "c/report.html#false-alarms",
        "a/report.html",
    ]  # fmt: skip
    assert page.sources == ["tile%20b/miss.webp", "c/false_alarm.webp"]
    assert "1 of 20 missed; worst: dent, score 1.23, threshold 2" in page.words
    assert page.words.count("none of 20 missed") == 2 and page.words.count("none of 20 with a false alarm") == 2
    assert "What needs a decision" not in page.words and "What failed" not in page.words
    assert "script" not in page.tags and "link" not in page.tags


def test_intervals_are_bars_with_their_values_beside_them(read_page):
    html = overview("plant", {"tile": result(0.9)}, CalibrationSettings())
    words = " ".join(read_page(html).words.split())
    assert "AUROC of parts 90.0 % 80.0 to 95.0" in words
    assert "AUROC of images" not in words  # as that of parts
    assert "true false-alarm rate (90 %) alpha 5 % 0.171 to 9.51 %" in words
    assert "AUROC over the Gaussian's +5.0 points +0.0 to +10.0" in words
    assert 'aria-label="AUROC of parts: 90.0 %, 80.0 to 95.0"' in html
    assert 'class="interval" d="M128.0 8H152.0"' in html and 'cx="144.0"' in html
    assert "http" not in html.replace("http-equiv", "")
    assert not re.search(r"\bnan\b", html)


def test_the_line_on_the_gaussian_is_the_classes_own(read_page):
    results = {"tile": result(0.97), "box": result(0.6)}
    words = read_page(overview("plant", results, CalibrationSettings())).words
    assert "csflow against the Gaussian of the same features: it adds 12.0 points of AUROC" in words
    assert "it loses 25.0 points of AUROC" in words


@pytest.mark.parametrize(
    ("bar", "value", "at"),
    [
        (Bar("", "", Estimate(0.25, 0.2, 0.3)), 0.25, 25.0),
        (Bar("", "", Estimate(0.0, 0.0, 0.0), -0.5, 0.5), 0.0, 50.0),
        (Bar("", "", Estimate(0.0, 0.0, 0.0), -0.5, 0.5), -0.9, 0.0),
        (Bar("", "", Estimate(0.0, 0.0, 0.0), -0.5, 0.5), 0.7, 100.0),
    ],
)
def test_a_value_has_its_place_on_the_bar(bar, value, at):
    assert bar.at(value) == at


def test_a_class_without_defects_shows_what_it_has(read_page):
    plain = result(misses=Errors(count=0, samples=0), false_alarms=Errors(count=0, samples=0))
    rates = {name: plain.metrics[name] for name in plain.metrics if "gaussian" not in name}
    words = read_page(overview("plant", {"tile": ClassResult({}, rates, plain.summary)}, CalibrationSettings())).words
    assert "no defective test parts" in words and "no good test parts" in words
    assert "true false-alarm rate (90 %)" in words and not re.search(r"\bnan\b", words)


def test_failed_classes_and_open_decisions_are_named(read_page):
    failures = [
        FailedClass("hinge", "manifest", "class 'hinge' has 3 good training images"),
        FailedClass("bolt", "features", "class 'bolt' has 1 good training image that looks foreign: <b>"),
    ]
    copies = [SkippedFile("tile/train/good/9.png", "a copy of the test image tile/test/good/0.png, ...")]
    results = {"tile": result(outliers=[OUTLIER])}
    page = read_page(overview("plant", results, CalibrationSettings(), failures, copies))
    words = " ".join(page.words.split())
    decisions, failed = words.index("What needs a decision"), words.index("What failed")
    for text in (
        "bolt : foreign images",
        "looks foreign: <b>",
        "score 30.3: tile/train/good/7.png",
        "tile/train/good/9.png",
    ):
        assert decisions < words.index(text) < failed
    assert words.index("hinge in the stage manifest") > failed
    assert "1 classes" not in words and "1 class evaluated" in words
    assert "3 need a decision" in words
    assert "../features/screening.html" in page.links and "#decisions" in page.links and "#failed" in page.links


def test_what_the_user_keeps_is_decided(read_page):
    results = {"tile": result(outliers=[OUTLIER])}
    words = read_page(overview("plant", results, CalibrationSettings(), keep=["tile/train/good/7.png"])).words
    assert "What needs a decision" not in words and "30.3" not in words


def test_the_promise_is_that_of_the_settings(read_page):
    words = read_page(overview("plant", {"tile": result()}, CalibrationSettings())).words
    assert "On average over calibrations, at most 5 % of good parts" in words
    settings = CalibrationSettings(alpha=0.1, guarantee="conditional", confidence=0.9)
    words = read_page(overview("plant", {"tile": result()}, settings)).words
    assert "With 90 % confidence in each class's calibration, at most 10 % of good parts" in words
    words = read_page(overview("plant", {"tile": result()}, CalibrationSettings(folds=5))).words
    assert "With cross-conformal calibration, about 5 % of good parts" in words and "at most 5 %" not in words


def test_hundreds_of_classes_stay_a_small_page(read_page):
    rng = np.random.default_rng(0)
    results = {f"part-{number:03}": result(rng.uniform(0.5, 1), ONE, ONE) for number in range(400)}
    copies = [SkippedFile(f"part-000/train/good/{number}.png", "a copy of the test image") for number in range(300)]
    html = overview("plant", results, CalibrationSettings(), copies=copies)
    assert len(html) < 400 * 4_000
    assert html.count('loading="lazy"') == 800
    page = read_page(html)
    assert f"and {300 - LISTED} more" in page.words
    assert "mean of 400" in page.words
