"""A detector's metrics follow from its scores and maps, and are missing where they do not exist."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from sprue.config import CalibrationSettings, ScoringSettings
from sprue.data.samples import samples_of
from sprue.errors import SprueError
from sprue.evaluation import evaluate as module
from sprue.evaluation.calibrate import HeldOut, calibrate
from sprue.evaluation.evaluate import write_evaluation
from sprue.evaluation.truth import mask_of
from sprue.inference.detector import Detector


def test_metrics_are_those_of_the_scores_and_of_the_maps_at_the_images_own_size(bench):
    evaluation = bench.evaluate(bench.test)
    predictions, metrics = evaluation.predictions, evaluation.metrics
    labels = bench.test["label"].to_numpy()
    assert (metrics["test_good"], metrics["test_defective"], metrics["alpha"]) == (12, 12, 0.05)
    assert metrics["sample_auroc"] == pytest.approx(roc_auc_score(labels, predictions.score_B))
    assert metrics["sample_auroc"] > 0.8
    assert metrics["false_alarm_rate"] == predictions.is_anomalous_B[labels == 0].mean()
    assert metrics["detection_rate"] == predictions.is_anomalous_B[labels == 1].mean()
    assert metrics["threshold"] == bench.detector.calibration.threshold
    # Of 30 calibration scores, 5 % of 31 ranks are one: Beta(1, 30).
    rates = [metrics["false_alarm_rate_low"], metrics["false_alarm_rate_high"]]
    assert rates == pytest.approx([1 - 0.95 ** (1 / 30), 1 - 0.05 ** (1 / 30)])

    truth, values = [], []
    for index, row in enumerate(bench.test.itertuples()):
        if row.label == 0 or row.mask_path:
            mask = mask_of(bench.root, row)
            truth.append((np.zeros((row.height, row.width), bool) if mask is None else mask).ravel())
            values.append(predictions.anomaly_map(index, (row.height, row.width)).ravel())
    assert len(truth) == 20
    expected = roc_auc_score(np.concatenate(truth), np.concatenate(values))
    assert metrics["pixel_auroc"] == pytest.approx(expected, abs=1e-9)
    assert expected > 0.7

    predicted_masks = [each > metrics["pixel_threshold"] for each in values]
    of_good = [each.mean() for each, mask in zip(predicted_masks, truth, strict=True) if not mask.any()]
    of_defects = [each[mask].mean() for each, mask in zip(predicted_masks, truth, strict=True) if mask.any()]
    assert metrics["pixel_false_alarm_rate"] == pytest.approx(np.mean(of_good))
    assert metrics["pixel_detection_rate"] == pytest.approx(np.mean(of_defects))
    assert metrics["pixel_false_alarm_rate"] < metrics["pixel_detection_rate"]


SCORES = {
    f"{of}_{name}" for of in ("sample", "image") for name in ("auroc", "average_precision", "best_f1", "pb2", "pg2")
}
PIXEL = {f"pixel_{name}" for name in ("auroc", "average_precision", "best_f1", "aupro", "detection_rate")}


@pytest.mark.parametrize(
    ("choice", "missing"),
    [
        ("label == 0", SCORES | PIXEL | {"detection_rate"}),
        ("label == 1", SCORES | {"false_alarm_rate", "pixel_false_alarm_rate"}),
        ("mask_path == ''", PIXEL),
        ("label == 7", SCORES | PIXEL | {"detection_rate", "false_alarm_rate", "pixel_false_alarm_rate"}),
    ],
    ids=["good alone", "defective alone", "no masks", "no test images"],
)
def test_metrics_that_do_not_exist_are_missing(bench, tmp_path, choice, missing):
    every = set(bench.evaluate(bench.test).estimates)
    test = bench.test.query(choice)
    evaluation = bench.evaluate(test)
    assert every - set(evaluation.estimates) == missing
    assert evaluation.facts["test_good"] + evaluation.facts["test_defective"] == len(test)
    write_evaluation(evaluation, bench.detector, bench.root, tmp_path)
    assert len(pd.read_csv(tmp_path / "scores.csv")) == len(test)
    for curve, metric in (("roc", "sample_auroc"), ("precision_recall", "sample_auroc"), ("pro", "pixel_aupro")):
        assert (curve in evaluation.curves) == (metric in evaluation.estimates)


def test_the_files_show_the_scores_and_an_overview_of_images(bench, tmp_path):
    evaluation = bench.evaluate(bench.test)
    write_evaluation(evaluation, bench.detector, bench.root, tmp_path)
    scores = pd.read_csv(tmp_path / "scores.csv")
    assert scores["sample"].tolist() == bench.test["path"].tolist()
    np.testing.assert_allclose(scores["score"], evaluation.predictions.score_B, rtol=1e-5)
    assert np.array_equal(scores["is_anomalous"], evaluation.predictions.is_anomalous_B)
    with Image.open(tmp_path / "heatmaps.png") as overview, Image.open(tmp_path / "histogram.png") as histogram:
        panels, height, gap = 6 + 3, 256 + 22, 8
        assert overview.height == panels * (height + gap) - gap
        assert np.asarray(histogram).std() > 0
    false_positive, true_positive = evaluation.curves["roc"]
    area = np.trapezoid(true_positive, false_positive)
    assert area == pytest.approx(evaluation.metrics["sample_auroc"])
    rate, overlap = evaluation.curves["pro"]
    fine = np.linspace(0, 0.3, 10_001)
    area = np.trapezoid(np.interp(fine, rate, overlap), fine) / 0.3
    assert area == pytest.approx(evaluation.metrics["pixel_aupro"], abs=0.005)
    assert np.diff(evaluation.curves["precision_recall"][0]).min() >= 0


def test_too_few_calibration_samples_name_the_class(bench):
    with pytest.raises(
        SprueError, match=r"class tile: alpha 0\.01 needs at least 99 calibration samples; there are 30"
    ):
        bench.calibrate(0.01)
    with pytest.raises(
        SprueError,
        match=r"class tile: alpha 0\.05 with confidence 0\.8 \(.*conditional\) needs at least 32 calibration samples; "
        r"there are 30\. Hold out more .* or set calibration\.guarantee to marginal",
    ):
        bench.calibrate(0.05, guarantee="conditional", confidence=0.8)


def test_samples_are_decided_by_the_chosen_guarantee(bench, tmp_path):
    table, test = bench.table, bench.test
    maps = table.read_samples(samples_of(test), 1)
    marginal, conditional = bench.calibrate(0.2), bench.calibrate(0.2, guarantee="conditional")
    # Of 30 calibration scores, 20 % of 31 ranks are 6; P(Beta(2, 29) <= 0.2) is 0.989, P(Beta(3, 28) <= 0.2) 0.956 and
    # P(Beta(4, 27) <= 0.2) 0.877.
    assert [detector.calibration.threshold for detector in (marginal, conditional)] == [
        marginal.calibration.scores[-6],
        marginal.calibration.scores[-3],
    ]
    conditional.save(tmp_path)
    one, other, loaded = (
        detector.predict_features(maps) for detector in (marginal, conditional, Detector.load(tmp_path))
    )
    assert np.array_equal(one.p_value_B, other.p_value_B)
    assert np.array_equal(one.is_anomalous_B, one.score_B > np.float32(marginal.calibration.threshold))
    assert np.array_equal(other.is_anomalous_B, other.score_B > np.float32(conditional.calibration.threshold))
    assert np.array_equal(other.is_anomalous_B, loaded.is_anomalous_B)
    assert other.is_anomalous_B.sum() < one.is_anomalous_B.sum()
    assert not np.array_equal(other.is_anomalous_B, other.p_value_B <= 0.2)


def test_samples_are_decided_and_images_are_labelled_by_their_masks(bench_of_views, tmp_path):
    evaluation = bench_of_views.evaluate(bench_of_views.test)
    predictions, metrics, test = evaluation.predictions, evaluation.metrics, bench_of_views.test
    labels = np.arange(12) % 2
    assert bench_of_views.detector.views == ("0-top", "1-left", "2-right")
    assert len(bench_of_views.detector.calibration.scores) == 20
    assert (metrics["test_good"], metrics["test_defective"]) == (6, 6)
    assert metrics["sample_auroc"] == pytest.approx(roc_auc_score(labels, predictions.score_B))
    assert metrics["sample_auroc"] > 0.9

    # Samples 9 and 11 are defective but have no mask; each of the others shows its defect in one view.
    known = [sample for sample in range(12) if sample not in (9, 11)]
    shown = np.array([[sample % 2 == 1 and sample % 3 == view for view in range(3)] for sample in known])
    scores = predictions.image_score_BV[known]
    assert metrics["image_auroc"] == pytest.approx(roc_auc_score(shown.ravel(), scores.ravel()))
    assert metrics["image_auroc"] > 0.9
    truth, values = [], []
    for sample in known:
        for view, (height, width) in enumerate(bench_of_views.sizes):
            mask = np.zeros((height, width), bool)
            mask[height // 2 :, : width // 3] = shown[known.index(sample), view]
            truth.append(mask.ravel())
            values.append(predictions.anomaly_map(sample, (height, width), view).ravel())
    expected = roc_auc_score(np.concatenate(truth), np.concatenate(values))
    assert metrics["pixel_auroc"] == pytest.approx(expected, abs=1e-9)

    write_evaluation(evaluation, bench_of_views.detector, bench_of_views.root, tmp_path)
    table = pd.read_csv(tmp_path / "scores.csv", dtype={"sample": str})
    assert table["sample"].tolist() == test["sample_id"].unique().tolist()
    np.testing.assert_allclose(
        table[[f"score_{view}" for view in bench_of_views.detector.views]], predictions.image_score_BV, rtol=1e-5
    )
    np.testing.assert_allclose(table["score"], predictions.score_B, rtol=1e-5)
    with Image.open(tmp_path / "heatmaps.png") as overview:
        assert overview.height == 12 * (256 + 22 + 8) - 8  # three defective samples and a good one, three views each
    false_positive, true_positive = evaluation.curves["roc"]
    area = np.trapezoid(true_positive, false_positive)
    assert area == pytest.approx(metrics["sample_auroc"])


def test_image_metrics_of_single_images_are_those_of_samples_and_are_not_resampled_again(bench, monkeypatch):
    resampled = []
    original = module.score_estimates
    monkeypatch.setattr(module, "score_estimates", lambda *arrays: resampled.append(arrays) or original(*arrays))
    estimates = bench.evaluate(bench.test).estimates
    of_images = {name: estimates[name] for name in estimates if name.startswith("image_")}
    assert set(of_images) == {name for name in SCORES if name.startswith("image_")}
    assert all(estimate is estimates[name.replace("image_", "sample_")] for name, estimate in of_images.items())
    assert len(resampled) == 2  # all samples, and those of the one defect type


@pytest.mark.parametrize("name", ["bench", "bench_of_views"])
def test_calibration_and_prediction_agree(name, request):
    """Noise and strides are for training only, and a newly built flow is in training mode."""
    bench = request.getfixturevalue(name)
    bench.flow.train()
    detector = bench.calibrate(0.05)
    samples = samples_of(bench.calibration)
    predicted = detector.predict_features(bench.table.read_samples(samples, len(detector.views)))
    np.testing.assert_array_equal(detector.calibration.scores, np.sort(predicted.score_B))

    sizes = bench.calibration[["height", "width"]].to_numpy().reshape(len(samples), -1, 2).tolist()
    maps = [
        [predicted.anomaly_map(index, size, view) for view, size in enumerate(of_views)]
        for index, of_views in enumerate(sizes)
    ]

    def risk(level):
        return (1 + sum(max((each > level).mean() for each in views) for views in maps)) / (1 + len(maps))

    calibration = detector.calibration
    step = 0.02 * (calibration.high - calibration.low)
    assert risk(calibration.pixel_threshold) <= 0.05 < risk(calibration.pixel_threshold - step)


def test_no_test_samples_have_no_metrics(bench_of_views, tmp_path):
    evaluation = bench_of_views.evaluate(bench_of_views.test.query("label == 7"))
    assert not evaluation.estimates
    rates = {"false_alarm_rate_low", "false_alarm_rate_high"}
    assert set(evaluation.metrics) == {"test_good", "test_defective", "alpha", "threshold", "pixel_threshold"} | rates
    write_evaluation(evaluation, bench_of_views.detector, bench_of_views.root, tmp_path)


def test_a_fit_of_other_views_than_the_datasets_names_the_class(bench_of_views, bench):
    with pytest.raises(SprueError, match="class tile: its samples have 3 images each, and patchflow reads 1"):
        calibrate(
            "plant",
            "tile",
            bench.detector.spec,
            "patchflow",
            [HeldOut(bench.flow, bench_of_views.calibration)],
            ScoringSettings(),
            CalibrationSettings(),
            bench_of_views.table,
        )
