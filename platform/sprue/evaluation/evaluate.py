"""Measures a detector once on the test split.

A sample is one image or several views.

Shapes: N samples, M images with ground truth, B samples and V views of a prediction, H rows, W columns of an image,
P points of a curve.
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

from sprue.data.samples import samples_of
from sprue.errors import SprueError
from sprue.evaluation.baseline import Batches, Comparison, as_metrics, baseline_maps, compare
from sprue.evaluation.curves import Counts, Curve
from sprue.evaluation.metrics import Estimate, fraction, mean, pixel_estimates, score_estimates
from sprue.evaluation.pixels import PixelCounts, predicted_mask_fractions
from sprue.evaluation.render import histogram, panel, stack
from sprue.evaluation.truth import GroundTruth, mask_of
from sprue.features.tables import FeatureTable
from sprue.inference.detector import Detector, Predictions
from sprue.inference.heatmap import heat
from sprue.inference.images import open_image

VERSION = 3
"""Changes when the same scores, labels and maps give other metrics."""

OVERVIEW = "heatmaps.png"
"""The file that shows some test samples."""

OVERVIEW_IMAGES = 6
"""Images of defective samples in the overview; half as many of good ones."""

OVERVIEW_SAMPLES = 3
"""Defective samples in the overview at least, however many views each has."""

CURVE_POINTS = 300
"""Points of a curve, at most."""


@dataclass(frozen=True)
class Evaluation:
    """A detector's metrics and predictions on the test split; a metric that does not exist is missing.

    Attributes:
        facts: The numbers of good and defective samples; the calibration's ``alpha``, ``threshold`` and
            ``pixel_threshold``; ``false_alarm_rate_low`` and ``false_alarm_rate_high``, between which the threshold's
            true false-alarm rate lies (see `Calibration.false_alarm_rates`).
        estimates: By name, with intervals.
        curves: Points of ``roc`` (false- and true-positive rate), ``precision_recall`` (recall, precision) and ``pro``
            (false-positive rate, mean overlap of a region), thinned; those that exist.
        defect_types: For each type its ``sample_auroc`` against all good samples, and its ``detection_rate``.
        predictions: Of the test samples.
        images: The manifest's test rows, a sample's views in sequence.
        over_gaussian: By the names of metrics, what the flow adds to the Gaussian; see `sprue.evaluation.baseline`.
    """

    facts: dict[str, float]
    estimates: dict[str, Estimate]
    curves: dict[str, tuple[Counts, Counts]]
    defect_types: dict[str, dict[str, Estimate]]
    predictions: Predictions
    images: pd.DataFrame
    over_gaussian: dict[str, Comparison]

    @property
    def views(self) -> int:
        """Views of a sample."""
        return self.predictions.image_score_BV.shape[1]

    @property
    def metrics(self) -> dict[str, float]:
        """Facts, the estimates' values and what the flow adds, for the metrics file and MLflow."""
        values = {name: estimate.value for name, estimate in self.estimates.items()}
        return self.facts | values | as_metrics(self.over_gaussian)

    @property
    def headline(self) -> str:
        """The most important metrics in one line."""
        chosen = ("sample_auroc", "pixel_auroc", "pixel_aupro", "false_alarm_rate", "detection_rate")
        return "  ".join(f"{name} {self.estimates[name].value:.2%}" for name in chosen if name in self.estimates)

    @property
    def samples(self) -> pd.DataFrame:
        """The row of each sample's first view."""
        return self.images.iloc[:: self.views].reset_index(drop=True)

    @property
    def labels_N(self) -> NDArray[np.integer[Any]]:
        """1 for a defective sample, 0 for a good one."""
        return self.samples["label"].to_numpy()


def evaluate(
    detector: Detector, table: FeatureTable, images: pd.DataFrame, root: UPath, training: Batches | None = None
) -> Evaluation:
    """Measures a detector on the manifest's test rows, and what it adds to the Gaussian if `training` maps are given.

    ``sample_*``, ``false_alarm_rate`` and ``detection_rate`` are metrics of samples. ``image_*`` are metrics of images,
    which equal those of samples where a sample has one view; an image of several views is defective if its mask has an
    anomalous pixel. ``pixel_*`` are metrics of pixels at the images' own size. Samples without ground truth (defective
    ones without any mask) count neither for ``pixel_*`` nor for the ``image_*`` of several views.

    Raises:
        SprueError: If a mask can't be read, a score is not finite or no Gaussian can be fitted; the message names the
            file or the class.
    """
    views = len(detector.views)
    samples = samples_of(images)
    predictions = Predictions.concatenate(
        [detector.predict_features(maps) for maps in table.read_in_turn(samples, views)]
    )
    labels_N, types_N = (images[column].to_numpy()[::views] for column in ("label", "defect_type"))
    if not np.isfinite(predictions.score_B).all():
        raise SprueError(f"class {detector.class_name}: scores of test samples are not finite: the fit has diverged")
    of_scores = score_estimates(predictions.score_B, labels_N)
    estimates = _prefixed("sample", of_scores) | {
        "false_alarm_rate": fraction(predictions.is_anomalous_B[labels_N == 0]),
        "detection_rate": fraction(predictions.is_anomalous_B[labels_N == 1]),
    }
    truth = GroundTruth.of(images, views, root)
    of_pixels, counts = _localisation(detector, predictions, truth)
    estimates |= _prefixed("pixel", of_pixels)
    if views > 1:
        image_scores_M = predictions.image_score_BV.ravel()[truth.index_M]
        of_scores = score_estimates(image_scores_M, counts.is_defective_N.astype(int), truth.groups_M)
    estimates |= _prefixed("image", of_scores)
    comparisons: dict[str, Comparison] = {}
    if training:
        try:
            test = table.read_in_turn(samples, views, baseline_maps(detector.spec))
            comparisons = compare(detector, training, test, predictions.score_B, labels_N, counts, truth)
        except ValueError as error:
            raise SprueError(
                f"class {detector.class_name}: the Gaussian that its flow is held against: {error}"
            ) from error
    low, high = detector.calibration.false_alarm_rates
    facts = {
        "test_good": float((labels_N == 0).sum()),
        "test_defective": float((labels_N == 1).sum()),
        "alpha": detector.calibration.alpha,
        "threshold": detector.calibration.threshold,
        "pixel_threshold": detector.calibration.pixel_threshold,
        "false_alarm_rate_low": low,
        "false_alarm_rate_high": high,
    }
    return Evaluation(
        facts,
        {name: estimate for name, estimate in estimates.items() if np.isfinite(estimate.value)},
        _curves(labels_N, predictions, counts),
        _by_defect_type(labels_N, types_N, predictions),
        predictions,
        images,
        comparisons,
    )


def _localisation(
    detector: Detector, predictions: Predictions, truth: GroundTruth
) -> tuple[dict[str, Estimate], PixelCounts]:
    """Metrics of pixels, and the pixels' counts."""

    def predicted_mask_of(index: int) -> NDArray[np.bool_]:
        return detector.calibration.predicted_mask(truth.map(predictions.position_scores_BVHW, index))

    counts = truth.count(predictions.position_scores_BVHW)
    of_normal_M, of_anomalous_M = predicted_mask_fractions(predicted_mask_of, truth.mask, len(truth))
    is_good_M = (truth.rows["label"] == 0).to_numpy()
    has_defect_M, groups_M = np.isfinite(of_anomalous_M), truth.groups_M
    estimates = pixel_estimates(counts, groups_M) | {
        "false_alarm_rate": mean(of_normal_M[is_good_M], groups_M[is_good_M]),
        "detection_rate": mean(of_anomalous_M[has_defect_M], groups_M[has_defect_M]),
    }
    return estimates, counts


def _by_defect_type(
    labels_N: NDArray[np.integer[Any]], types_N: NDArray[Any], predictions: Predictions
) -> dict[str, dict[str, Estimate]]:
    estimates = {}
    for defect_type in sorted(set(types_N[labels_N == 1])):
        chosen_N = (labels_N == 0) | (types_N == defect_type)
        estimates[defect_type] = {
            "sample_auroc": score_estimates(predictions.score_B[chosen_N], labels_N[chosen_N])["auroc"],
            "detection_rate": fraction(predictions.is_anomalous_B[types_N == defect_type]),
        }
    return estimates


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
    """At most `CURVE_POINTS` of a curve's points, evenly along its length."""
    x_P, y_P = points
    if len(x_P) <= CURVE_POINTS:
        return points
    length_P = np.concatenate([[0.0], np.cumsum(np.hypot(np.diff(x_P), np.diff(y_P)))])
    kept = np.unique(np.searchsorted(length_P, np.linspace(0, length_P[-1], CURVE_POINTS)))
    return x_P[kept], y_P[kept]


def _prefixed(prefix: str, estimates: dict[str, Estimate]) -> dict[str, Estimate]:
    return {f"{prefix}_{name}": estimate for name, estimate in estimates.items()}


def write_evaluation(evaluation: Evaluation, detector: Detector, root: UPath, folder: Path) -> None:
    """Writes an evaluation's files.

    ``estimates.json``: estimates in all, over the Gaussian and by defect type, null where one does not exist.
    ``scores.csv``: a row for each sample, with the scores of its images where there are several. ``histogram.png``: the
    scores. ``heatmaps.png``: an overview of defective samples from the highest score to the lowest, then of the good
    samples with the highest scores, with a panel for each image.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "estimates": _as_json(evaluation.estimates),
        "over_gaussian": {name: each.difference.as_json() for name, each in evaluation.over_gaussian.items()},
        "defect_types": {name: _as_json(estimates) for name, estimates in evaluation.defect_types.items()},
    }
    (folder / "estimates.json").write_text(json.dumps(content, indent=2) + "\n")
    _scores(evaluation, detector).to_csv(folder / "scores.csv", index=False, float_format="%.6g")
    labels_N, scores_N = evaluation.labels_N, evaluation.predictions.score_B
    drawing = histogram(scores_N, labels_N, detector.calibration.threshold, detector.class_name)
    drawing.savefig(folder / "histogram.png", dpi=110, metadata={"Software": None})
    chosen = _examples(scores_N, labels_N, max(OVERVIEW_SAMPLES, OVERVIEW_IMAGES // evaluation.views))
    if len(chosen):
        panels = [sample_panel(evaluation, detector, root, int(index)) for index in chosen]
        stack(panels).save(folder / OVERVIEW)


def _as_json(estimates: dict[str, Estimate]) -> dict[str, dict[str, float | None]]:
    return {name: estimate.as_json() for name, estimate in estimates.items()}


def _scores(evaluation: Evaluation, detector: Detector) -> pd.DataFrame:
    samples, predictions = evaluation.samples, evaluation.predictions
    scores = samples[["sample_id", "label", "defect_type"]].rename(columns={"sample_id": "sample"})
    scores["score"], scores["p_value"] = predictions.score_B, predictions.p_value_B
    scores["is_anomalous"] = predictions.is_anomalous_B.astype(int)
    if evaluation.views > 1:
        names = [f"score_{view}" for view in detector.views]
        scores = scores.join(pd.DataFrame(predictions.image_score_BV, columns=names))
    return scores


def _examples(
    scores_N: NDArray[np.float32], labels_N: NDArray[np.integer[Any]], count: int
) -> NDArray[np.integer[Any]]:
    """Defective samples evenly from the highest score to the lowest, then half as many good ones with the highest."""
    ranked = np.argsort(-scores_N, kind="stable")
    defective, good = ranked[labels_N[ranked] == 1], ranked[labels_N[ranked] == 0]
    if not len(defective):
        return good[:count]
    spread = np.unique(np.linspace(0, len(defective) - 1, min(count, len(defective))).round().astype(int))
    return np.concatenate([defective[spread], good[: count // 2]])


def sample_panel(evaluation: Evaluation, detector: Detector, root: UPath, index: int) -> Image.Image:
    """Image, ground truth, heat map and overlay of each of a sample's views."""
    return stack([_panel(evaluation, detector, root, index, view) for view in range(evaluation.views)])


def _panel(evaluation: Evaluation, detector: Detector, root: UPath, index: int, view: int) -> Image.Image:
    predictions, calibration = evaluation.predictions, detector.calibration
    row = evaluation.images.iloc[index * evaluation.views + view]
    image = open_image((root / row.path).read_bytes(), row.path)
    map_HW = predictions.anomaly_map(index, (row.height, row.width), view)
    decision = "anomalous" if predictions.is_anomalous_B[index] else "normal"
    of_image = f"   image {predictions.image_score_BV[index, view]:.3f}" if evaluation.views > 1 else ""
    caption = (
        f"{row.path}   {row.defect_type}   score {predictions.score_B[index]:.3f}{of_image}   "
        f"p {predictions.p_value_B[index]:.3f}   {decision}"
    )
    return panel(image, mask_of(root, row), heat(map_HW, calibration), calibration.predicted_mask(map_HW), caption)
