"""A detector's figures follow from its scores and maps, and are left out where they do not exist."""

import hashlib

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score
from upath import UPath

from defectflow import build_flow
from sprue.data.samples import samples_of
from sprue.errors import SprueError
from sprue.evaluation.evaluate import calibrate, evaluate, read_mask, roc_points, write_evaluation
from sprue.features.tables import FeatureTable, write_part
from sprue.inference.detector import Scoring
from sprue.inference.spec import FeatureSpec

SIZES = [(40, 30), (25, 50), (32, 32)]


class Bench:
    """Pictures, masks and features of one class: 30 to calibrate and 24 to test, half of them defective."""

    def __init__(self, root):
        rng = np.random.default_rng(0)
        self.root = UPath(root / "data")
        maps = [rng.normal(size=(54, 6, 8, 8)).astype(np.float16)]
        rows = []
        for index in range(24):
            height, width = SIZES[index % 3]
            defective = index % 2 == 1
            mask = np.zeros((height, width), np.uint8)
            if defective:
                mask[height // 2 :, : width // 3] = 255
                maps[0][30 + index, :, 4:, :2] += 0.7 + 0.1 * index
            # Every third defective picture has no ground truth.
            mask_path = f"{index}_mask.png" if defective and index % 3 else ""
            self.save(f"{index}.png", rng.integers(0, 256, (height, width), dtype=np.uint8))
            if mask_path:
                self.save(mask_path, mask)
            rows.append(
                {
                    "sample_id": f"{index}.png",
                    "view": "",
                    "path": f"{index}.png",
                    "mask_path": mask_path,
                    "label": int(defective),
                    "defect_type": "dent" if defective else "good",
                    "height": height,
                    "width": width,
                }
            )
        digests = [hashlib.sha256(str(index).encode()).hexdigest() for index in range(54)]
        write_part(UPath(root / "table"), digests, maps)
        self.table = FeatureTable(UPath(root / "table"))
        self.calibration = pd.DataFrame({"sha256": digests[:30], "sample_id": digests[:30], "view": ""})
        self.test = pd.DataFrame(rows).assign(sha256=digests[30:])
        flow = build_flow("patchflow", channels=(6,), adapted=6, bottleneck=4, neighbourhood=1, stride=2)
        self.flow = flow.fit_adaptor([[torch.from_numpy(maps[0][:30]).float()]])
        self.detector = self.calibrate(0.05)

    def save(self, name, pixels):
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(str(self.root / name))

    def calibrate(self, alpha):
        spec = FeatureSpec(weights_digest="ab" * 32)
        return calibrate("tile", spec, "patchflow", self.flow, Scoring(), alpha, self.table, self.calibration)

    def evaluate(self, test):
        return evaluate(self.detector, self.table, test.reset_index(drop=True), self.root)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("bench"))


def test_figures_are_those_of_the_scores_and_of_the_maps_at_the_pictures_own_size(bench):
    evaluation = bench.evaluate(bench.test)
    predictions, figures = evaluation.predictions, evaluation.metrics
    labels = bench.test["label"].to_numpy()
    assert (figures["test_good"], figures["test_defective"], figures["alpha"]) == (12, 12, 0.05)
    assert figures["image_auroc"] == pytest.approx(roc_auc_score(labels, predictions.score_B))
    assert figures["image_auroc"] > 0.8
    assert figures["false_alarm_rate"] == predictions.is_anomalous_B[labels == 0].mean()
    assert figures["detection_rate"] == predictions.is_anomalous_B[labels == 1].mean()
    assert figures["threshold"] == bench.detector.calibration.threshold

    truth, values = [], []
    for index, row in enumerate(bench.test.itertuples()):
        if row.label == 0 or row.mask_path:
            mask = read_mask(bench.root, row)
            truth.append((np.zeros((row.height, row.width), bool) if mask is None else mask).ravel())
            values.append(predictions.anomaly_map(index, (row.height, row.width)).ravel())
    assert len(truth) == 20
    expected = roc_auc_score(np.concatenate(truth), np.concatenate(values))
    assert figures["pixel_auroc"] == pytest.approx(expected, abs=1e-9)
    assert expected > 0.7


IMAGE = {f"image_{name}" for name in ("auroc", "average_precision", "best_f1", "pb2", "pg2")}
PIXEL = {f"pixel_{name}" for name in ("auroc", "average_precision", "best_f1", "aupro")}


@pytest.mark.parametrize(
    ("choice", "missing"),
    [
        ("label == 0", IMAGE | PIXEL | {"detection_rate"}),
        ("label == 1", IMAGE | {"false_alarm_rate"}),
        ("mask_path == ''", PIXEL),
        ("label == 7", IMAGE | PIXEL | {"detection_rate", "false_alarm_rate"}),
    ],
    ids=["good alone", "defective alone", "no masks", "no test pictures"],
)
def test_figures_that_do_not_exist_are_left_out(bench, tmp_path, choice, missing):
    every = set(bench.evaluate(bench.test).figures)
    test = bench.test.query(choice)
    evaluation = bench.evaluate(test)
    assert every - set(evaluation.figures) == missing
    assert evaluation.facts["test_good"] + evaluation.facts["test_defective"] == len(test)
    write_evaluation(evaluation, bench.detector, bench.root, tmp_path)
    assert len(pd.read_csv(tmp_path / "scores.csv")) == len(test)
    points = roc_points(evaluation)
    assert list(points.columns) == ["false_positive_rate", "true_positive_rate"]
    assert (len(points) > 0) == ("image_auroc" in evaluation.figures)


def test_what_a_person_looks_at_shows_every_picture_that_matters(bench, tmp_path):
    evaluation = bench.evaluate(bench.test)
    write_evaluation(evaluation, bench.detector, bench.root, tmp_path)
    scores = pd.read_csv(tmp_path / "scores.csv")
    assert scores["sample"].tolist() == bench.test["path"].tolist()
    np.testing.assert_allclose(scores["score"], evaluation.predictions.score_B, rtol=1e-5)
    assert np.array_equal(scores["is_anomalous"], evaluation.predictions.is_anomalous_B)
    with Image.open(tmp_path / "heatmaps.png") as overview, Image.open(tmp_path / "histogram.png") as histogram:
        panels = 6 + 3
        assert overview.height % panels in range(panels)
        assert overview.height > panels * 256
        assert np.asarray(histogram).std() > 0
    points = roc_points(evaluation)
    area = np.trapezoid(points["true_positive_rate"], points["false_positive_rate"])
    assert area == pytest.approx(evaluation.metrics["image_auroc"])


def test_too_few_calibration_pictures_name_the_class(bench):
    with pytest.raises(
        SprueError, match=r"class tile: alpha 0\.01 needs at least 99 calibration pictures; there are 30"
    ):
        bench.calibrate(0.01)


VIEWS = ("0-top", "1-left", "2-right")


class BenchOfViews(Bench):
    """20 samples of three views to calibrate, 12 to test: six are defective, in one view each, with masks for four."""

    def __init__(self, root):
        rng = np.random.default_rng(1)
        self.root = UPath(root / "data")
        self.maps = [rng.normal(size=(96, 6, 8, 8)).astype(np.float16)]
        rows = [self.row(rng, sample, view) for sample in range(12) for view in range(3)]
        digests = [hashlib.sha256(str(index).encode()).hexdigest() for index in range(96)]
        write_part(UPath(root / "table"), digests, self.maps)
        self.table = FeatureTable(UPath(root / "table"))
        self.calibration = pd.DataFrame(
            {"sha256": digests[:60], "sample_id": np.repeat(np.arange(20), 3).astype(str), "view": VIEWS * 20}
        )
        self.test = pd.DataFrame(rows).assign(sha256=digests[60:])
        config = {"channels": (6,), "views": 3, "hidden": 4, "steps": 1, "adaptation": "whiten"}
        by_view = [torch.from_numpy(self.maps[0][view:60:3]).float() for view in range(3)]
        self.flow = build_flow("multiflow", **config).fit_adaptor([by_view])
        self.detector = self.calibrate(0.05)

    def row(self, rng, sample, view):
        height, width = SIZES[view]
        defective = sample % 2 == 1
        shown = defective and view == sample % 3
        if shown:
            self.maps[0][60 + 3 * sample + view, :, 4:, :2] += 1.5 + 0.2 * sample
        mask = np.zeros((height, width), np.uint8)
        mask[height // 2 :, : width // 3] = 255 * shown
        # The last two defective samples have no masks; a view of the first has an empty one.
        has_mask = sample < 8 and (shown or (sample, view) == (1, 0))
        path, mask_path = f"{sample}/{VIEWS[view]}.png", f"{sample}/{VIEWS[view]}_mask.png"
        self.save(path, rng.integers(0, 256, (height, width), dtype=np.uint8))
        if has_mask:
            self.save(mask_path, mask)
        return {
            "sample_id": str(sample),
            "view": VIEWS[view],
            "path": path,
            "mask_path": mask_path if has_mask else "",
            "label": int(defective),
            "defect_type": "dent" if defective else "good",
            "height": height,
            "width": width,
        }

    def calibrate(self, alpha):
        spec = FeatureSpec(weights_digest="ab" * 32)
        return calibrate("box", spec, "multiflow", self.flow, Scoring(top=0.05), alpha, self.table, self.calibration)


@pytest.fixture(scope="module")
def bench_of_views(tmp_path_factory):
    return BenchOfViews(tmp_path_factory.mktemp("views"))


def test_samples_are_decided_and_pictures_are_labelled_by_their_masks(bench_of_views, tmp_path):
    evaluation = bench_of_views.evaluate(bench_of_views.test)
    predictions, figures, test = evaluation.predictions, evaluation.metrics, bench_of_views.test
    labels = np.arange(12) % 2
    assert bench_of_views.detector.views == VIEWS
    assert len(bench_of_views.detector.calibration.scores) == 20
    assert (figures["test_good"], figures["test_defective"]) == (6, 6)
    assert figures["image_auroc"] == pytest.approx(roc_auc_score(labels, predictions.score_B))
    assert figures["image_auroc"] > 0.9

    # Samples 9 and 11 are defective nobody says where; of the others' views, one shows the defect.
    known = [sample for sample in range(12) if sample not in (9, 11)]
    shown = np.array([[sample % 2 == 1 and sample % 3 == view for view in range(3)] for sample in known])
    scores = predictions.picture_score_BV[known]
    assert figures["picture_auroc"] == pytest.approx(roc_auc_score(shown.ravel(), scores.ravel()))
    assert figures["picture_auroc"] > 0.9
    truth, values = [], []
    for sample in known:
        for view, (height, width) in enumerate(SIZES):
            mask = np.zeros((height, width), bool)
            mask[height // 2 :, : width // 3] = shown[known.index(sample), view]
            truth.append(mask.ravel())
            values.append(predictions.anomaly_map(sample, (height, width), view).ravel())
    expected = roc_auc_score(np.concatenate(truth), np.concatenate(values))
    assert figures["pixel_auroc"] == pytest.approx(expected, abs=1e-9)

    write_evaluation(evaluation, bench_of_views.detector, bench_of_views.root, tmp_path)
    table = pd.read_csv(tmp_path / "scores.csv", dtype={"sample": str})
    assert table["sample"].tolist() == test["sample_id"].unique().tolist()
    np.testing.assert_allclose(table[[f"score_{view}" for view in VIEWS]], predictions.picture_score_BV, rtol=1e-5)
    np.testing.assert_allclose(table["score"], predictions.score_B, rtol=1e-5)
    with Image.open(tmp_path / "heatmaps.png") as overview:
        assert overview.height // (256 + 22 + 8) in (11, 12)  # three defective samples and a good one, three views each
    points = roc_points(evaluation)
    area = np.trapezoid(points["true_positive_rate"], points["false_positive_rate"])
    assert area == pytest.approx(figures["image_auroc"])


@pytest.mark.parametrize("name", ["bench", "bench_of_views"])
def test_what_is_calibrated_is_what_predicts(name, request):
    """Noise and strides are for training, and a flow that is made anew is in training."""
    bench = request.getfixturevalue(name)
    bench.flow.train()
    detector = bench.calibrate(0.05)
    samples = samples_of(bench.calibration)
    predicted = detector.predict_features(bench.table.read_samples(samples, len(detector.views)))
    np.testing.assert_array_equal(detector.calibration.scores, np.sort(predicted.score_B))


def test_no_test_samples_have_no_figures(bench_of_views, tmp_path):
    evaluation = bench_of_views.evaluate(bench_of_views.test.query("label == 7"))
    assert not evaluation.figures
    assert set(evaluation.metrics) == {"test_good", "test_defective", "alpha", "threshold"}
    write_evaluation(evaluation, bench_of_views.detector, bench_of_views.root, tmp_path)


def test_a_fit_of_other_views_than_the_datasets_names_the_class(bench_of_views, bench):
    with pytest.raises(SprueError, match="class tile: its samples have 3 pictures each, and patchflow reads 1"):
        calibrate(
            "tile",
            bench.detector.spec,
            "patchflow",
            bench.flow,
            Scoring(),
            0.05,
            bench_of_views.table,
            bench_of_views.calibration,
        )
