"""The report shows all metrics and the worst errors, and needs no other file."""

import re
from dataclasses import replace

import pytest

from sprue.evaluation.baseline import in_words
from sprue.evaluation.metrics import SCORE_METRICS
from sprue.evaluation.report import MEANINGS, class_report, guarantee_in_words
from sprue.inference.calibration import Calibration


def report_of(bench, query="label < 2"):
    evaluation = bench.evaluate(bench.test.query(query))
    return evaluation, class_report(evaluation, bench.detector, {"dataset": "<b>tiles</b>"}, bench.root)


@pytest.mark.parametrize("name", ["bench", "bench_of_views"])
def test_a_page_holds_the_metrics_and_the_images_themselves(name, request, read_page):
    bench = request.getfixturevalue(name)
    evaluation, report = report_of(bench)
    page = read_page(report)
    assert set(evaluation.estimates) <= set(MEANINGS)
    if evaluation.views == 1:
        assert all(
            evaluation.estimates[f"image_{name}"] == evaluation.estimates[f"sample_{name}"] for name in SCORE_METRICS
        )
    for name, estimate in evaluation.estimates.items():
        if name.startswith("image_") and estimate == evaluation.estimates[name.replace("image_", "sample_")]:
            assert MEANINGS[name] not in page.words
            continue
        interval = f" {100 * estimate.low:.1f} to {100 * estimate.high:.1f}" if estimate.low < estimate.high else ""
        assert f" {100 * estimate.value:.1f} %{interval} {MEANINGS[name]} " in " ".join(page.words.split()) + " "
    assert all(source.startswith("data:image/") for source in page.sources)
    assert "dent" in page.words
    assert "<b>tiles</b>" in page.words  # as text, not as markup
    assert not re.search(r"\bnan\b", page.words)
    labels = evaluation.samples["label"].to_numpy()
    is_anomalous = evaluation.predictions.is_anomalous_B
    wrong = [int((is_anomalous & (labels == 0)).sum()), int((~is_anomalous & (labels == 1)).sum())]
    charts = 4
    assert len(page.sources) == charts + sum(min(4, each) for each in wrong)
    assert page.words.count("There are none.") == wrong.count(0)


@pytest.mark.parametrize("query", ["label == 0", "label == 1", "mask_path == ''", "label == 7"])
def test_metrics_that_do_not_exist_are_not_shown(bench, query, read_page):
    _, report = report_of(bench, query)
    page = read_page(report)
    assert not re.search(r"\bnan\b", page.words)
    assert ("from the easiest to the hardest" in page.words) == (query != "label == 7" and query != "label == 0")


def calibration(samples, **settings):
    return Calibration(tuple(map(float, range(samples))), 0.05, low=0, high=1, pixel_threshold=1, **settings)


def test_a_class_page_says_what_its_threshold_promises(bench, read_page):
    assert guarantee_in_words(bench.detector.calibration) in read_page(report_of(bench)[1]).words


def test_a_class_page_says_what_its_flow_adds_to_the_gaussian(bench, read_page):
    evaluation = bench.evaluate(bench.test, bench.training)
    line = in_words("patchflow", evaluation.metrics)
    assert "AUROC" in line and "AUPRO" in line
    assert line in read_page(class_report(evaluation, bench.detector, {}, bench.root)).words


def test_both_guarantees_and_the_true_rate_are_put_in_words():
    few, many = guarantee_in_words(calibration(19)), guarantee_in_words(calibration(100))
    assert few.startswith(
        "The marginal guarantee holds: at most 5 % of exchangeable good samples are called anomalous, on"
    )
    assert "(score above 18)" in few and "(score above 95)" in many
    assert "at least 59 calibration samples are needed" in few
    assert "Under the conditional guarantee (with 95 % confidence in this one calibration, at most 5 %" in many
    assert "the threshold would be 98" in many
    assert few.endswith(
        "With 19 calibration samples the true false-alarm rate lies between 0.27 % and 14.6 % (90 % confidence)."
    )


def test_the_words_are_those_of_the_guarantee_in_force():
    words = guarantee_in_words(calibration(100, guarantee="conditional", confidence=0.99))
    assert words.startswith(
        "The conditional guarantee holds: with 99 % confidence in this one calibration, at most 5 %"
    )
    assert "(score above 99)" in words and "the threshold would be 95" in words
    # Beta(1, 100)
    low, high = 100 * (1 - 0.95 ** (1 / 100)), 100 * (1 - 0.05 ** (1 / 100))
    assert f"between {low:.3g} % and {high:.3g} % (90 % confidence)" in words


def test_outliers_among_the_calibration_scores_ask_for_a_decision():
    good = tuple(2 + 0.1 * number for number in range(19))
    plain = Calibration(good, alpha=0.05, low=0.0, high=1.0, pixel_threshold=1.0)
    assert "far beyond" not in guarantee_in_words(plain)
    blinded = replace(plain, scores=(*good[:-1], 30.3))
    assert "The calibration scores 30.3 lie far beyond the others" in guarantee_in_words(blinded)
