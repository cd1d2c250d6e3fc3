"""A class's report for quality managers: one HTML file, complete in itself.

Shapes: N samples.
"""

import base64
import io
from collections.abc import Mapping

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure
from PIL import Image
from upath import UPath

from sprue.config import Guarantee
from sprue.evaluation.baseline import in_words
from sprue.evaluation.evaluate import Evaluation, sample_panel
from sprue.evaluation.metrics import Estimate
from sprue.evaluation.outliers import outliers
from sprue.evaluation.render import figure, histogram
from sprue.evaluation.summary import wrong_samples
from sprue.inference.calibration import (
    RATE_COVERAGE,
    Calibration,
    calibration_samples_needed,
    cross_conformal_bound,
)
from sprue.inference.detector import Detector

WORST = 4
"""False alarms and misses in a report, at most of each."""

MEANINGS = {
    "detection_rate": "of the defective parts raise an alarm at the calibrated threshold",
    "false_alarm_rate": "of the good parts raise a false alarm at the calibrated threshold",
    "sample_auroc": "chance that a defective part scores above a good one (AUROC)",
    "sample_average_precision": "average precision over all thresholds",
    "sample_best_f1": "F1 at the best threshold, which takes defective parts to find",
    "sample_pb2": "of the defective parts raise an alarm where at most 2 % of the good ones do (PB2: TPR at 2 % FPR)",
    "sample_pg2": "of the good parts raise none where at most 2 % of defective ones are missed (PG2: TNR at 2 % FNR)",
    "image_auroc": "AUROC of single images instead of parts",
    "image_average_precision": "average precision of single images",
    "image_best_f1": "F1 of single images at the best threshold",
    "image_pb2": "PB2 of single images",
    "image_pg2": "PG2 of single images",
    "pixel_aupro": "mean overlap with a defect's region, up to 30 % false pixels (AUPRO)",
    "pixel_detection_rate": "of a defect's pixels are in the predicted mask, on average over the defective images",
    "pixel_false_alarm_rate": "of a good image's pixels are in the predicted mask, on average over the good images",
    "pixel_auroc": "chance that a pixel of a defect lies above a good one (pixel AUROC)",
    "pixel_average_precision": "average precision of pixels",
    "pixel_best_f1": "F1 of pixels at the best threshold",
}
"""The meaning of each metric, in the report's order."""

PAGES = Environment(loader=PackageLoader("sprue.evaluation", "pages"), autoescape=True, undefined=StrictUndefined)
PAGES.filters["percent"] = lambda estimate: f"{100 * estimate.value:.1f} %" if np.isfinite(estimate.value) else "–"
PAGES.filters["interval"] = lambda estimate: (
    f"{100 * estimate.low:.1f} to {100 * estimate.high:.1f}" if estimate.low < estimate.high else ""
)


PROMISES: dict[Guarantee, str] = {
    "marginal": "at most {alpha:.3g} % of exchangeable good samples are called anomalous, on average over calibrations",
    "conditional": "with {confidence:.3g} % confidence in this one calibration, at most {alpha:.3g} % of exchangeable "
    "good samples are called anomalous",
}
"""What each guarantee says of its threshold."""


def class_report(evaluation: Evaluation, detector: Detector, origin: Mapping[str, str], root: UPath) -> str:
    """A class's page; `origin` holds facts about data and fit, by the names that the page shows."""
    estimates = shown(evaluation.estimates)
    return PAGES.get_template("class.html").render(
        detector=detector,
        guarantee=guarantee_in_words(detector.calibration),
        over_gaussian=in_words(detector.flow_name, evaluation.metrics),
        facts=evaluation.facts,
        metrics=[(MEANINGS[name], estimate) for name, estimate in estimates.items()],
        estimates=estimates,
        confusion=_confusion(evaluation),
        defect_types=_easiest_first(evaluation),
        charts=[_svg(drawing) for drawing in _charts(evaluation, detector)],
        false_alarms=_worst(evaluation, detector, root, label=0),
        misses=_worst(evaluation, detector, root, label=1),
        origin=origin,
    )


def guarantee_in_words(calibration: Calibration) -> str:
    """What a threshold promises, what it would be under the other guarantee, and what the false-alarm rate may be."""
    low, high = (100 * rate for rate in calibration.false_alarm_rates)
    rates = f"lies between {low:.3g} % and {high:.3g} % ({100 * RATE_COVERAGE:.3g} % confidence)."
    promise = _folds_in_words(calibration, rates) if calibration.folds > 1 else _promise_in_words(calibration, rates)
    return promise + _outliers_in_words(calibration)


def _folds_in_words(calibration: Calibration, rates: str) -> str:
    alpha, folds, samples = calibration.alpha, calibration.folds, len(calibration.scores)
    bound = cross_conformal_bound(samples, folds, alpha)
    return (
        f"Cross-conformal calibration: {folds} flows, each fitted without the fold that calibrates it, and "
        f"{samples} good samples in all. About {100 * alpha:.3g} % of exchangeable good samples are called anomalous "
        f"(score above {calibration.threshold:.4g}). Proven is at most {100 * bound:.3g} %, for the comparison with "
        "each fold by its own flow, if no setting was searched on these samples. If the mean of the flows scores new "
        f"good samples as each flow scores its fold, the true false-alarm rate {rates}"
    )


def _promise_in_words(calibration: Calibration, rates: str) -> str:
    alpha, confidence, samples = calibration.alpha, calibration.confidence, len(calibration.scores)
    promises = {
        name: promise.format(alpha=100 * alpha, confidence=100 * confidence) for name, promise in PROMISES.items()
    }
    other: Guarantee = "conditional" if calibration.guarantee == "marginal" else "marginal"
    needed = calibration_samples_needed(alpha, other, confidence)
    threshold = f"the threshold would be {calibration.threshold_under(other):.4g}"
    return (
        f"The {calibration.guarantee} guarantee holds: {promises[calibration.guarantee]} (score above "
        f"{calibration.threshold:.4g}). Under the {other} guarantee ({promises[other]}) "
        f"{threshold if samples >= needed else f'at least {needed} calibration samples are needed'}. "
        f"With {samples} calibration samples the true false-alarm rate {rates}"
    )


def _outliers_in_words(calibration: Calibration) -> str:
    found = np.sort(np.array(calibration.scores)[outliers(np.array(calibration.scores))])
    if not len(found):
        return ""
    listed = ", ".join(f"{score:.4g}" for score in found)
    return (
        f" The calibration scores {listed} lie far beyond the others: they raise the threshold, and defects may be "
        "missed. The report's overview names those samples about which nothing is decided: put what is no good part "
        "into manifest.drop, and what is one into manifest.keep."
    )


def shown(estimates: Mapping[str, Estimate]) -> dict[str, Estimate]:
    """A class's estimates in the order of the report, without those of images that repeat those of samples."""
    found = {name: estimates[name] for name in MEANINGS if name in estimates}
    return {
        name: estimate
        for name, estimate in found.items()
        if not (name.startswith("image_") and estimate == found.get(f"sample_{name.removeprefix('image_')}"))
    }


def _confusion(evaluation: Evaluation) -> list[tuple[str, int, int]]:
    """For good and for defective samples, the numbers without and with an alarm."""
    labels_N, is_anomalous_N = evaluation.labels_N, evaluation.predictions.is_anomalous_B
    alarms = {"good": is_anomalous_N[labels_N == 0], "defective": is_anomalous_N[labels_N == 1]}
    return [(what, int((~is_alarm).sum()), int(is_alarm.sum())) for what, is_alarm in alarms.items()]


def _easiest_first(evaluation: Evaluation) -> list[tuple[str, int, Mapping[str, Estimate]]]:
    counts = evaluation.samples["defect_type"].value_counts()
    types = [(name, int(counts[name]), estimates) for name, estimates in evaluation.defect_types.items()]
    return sorted(types, key=lambda each: (-each[2]["detection_rate"].value, -each[2]["sample_auroc"].value))


def _charts(evaluation: Evaluation, detector: Detector) -> list[Figure]:
    scores_N, threshold = evaluation.predictions.score_B, detector.calibration.threshold
    drawings = [histogram(scores_N, evaluation.labels_N, threshold, "scores of parts")]
    axes_of = {
        "roc": ("false-positive rate", "true-positive rate", "ROC curve of parts"),
        "precision_recall": ("recall", "precision", "precision and recall of parts"),
        "pro": ("false-positive rate of pixels", "mean overlap with a region", "per-region overlap (PRO)"),
    }
    for name, (x, y, title) in axes_of.items():
        if name in evaluation.curves:
            drawing, axes = figure(width=3.4)
            axes.plot(*evaluation.curves[name], color="#3b6fb6")
            axes.set(xlabel=x, ylabel=y, title=title, xlim=(0, 0.3 if name == "pro" else 1.01), ylim=(0, 1.01))
            axes.grid(alpha=0.3)
            drawings.append(drawing)
    return drawings


def _worst(evaluation: Evaluation, detector: Detector, root: UPath, label: int) -> list[str]:
    """Panels of false alarms (label 0) or misses (label 1), the worst first, as data URLs."""
    chosen = wrong_samples(evaluation, label)[:WORST].tolist()
    return [_jpeg(sample_panel(evaluation, detector, root, index)) for index in chosen]


def _svg(drawing: Figure) -> str:
    stream = io.BytesIO()
    drawing.savefig(stream, format="svg", metadata={"Date": None})
    return _data_url("svg+xml", stream.getvalue())


def _jpeg(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=88)
    return _data_url("jpeg", stream.getvalue())


def _data_url(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
