"""Makes a detector of a fitted flow and measures it once on the test split.

Shapes: N pictures, H rows, W columns of a picture.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image
from sklearn.metrics import roc_curve
from upath import UPath

from defectflow import Flow
from sprue.errors import SprueError
from sprue.evaluation.metrics import image_auroc, pixel_auroc
from sprue.evaluation.pictures import histogram, panel, stack
from sprue.features.tables import FeatureTable
from sprue.inference.calibration import Calibration
from sprue.inference.detector import Detector, Predictions, Scoring, score_features
from sprue.inference.heatmap import heat
from sprue.inference.images import open_image
from sprue.inference.spec import FeatureSpec

PANELS = 6
"""Defective and good pictures each in the overview."""


@dataclass(frozen=True)
class Evaluation:
    """A detector's figures and predictions on the test split; figures that don't exist are left out.

    Attributes:
        figures: By name, as they go to the metrics file and to MLflow.
        predictions: Of the test pictures in `pictures`' order.
        pictures: The manifest's test rows.
    """

    figures: dict[str, float]
    predictions: Predictions
    pictures: pd.DataFrame


def calibrate(
    class_name: str,
    spec: FeatureSpec,
    flow_name: str,
    flow: Flow,
    scoring: Scoring,
    alpha: float,
    table: FeatureTable,
    calibration: pd.DataFrame,
) -> Detector:
    """A detector of a fitted flow, calibrated on the manifest's calibration rows.

    Raises:
        SprueError: If there are too few of them for `alpha`, or scores are not finite; the message names the class.
    """
    maps = table.read(calibration["sha256"].tolist())
    scores_N, evidence_NHW = score_features(flow, scoring, maps)
    try:
        calibrated = Calibration.fit(scores_N, evidence_NHW, alpha)
    except SprueError as error:
        raise SprueError(f"class {class_name}: {error}") from error
    return Detector(class_name, spec, flow_name, flow, scoring, calibrated)


def evaluate(detector: Detector, table: FeatureTable, pictures: pd.DataFrame, root: UPath) -> Evaluation:
    """Measures a detector on the manifest's test rows.

    Pixels are those of the pictures at their own size. Defective pictures without a mask are left out of the
    pixel figures.
    """
    predictions = detector.predict_features(table.read(pictures["sha256"].tolist()))
    labels_N = pictures["label"].to_numpy()
    called_N = predictions.is_anomalous_B
    masks = [read_mask(root, row) for row in pictures.itertuples()]
    measurable = [i for i, mask in enumerate(masks) if mask is not None or labels_N[i] == 0]
    sizes = list(zip(pictures["height"], pictures["width"], strict=True))
    figures = {
        "test_good": float((labels_N == 0).sum()),
        "test_defective": float((labels_N == 1).sum()),
        "image_auroc": image_auroc(predictions.score_B, labels_N),
        "pixel_auroc": pixel_auroc(
            lambda i: predictions.anomaly_map(measurable[i], sizes[measurable[i]]), [masks[i] for i in measurable]
        ),
        "alpha": detector.calibration.alpha,
        "threshold": detector.calibration.threshold,
        "false_alarm_rate": _share(called_N[labels_N == 0]),
        "detection_rate": _share(called_N[labels_N == 1]),
    }
    return Evaluation({name: value for name, value in figures.items() if np.isfinite(value)}, predictions, pictures)


def _share(called: NDArray[np.bool_]) -> float:
    return float(called.mean()) if len(called) else float("nan")


def read_mask(root: UPath, row: Any) -> NDArray[np.bool_] | None:
    """A manifest row's ground truth [H, W], anomalous from 128 up; None where there is none."""
    if not row.mask_path:
        return None
    grey = open_image((root / row.mask_path).read_bytes(), row.mask_path).convert("L")
    return np.asarray(grey) >= 128


def write_evaluation(evaluation: Evaluation, detector: Detector, root: UPath, folder: Path) -> None:
    """Writes what a person looks at.

    ``scores.csv``, a row a picture; ``histogram.png``; ``heatmaps.png``, an overview from the easiest defective
    picture to the hardest, and then the good pictures with the highest scores.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pictures, predictions = evaluation.pictures, evaluation.predictions
    pd.DataFrame(
        {
            "picture": pictures["path"],
            "label": pictures["label"],
            "defect_type": pictures["defect_type"],
            "score": predictions.score_B,
            "p_value": predictions.p_value_B,
            "is_anomalous": predictions.is_anomalous_B.astype(int),
        }
    ).to_csv(folder / "scores.csv", index=False, float_format="%.6g")
    labels_N = pictures["label"].to_numpy()
    good_N, defective_N = predictions.score_B[labels_N == 0], predictions.score_B[labels_N == 1]
    figure = histogram(good_N, defective_N, detector.calibration.threshold, detector.class_name)
    figure.savefig(folder / "histogram.png", dpi=110, metadata={"Software": None})
    chosen = _examples(predictions.score_B, labels_N)
    if len(chosen):
        stack([_panel(evaluation, detector, root, int(index)) for index in chosen]).save(folder / "heatmaps.png")


def roc_points(evaluation: Evaluation) -> pd.DataFrame:
    """The ROC curve over the test pictures, with columns false_positive_rate and true_positive_rate."""
    labels_N = evaluation.pictures["label"].to_numpy()
    if len(np.unique(labels_N)) < 2:
        return pd.DataFrame({"false_positive_rate": [], "true_positive_rate": []})
    false_positive, true_positive, _ = roc_curve(labels_N, evaluation.predictions.score_B)
    return pd.DataFrame({"false_positive_rate": false_positive, "true_positive_rate": true_positive})


def _examples(scores_N: NDArray[np.float32], labels_N: NDArray[np.integer[Any]]) -> NDArray[np.integer[Any]]:
    """Defective pictures evenly from the highest score to the lowest, then the good ones with the highest."""
    ranked = np.argsort(-scores_N, kind="stable")
    bad, good = ranked[labels_N[ranked] == 1], ranked[labels_N[ranked] == 0]
    if not len(bad):
        return good[:PANELS]
    spread = np.unique(np.linspace(0, len(bad) - 1, min(PANELS, len(bad))).round().astype(int))
    return np.concatenate([bad[spread], good[: PANELS // 2]])


def _panel(evaluation: Evaluation, detector: Detector, root: UPath, index: int) -> Image.Image:
    row = evaluation.pictures.iloc[index]
    image = open_image((root / row.path).read_bytes(), row.path)
    map_HW = evaluation.predictions.anomaly_map(index, (row.height, row.width))
    decision = "anomalous" if evaluation.predictions.is_anomalous_B[index] else "passed"
    caption = (
        f"{row.path}   {row.defect_type}   score {evaluation.predictions.score_B[index]:.3f}   "
        f"p {evaluation.predictions.p_value_B[index]:.3f}   {decision}"
    )
    return panel(image, read_mask(root, row), heat(map_HW, detector.calibration), caption)
