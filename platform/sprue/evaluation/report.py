"""A report that a quality manager can read: one HTML file for each class and one over all, without any other file.

Shapes: N samples.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure as Drawing
from numpy.typing import NDArray
from PIL import Image
from upath import UPath

from sprue.evaluation.evaluate import Evaluation, sample_panel
from sprue.evaluation.metrics import Figure
from sprue.evaluation.pictures import histogram
from sprue.inference.detector import Detector

WORST = 4
"""False alarms, and misses, that are shown."""

MEANINGS = {
    "detection_rate": "of the defective parts raise an alarm at the calibrated threshold",
    "false_alarm_rate": "of the good parts raise a false alarm at the calibrated threshold",
    "image_auroc": "chance that a defective part scores above a good one (AUROC)",
    "image_average_precision": "average precision over all thresholds",
    "image_best_f1": "F1 at the best threshold, which needs defective parts to be found",
    "image_pb2": "of the defective parts are caught if at most 2 % of these good ones may be lost (PB2)",
    "image_pg2": "of the good parts are passed if at most 2 % of these defective ones may slip (PG2)",
    "picture_auroc": "AUROC of single pictures instead of parts",
    "picture_average_precision": "average precision of single pictures",
    "picture_best_f1": "F1 of single pictures at the best threshold",
    "picture_pb2": "PB2 of single pictures",
    "picture_pg2": "PG2 of single pictures",
    "pixel_aupro": "mean overlap with a defect's region, up to 30 % false pixels (AUPRO)",
    "pixel_detection_rate": "of a defect's pixels are marked, on average over the defective pictures",
    "pixel_false_alarm_rate": "of a good picture's pixels are marked, on average over the good pictures",
    "pixel_auroc": "chance that a pixel of a defect lies above a good one (pixel AUROC)",
    "pixel_average_precision": "average precision of pixels",
    "pixel_best_f1": "F1 of pixels at the best threshold",
}
"""What each figure says, in the order of the report."""

_PAGES = Environment(loader=PackageLoader("sprue.evaluation", "pages"), autoescape=True, undefined=StrictUndefined)
_PAGES.filters["percent"] = lambda figure: f"{100 * figure.value:.1f} %" if np.isfinite(figure.value) else "–"
_PAGES.filters["interval"] = lambda figure: (
    f"{100 * figure.low:.1f} to {100 * figure.high:.1f}" if figure.low < figure.high else ""
)


@dataclass(frozen=True)
class ClassReport:
    """A class's report, and what the page over all classes says of it.

    Attributes:
        class_name: The product class.
        page: The HTML.
        figures: By name.
    """

    class_name: str
    page: str
    figures: Mapping[str, Figure]


def class_report(evaluation: Evaluation, detector: Detector, origin: Mapping[str, str], root: UPath) -> ClassReport:
    """Writes a class's page.

    Args:
        evaluation: What was measured.
        detector: What was measured on.
        origin: What was fitted on what, by the names that the page shows.
        root: Folder or URL of the pictures.
    """
    page = _PAGES.get_template("class.html").render(
        detector=detector,
        facts=evaluation.facts,
        figures=[(MEANINGS[name], evaluation.figures[name]) for name in MEANINGS if name in evaluation.figures],
        by_name=evaluation.figures,
        confusion=_confusion(evaluation),
        defect_types=_easiest_first(evaluation),
        charts=[_svg(drawing) for drawing in _charts(evaluation, detector)],
        false_alarms=_worst(evaluation, detector, root, label=0),
        misses=_worst(evaluation, detector, root, label=1),
        origin=origin,
    )
    return ClassReport(detector.class_name, page, evaluation.figures)


def overview(dataset: str, reports: Sequence[ClassReport], alpha: float) -> str:
    """The page over all classes, which links to theirs in ``<class>/report.html``; means are over the classes."""
    names = [name for name in MEANINGS if any(name in report.figures for report in reports)]
    missing = Figure(np.nan, np.nan, np.nan)
    rows = [(report.class_name, [report.figures.get(name, missing) for name in names]) for report in reports]
    means = [
        float(np.mean([report.figures[name].value for report in reports if name in report.figures])) for name in names
    ]
    columns = [(name.replace("_", " "), MEANINGS[name]) for name in names]
    return _PAGES.get_template("overview.html").render(
        dataset=dataset, columns=columns, rows=rows, means=[Figure(mean, np.nan, np.nan) for mean in means], alpha=alpha
    )


def _confusion(evaluation: Evaluation) -> list[tuple[str, int, int]]:
    """Of good and of defective samples, how many were passed and how many called anomalous."""
    labels_N, called_N = evaluation.samples["label"].to_numpy(), evaluation.predictions.is_anomalous_B
    return [
        (what, int((~called_N[labels_N == label]).sum()), int(called_N[labels_N == label].sum()))
        for label, what in enumerate(("good", "defective"))
    ]


def _easiest_first(evaluation: Evaluation) -> list[tuple[str, int, Mapping[str, Figure]]]:
    counts = evaluation.samples["defect_type"].value_counts()
    found = [(name, int(counts[name]), figures) for name, figures in evaluation.defect_types.items()]
    return sorted(found, key=lambda each: (-each[2]["detection_rate"].value, -each[2]["image_auroc"].value))


def _charts(evaluation: Evaluation, detector: Detector) -> list[Drawing]:
    labels_N, scores_N = evaluation.samples["label"].to_numpy(), evaluation.predictions.score_B
    drawings = [
        histogram(scores_N[labels_N == 0], scores_N[labels_N == 1], detector.calibration.threshold, "scores of parts")
    ]
    axes_of = {
        "roc": ("good parts called anomalous", "defective parts caught", "ROC curve"),
        "precision_recall": ("defective parts caught (recall)", "alarms that are right (precision)", "precision"),
        "pro": ("good pixels above the threshold", "mean share of a defect's region", "overlap of regions (PRO)"),
    }
    for name, (x, y, title) in axes_of.items():
        if name in evaluation.curves:
            drawing = Drawing(figsize=(3.4, 3.2), layout="constrained")
            axes = drawing.subplots()
            axes.plot(*evaluation.curves[name], color="#3b6fb6")
            axes.set(xlabel=x, ylabel=y, title=title, xlim=(0, 0.3 if name == "pro" else 1.01), ylim=(0, 1.01))
            axes.grid(alpha=0.3)
            drawings.append(drawing)
    return drawings


def _worst(evaluation: Evaluation, detector: Detector, root: UPath, label: int) -> list[str]:
    """Good samples that were called anomalous, or defective ones that passed, the worst first, as data URLs."""
    wrong_N = (evaluation.samples["label"].to_numpy() == label) & (
        evaluation.predictions.is_anomalous_B == (label == 0)
    )
    scores_N: NDArray[Any] = evaluation.predictions.score_B
    ranked = np.argsort(scores_N if label else -scores_N, kind="stable")
    chosen = [int(index) for index in ranked if wrong_N[index]][:WORST]
    return [_jpeg(sample_panel(evaluation, detector, root, index)) for index in chosen]


def _svg(drawing: Drawing) -> str:
    stream = io.BytesIO()
    drawing.savefig(stream, format="svg", metadata={"Date": None})
    return _data_url("svg+xml", stream.getvalue())


def _jpeg(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=88)
    return _data_url("jpeg", stream.getvalue())


def _data_url(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
