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
        flow = build_flow("patchflow", channels=(6,), adapted=6, bottleneck=4, neighbourhood=1)
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
    predictions, figures = evaluation.predictions, evaluation.figures
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


@pytest.mark.parametrize(
    ("choice", "missing"),
    [
        ("label == 0", {"image_auroc", "pixel_auroc", "detection_rate"}),
        ("label == 1", {"image_auroc", "false_alarm_rate"}),
        ("mask_path == ''", {"pixel_auroc"}),
        ("label == 7", {"image_auroc", "pixel_auroc", "detection_rate", "false_alarm_rate"}),
    ],
    ids=["good alone", "defective alone", "no masks", "no test pictures"],
)
def test_figures_that_do_not_exist_are_left_out(bench, tmp_path, choice, missing):
    every = set(bench.evaluate(bench.test).figures)
    test = bench.test.query(choice)
    evaluation = bench.evaluate(test)
    assert every - set(evaluation.figures) == missing
    assert evaluation.figures["test_good"] + evaluation.figures["test_defective"] == len(test)
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
    assert area == pytest.approx(evaluation.figures["image_auroc"])


def test_too_few_calibration_pictures_name_the_class(bench):
    with pytest.raises(
        SprueError, match=r"class tile: alpha 0\.01 needs at least 99 calibration pictures; there are 30"
    ):
        bench.calibrate(0.01)
