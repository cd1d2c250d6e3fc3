"""What the overview shows of a class beside its metrics: its worst errors as thumbnails, what needs a decision.

Shapes: N samples.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel
from upath import UPath

from sprue.evaluation.evaluate import Evaluation
from sprue.evaluation.outliers import Outlier
from sprue.evaluation.render import encoded, thumbnail, thumbnail_size
from sprue.evaluation.truth import mask_of
from sprue.inference.detector import Detector
from sprue.inference.images import open_image
from sprue.store import read_json

FILE = "summary.json"
MISS, FALSE_ALARM = "miss.webp", "false_alarm.webp"
"""Thumbnails of the worst miss and of the worst false alarm, if there is one."""


class Errors(BaseModel):
    """A class's misses or its false alarms.

    Attributes:
        count: How many there are.
        samples: Of so many defective or good test samples.
        path: The image of the worst that the thumbnail shows; empty if there are no errors.
        kind: Its defect type.
        score: Its sample's score.
        width: Columns of the thumbnail.
        height: Its rows.
    """

    count: int
    samples: int
    path: str = ""
    kind: str = ""
    score: float = 0.0
    width: int = 0
    height: int = 0


class Summary(BaseModel):
    """A class in the overview.

    Attributes:
        flow_name: Its flow.
        misses: Defective test samples below the threshold.
        false_alarms: Good ones above it.
        outliers: Calibration samples whose scores lie far beyond the others.
    """

    flow_name: str
    misses: Errors
    false_alarms: Errors
    outliers: list[Outlier]

    @classmethod
    def read(cls, folder: UPath) -> Self:
        """Reads what `write_summary` wrote.

        Raises:
            SprueError: If it is missing or damaged.
        """
        return cls.model_validate(read_json(folder / FILE, made_by="evaluate"))


def write_summary(
    evaluation: Evaluation, detector: Detector, outliers: Sequence[Outlier], root: UPath, folder: Path
) -> None:
    """Writes ``summary.json`` and the thumbnails; `root` is the dataset's folder."""
    summary = Summary(
        flow_name=detector.flow_name,
        misses=_errors(evaluation, detector, root, folder / MISS, label=1),
        false_alarms=_errors(evaluation, detector, root, folder / FALSE_ALARM, label=0),
        outliers=list(outliers),
    )
    (folder / FILE).write_text(summary.model_dump_json(indent=2) + "\n")


def _errors(evaluation: Evaluation, detector: Detector, root: UPath, file: Path, label: int) -> Errors:
    """The misses (label 1) or the false alarms (label 0); writes the thumbnail of the worst."""
    worst_first = wrong_samples(evaluation, label)
    errors = Errors(count=len(worst_first), samples=int((evaluation.labels_N == label).sum()))
    if not len(worst_first):
        return errors
    sample = int(worst_first[0])
    view, mask = _telling_view(evaluation, sample, root)
    row = evaluation.images.iloc[sample * evaluation.views + view]
    map_HW = evaluation.predictions.anomaly_map(sample, thumbnail_size(row["height"], row["width"]), view)
    image = thumbnail(open_image((root / row["path"]).read_bytes(), row["path"]), mask, map_HW, detector.calibration)
    file.write_bytes(encoded(image))
    worst = {"path": row["path"], "kind": row["defect_type"], "score": float(evaluation.predictions.score_B[sample])}
    return errors.model_copy(update=worst | {"width": image.width, "height": image.height})


def wrong_samples(evaluation: Evaluation, label: int) -> NDArray[np.intp]:
    """Indices of the misses (label 1, the lowest score first) or the false alarms (label 0, the highest first)."""
    wrong_N = (evaluation.labels_N == label) & (evaluation.predictions.is_anomalous_B == (label == 0))
    scores_N = evaluation.predictions.score_B
    ranked_N = np.argsort(scores_N if label else -scores_N, kind="stable")
    return ranked_N[wrong_N[ranked_N]]


def _telling_view(evaluation: Evaluation, sample: int, root: UPath) -> tuple[int, NDArray[Any] | None]:
    """The view whose mask has the most anomalous pixels, or without masks that of the highest score; and its mask."""
    rows = evaluation.images.iloc[sample * evaluation.views : (sample + 1) * evaluation.views]
    masks = [mask_of(root, row) for row in rows.itertuples()]
    anomalous = [0 if mask is None else int(mask.sum()) for mask in masks]
    telling = anomalous if any(anomalous) else evaluation.predictions.image_score_BV[sample]
    view = int(np.argmax(telling))
    return view, masks[view]
