"""Makes a detector of a fitted flow and measures it once on the test split.

A sample is one picture or several, its views.

Shapes: N samples, B samples and V views of a prediction, H rows, W columns of a picture.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image
from upath import UPath

from defectflow import Flow
from sprue.data.samples import samples_of, views_of
from sprue.errors import SprueError
from sprue.evaluation.curves import Counts, Curve
from sprue.evaluation.metrics import Figure, image_figures, mean, pixel_figures, share
from sprue.evaluation.pictures import histogram, panel, stack
from sprue.evaluation.pixels import PixelCounts, count_pixels, marked_shares
from sprue.features.tables import FeatureTable
from sprue.inference.calibration import Calibration
from sprue.inference.detector import (
    Detector,
    Predictions,
    Scoring,
    anomaly_map,
    best_device,
    require_views,
    score_features,
)
from sprue.inference.heatmap import heat
from sprue.inference.images import open_image
from sprue.inference.spec import FeatureSpec

PANELS = 6
"""Pictures of defective samples in the overview; half as many of good ones."""

OVERVIEW = "heatmaps.png"
"""The file of that overview."""

POINTS = 300
"""Of a curve."""

FEWEST = 3
"""Defective samples in the overview, however many pictures each has."""


@dataclass(frozen=True)
class Evaluation:
    """A detector's figures and predictions on the test split; figures that don't exist are left out.

    Attributes:
        facts: How many good and defective samples there are, ``alpha``, and the thresholds that it implies,
            ``threshold`` and ``pixel_threshold``.
        figures: By name, with their intervals.
        curves: Points of ``roc`` (false- and true-positive rate), ``precision_recall`` (recall, precision) and ``pro``
            (false-positive rate, mean overlap of a region), thinned; those that exist.
        defect_types: For each type its ``image_auroc`` against all good samples, and its ``detection_rate``.
        predictions: Of the test samples.
        pictures: The manifest's test rows, a sample's views one after the other.
    """

    facts: dict[str, float]
    figures: dict[str, Figure]
    curves: dict[str, tuple[Counts, Counts]]
    defect_types: dict[str, dict[str, Figure]]
    predictions: Predictions
    pictures: pd.DataFrame

    @property
    def views(self) -> int:
        """Pictures of a sample."""
        return self.predictions.picture_score_BV.shape[1]

    @property
    def metrics(self) -> dict[str, float]:
        """Facts and figures as they go to the metrics file and to MLflow."""
        return self.facts | {name: figure.value for name, figure in self.figures.items()}

    @property
    def headline(self) -> str:
        """The figures that matter most, in a line."""
        chosen = ("image_auroc", "pixel_auroc", "pixel_aupro", "false_alarm_rate", "detection_rate")
        return "  ".join(f"{name} {self.figures[name].value:.2%}" for name in chosen if name in self.figures)

    @property
    def samples(self) -> pd.DataFrame:
        """The row of each sample's first view."""
        return self.pictures.iloc[:: self.views].reset_index(drop=True)


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
        SprueError: If there are too few samples for `alpha`, the flow reads another number of views, or scores are
            not finite; the message names the class.
    """
    views = views_of(calibration)
    flow = flow.to(best_device())
    require_views(class_name, flow_name, flow, len(views))
    maps = table.read_samples(samples_of(calibration), len(views))
    scores_N, _, evidence_NVHW = score_features(flow, scoring, maps)
    sizes_NV2 = calibration[["height", "width"]].to_numpy().reshape(-1, len(views), 2)
    shown = (
        [anomaly_map(*each).ravel() for each in zip(evidence_VHW, sizes_V2.tolist(), strict=True)]
        for evidence_VHW, sizes_V2 in zip(evidence_NVHW, sizes_NV2, strict=True)
    )
    try:
        calibrated = Calibration.fit(scores_N, evidence_NVHW, alpha, shown)
    except SprueError as error:
        raise SprueError(f"class {class_name}: {error}") from error
    return Detector(class_name, spec, flow_name, flow, scoring, calibrated, views)


def evaluate(detector: Detector, table: FeatureTable, pictures: pd.DataFrame, root: UPath) -> Evaluation:
    """Measures a detector on the manifest's test rows.

    Figures are of samples, but for those that begin with ``pixel_``, which are of the pictures' pixels at their own
    size, and with ``picture_``, where a sample has several views: these are of the pictures' scores, and a picture is
    defective if its mask has an anomalous pixel. Defective samples without any mask are left out of both.

    Raises:
        SprueError: If a mask can't be read or a score is not finite; the message names the file or the class.
    """
    views = len(detector.views)
    predictions = detector.predict_features(table.read_samples(samples_of(pictures), views))
    labels_N = pictures["label"].to_numpy()[::views]
    called_N = predictions.is_anomalous_B
    if not np.isfinite(predictions.score_B).all():
        raise SprueError(f"class {detector.class_name}: scores of test samples are not finite: the fit has diverged")
    figures = _prefixed("image", image_figures(predictions.score_B, labels_N)) | {
        "false_alarm_rate": share(called_N[labels_N == 0]),
        "detection_rate": share(called_N[labels_N == 1]),
    }
    has_truth_N = (labels_N == 0) | (pictures["mask_path"] != "").to_numpy().reshape(-1, views).any(1)
    measurable = np.flatnonzero(np.repeat(has_truth_N, views))
    shown = pictures.iloc[measurable]
    rows, sizes = list(shown.itertuples()), list(zip(shown["height"], shown["width"], strict=True))

    def map_of(i: int) -> NDArray[np.float32]:
        sample, view = divmod(int(measurable[i]), views)
        return predictions.anomaly_map(sample, sizes[i], view)

    def mask_of(i: int) -> NDArray[np.bool_] | None:
        return read_mask(root, rows[i])

    counts = count_pixels(map_of, mask_of, len(rows))
    figures |= _prefixed("pixel", pixel_figures(counts))
    alarms_N, found_N = marked_shares(lambda i: detector.calibration.marked(map_of(i)), mask_of, len(rows))
    of_good_N = (shown["label"] == 0).to_numpy()
    figures |= {
        "pixel_false_alarm_rate": mean(alarms_N[of_good_N]),
        "pixel_detection_rate": mean(found_N[np.isfinite(found_N)]),
    }
    if views > 1:
        defective_N = (counts.found_NQ.sum(1) > 0).astype(int)
        figures |= _prefixed("picture", image_figures(predictions.picture_score_BV.ravel()[measurable], defective_N))
    types_N = pictures["defect_type"].to_numpy()[::views]
    of_types = {}
    for defect_type in sorted(set(types_N[labels_N == 1])):
        chosen_N = (labels_N == 0) | (types_N == defect_type)
        of_types[defect_type] = {
            "image_auroc": image_figures(predictions.score_B[chosen_N], labels_N[chosen_N])["auroc"],
            "detection_rate": share(called_N[types_N == defect_type]),
        }
    facts = {
        "test_good": float((labels_N == 0).sum()),
        "test_defective": float((labels_N == 1).sum()),
        "alpha": detector.calibration.alpha,
        "threshold": detector.calibration.threshold,
    }
    if detector.calibration.pixel_threshold is not None:
        facts["pixel_threshold"] = detector.calibration.pixel_threshold
    existing = {name: figure for name, figure in figures.items() if np.isfinite(figure.value)}
    return Evaluation(facts, existing, _curves(labels_N, predictions, counts), of_types, predictions, pictures)


def _curves(
    labels_N: NDArray[np.integer[Any]], predictions: Predictions, counts: PixelCounts
) -> dict[str, tuple[Counts, Counts]]:
    curves = {}
    if len(np.unique(labels_N)) == 2:
        curve = Curve.of_scores(predictions.score_B, labels_N)
        curves = {"roc": thinned(curve.roc()), "precision_recall": thinned(curve.precision_recall())}
    if counts.curve.anomalous and counts.curve.normal:
        curves["pro"] = thinned(counts.curve.polygon(counts.overlap_K))
    return curves


def thinned(points: tuple[Counts, Counts]) -> tuple[Counts, Counts]:
    """At most `POINTS` of a curve's points, evenly along its length."""
    x_P, y_P = points
    if len(x_P) <= POINTS:
        return points
    length_P = np.concatenate([[0.0], np.cumsum(np.hypot(np.diff(x_P), np.diff(y_P)))])
    kept = np.unique(np.searchsorted(length_P, np.linspace(0, length_P[-1], POINTS)))
    return x_P[kept], y_P[kept]


def _prefixed(what: str, figures: dict[str, Figure]) -> dict[str, Figure]:
    return {f"{what}_{name}": figure for name, figure in figures.items()}


def read_mask(root: UPath, row: Any) -> NDArray[np.bool_] | None:
    """A manifest row's ground truth [H, W], anomalous from 128 up; None where there is none.

    Raises:
        SprueError: If all of a mask's values are below 128 and not all are 0, as where classes are numbered.
    """
    if not row.mask_path:
        return None
    grey_HW = np.asarray(open_image((root / row.mask_path).read_bytes(), row.mask_path).convert("L"))
    if 0 < grey_HW.max() < 128:
        raise SprueError(f"{row.mask_path}: the largest value is {grey_HW.max()}; write anomalous pixels as 255")
    return grey_HW >= 128


def write_evaluation(evaluation: Evaluation, detector: Detector, root: UPath, folder: Path) -> None:
    """Writes what a person looks at.

    ``figures.json``, with intervals and by defect type (null where a figure does not exist); ``scores.csv``, a row a
    sample, with the scores of its pictures where there are several; ``histogram.png``; ``heatmaps.png``, an overview
    from the easiest defective sample to the hardest, and then the good samples with the highest scores, a panel for
    each picture.
    """
    folder.mkdir(parents=True, exist_ok=True)
    samples, predictions = evaluation.samples, evaluation.predictions
    scores = pd.DataFrame(
        {
            "sample": samples["sample_id"],
            "label": samples["label"],
            "defect_type": samples["defect_type"],
            "score": predictions.score_B,
            "p_value": predictions.p_value_B,
            "is_anomalous": predictions.is_anomalous_B.astype(int),
        }
    )
    if evaluation.views > 1:
        names = [f"score_{view}" for view in detector.views]
        scores = scores.join(pd.DataFrame(predictions.picture_score_BV, columns=names))
    figures = {
        "figures": {name: figure.as_json() for name, figure in evaluation.figures.items()},
        "defect_types": {
            defect_type: {name: figure.as_json() for name, figure in of_type.items()}
            for defect_type, of_type in evaluation.defect_types.items()
        },
    }
    (folder / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    scores.to_csv(folder / "scores.csv", index=False, float_format="%.6g")
    labels_N = samples["label"].to_numpy()
    good_N, defective_N = predictions.score_B[labels_N == 0], predictions.score_B[labels_N == 1]
    figure = histogram(good_N, defective_N, detector.calibration.threshold, detector.class_name)
    figure.savefig(folder / "histogram.png", dpi=110, metadata={"Software": None})
    chosen = _examples(predictions.score_B, labels_N, max(FEWEST, PANELS // evaluation.views))
    if len(chosen):
        panels = [sample_panel(evaluation, detector, root, int(index)) for index in chosen]
        stack(panels).save(folder / OVERVIEW)


def _examples(
    scores_N: NDArray[np.float32], labels_N: NDArray[np.integer[Any]], count: int
) -> NDArray[np.integer[Any]]:
    """Defective samples evenly from the highest score to the lowest, then half as many good ones with the highest."""
    ranked = np.argsort(-scores_N, kind="stable")
    bad, good = ranked[labels_N[ranked] == 1], ranked[labels_N[ranked] == 0]
    if not len(bad):
        return good[:count]
    spread = np.unique(np.linspace(0, len(bad) - 1, min(count, len(bad))).round().astype(int))
    return np.concatenate([bad[spread], good[: count // 2]])


def sample_panel(evaluation: Evaluation, detector: Detector, root: UPath, index: int) -> Image.Image:
    """Picture, ground truth, map and overlay of each of a sample's views."""
    return stack([_panel(evaluation, detector, root, index, view) for view in range(evaluation.views)])


def _panel(evaluation: Evaluation, detector: Detector, root: UPath, index: int, view: int) -> Image.Image:
    predictions = evaluation.predictions
    row = evaluation.pictures.iloc[index * evaluation.views + view]
    image = open_image((root / row.path).read_bytes(), row.path)
    map_HW = predictions.anomaly_map(index, (row.height, row.width), view)
    decision = "anomalous" if predictions.is_anomalous_B[index] else "passed"
    of_picture = f"   picture {predictions.picture_score_BV[index, view]:.3f}" if evaluation.views > 1 else ""
    caption = (
        f"{row.path}   {row.defect_type}   score {predictions.score_B[index]:.3f}{of_picture}   "
        f"p {predictions.p_value_B[index]:.3f}   {decision}"
    )
    calibration = detector.calibration
    return panel(image, read_mask(root, row), heat(map_HW, calibration), calibration.marked(map_HW), caption)
