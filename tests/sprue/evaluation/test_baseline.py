"""What a flow adds to the Gaussian is measured on the same samples, and said as it is."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from defectflow import Gaussian, GaussianConfig, build_flow
from sprue.config import CalibrationSettings, ScoringSettings
from sprue.data.samples import samples_of
from sprue.errors import SprueError
from sprue.evaluation.baseline import Comparison, as_metrics, baseline_maps, in_words
from sprue.evaluation.calibrate import HeldOut, calibrate
from sprue.evaluation.evaluate import write_evaluation
from sprue.evaluation.metrics import Estimate, auroc_difference, pixel_estimates
from sprue.evaluation.truth import GroundTruth
from sprue.training.dataloader import StreamingDataLoader


def gaussian_scores(train_NCHW, test_NCHW):
    """Scores and position scores of test maps, by a Gaussian that is fitted at once."""
    gaussian = Gaussian(GaussianConfig(channels=(6,))).fit_adaptor([[torch.from_numpy(train_NCHW).float()]]).eval()
    with torch.no_grad():
        scores_N, map_NHW = gaussian.predict([torch.from_numpy(test_NCHW).float()])
    return scores_N.numpy(), map_NHW.numpy()


def test_the_gaussian_of_the_training_maps_is_compared_on_the_test_samples(bench, tmp_path):
    plain, evaluation = bench.evaluate(bench.test), bench.evaluate(bench.test, bench.training)
    assert evaluation.estimates == plain.estimates and plain.over_gaussian == {}
    (train_NCHW,), (test_NCHW,) = (bench.table.read(list(rows["sha256"])) for rows in (bench.calibration, bench.test))
    scores_N, map_NHW = gaussian_scores(train_NCHW, test_NCHW)
    labels_N, metrics = bench.test["label"].to_numpy(), evaluation.metrics
    assert metrics["gaussian_sample_auroc"] == pytest.approx(roc_auc_score(labels_N, scores_N))
    expected = auroc_difference(evaluation.predictions.score_B, scores_N, labels_N)
    assert metrics["sample_auroc_over_gaussian"] == pytest.approx(expected.value)
    found = evaluation.over_gaussian["sample_auroc"].difference
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert metrics["sample_auroc"] - metrics["gaussian_sample_auroc"] == pytest.approx(found.value)

    counts = GroundTruth.of(bench.test, 1, bench.root).count(map_NHW[:, None])
    assert metrics["gaussian_pixel_aupro"] == pytest.approx(pixel_estimates(counts)["aupro"].value)
    over = metrics["pixel_aupro"] - metrics["gaussian_pixel_aupro"]
    assert metrics["pixel_aupro_over_gaussian"] == pytest.approx(over)
    assert metrics["pixel_aupro_over_gaussian_low"] <= over <= metrics["pixel_aupro_over_gaussian_high"]

    write_evaluation(evaluation, bench.detector, bench.root, tmp_path)
    stored = json.loads((tmp_path / "estimates.json").read_text())["over_gaussian"]
    assert stored["sample_auroc"] == found.as_json() and set(stored) == {"sample_auroc", "pixel_aupro"}


def test_streamed_training_maps_give_the_same(bench):
    samples, maps = samples_of(bench.calibration), baseline_maps(bench.detector.spec)
    assert maps == (0,)
    streamed = StreamingDataLoader(bench.table, samples, 1, maps, limit=1)
    assert len(streamed.chunks) > 1
    one, other = (bench.evaluate(bench.test, training).metrics for training in (bench.training, streamed.ordered))
    assert one == pytest.approx(other, abs=1e-6)


@pytest.mark.parametrize(
    ("size", "scales", "maps"),
    [(384, (1.0, 0.5), (0, 1)), (768, (1.0, 0.5, 0.25), (2, 3)), (640, (1.0, 0.5), (2, 3)), (128, (1.0, 0.5), (0, 1))],
)
def test_the_gaussian_reads_every_block_at_the_size_nearest_to_384(bench, size, scales, maps):
    spec = bench.detector.spec.model_copy(update={"input_size": size, "scales": scales, "blocks": (2, 3)})
    assert baseline_maps(spec) == maps


def test_each_view_has_its_gaussian_and_the_highest_image_counts(bench_of_views):
    bench = bench_of_views
    metrics = bench.evaluate(bench.test, bench.training).metrics
    (train_NCHW,), (test_NCHW,) = (bench.table.read(list(rows["sha256"])) for rows in (bench.calibration, bench.test))
    of_views = [gaussian_scores(train_NCHW[view::3], test_NCHW[view::3]) for view in range(3)]
    scores_N, labels_N = np.max([scores_N for scores_N, _ in of_views], axis=0), np.arange(12) % 2
    assert metrics["gaussian_sample_auroc"] == pytest.approx(roc_auc_score(labels_N, scores_N))
    position_scores_NVHW = np.stack([map_NHW for _, map_NHW in of_views], axis=1)
    counts = GroundTruth.of(bench.test, 3, bench.root).count(position_scores_NVHW)
    assert metrics["gaussian_pixel_aupro"] == pytest.approx(pixel_estimates(counts)["aupro"].value)


def test_the_gaussian_itself_is_compared_with_nothing(bench):
    flow = build_flow("gaussian", channels=(6,))
    flow.fit_adaptor([[torch.from_numpy(bench.table.read(list(bench.calibration["sha256"]))[0]).float()]])
    detector = calibrate(
        "plant", "tile", bench.detector.spec, "gaussian", [HeldOut(flow, bench.calibration)], ScoringSettings(),
        CalibrationSettings(), bench.table,
    )  # fmt: skip
    other = object.__new__(type(bench))
    other.__dict__ = bench.__dict__ | {"detector": detector}
    assert other.evaluate(bench.test, bench.training).over_gaussian == {}
    assert in_words("gaussian", {}) == "This detector is the Gaussian that the flows are held against."


@pytest.mark.parametrize("query", ["label == 0", "label == 1", "label == 7"])
def test_without_both_kinds_of_samples_nothing_is_said(bench, query):
    metrics = bench.evaluate(bench.test.query(query), bench.training).metrics
    assert not any("gaussian" in name for name in metrics)
    assert (
        in_words("csflow", metrics) == "What csflow adds to the Gaussian takes good and defective test samples to say."
    )


def test_without_masks_the_scores_alone_are_compared(bench):
    evaluation = bench.evaluate(bench.test.assign(mask_path=""), bench.training)
    assert set(evaluation.over_gaussian) == {"sample_auroc"}


def test_training_maps_that_fit_no_gaussian_name_the_class(bench):
    def equal(size):
        return iter([[torch.ones(size, 6, 8, 8)]])

    with pytest.raises(SprueError, match=r"class tile: the Gaussian that its flow is held against: .* all equal"):
        bench.evaluate(bench.test, equal)


@pytest.mark.parametrize(
    ("low", "value", "high", "verdict"),
    [
        (0.01, 0.02, 0.03, "it adds 2.0 points of AUROC (95 % interval 1.0 to 3.0; the Gaussian has 90.0 %)."),
        (-0.03, -0.02, -0.01, "it loses 2.0 points of AUROC (95 % interval -3.0 to -1.0; the Gaussian has 90.0 %)."),
        (0.0, 0.02, 0.03, "it adds nothing to AUROC that this test split can show (2.0 points, "),
        (-0.03, -0.02, 0.0, "it adds nothing to AUROC that this test split can show (-2.0 points, "),
        (0.0, 0.0, 0.0, "it adds nothing to AUROC that this test split can show (0.0 points, "),
    ],
)
def test_the_line_says_whether_the_interval_leaves_0_out(low, value, high, verdict):
    comparison = Comparison(0.9, Estimate(value, low, high))
    line = in_words("csflow", as_metrics({"sample_auroc": comparison}))
    assert line.startswith(f"csflow against the Gaussian of the same features: {verdict}")
    both = {"sample_auroc": comparison, "pixel_aupro": replace(comparison, gaussian=0.5)}
    assert "; it " in in_words("csflow", as_metrics(both)) and "50.0 %" in in_words("csflow", as_metrics(both))
