"""The table of scores: a row for each sample.

Columns: ``sample`` (the image's path, or its folder's), ``sha256``, ``score``, ``p_value``, ``is_anomalous``,
``threshold``, ``alpha``, ``dataset``, ``class_name``, ``version``, ``detector`` (digest of its files), ``error``,
``heatmap``, ``heatmap_view`` and ``predicted_mask_fraction``. Samples of several views have ``path_<view>``,
``sha256_<view>`` and ``score_<view>`` for each view instead of ``sha256``. Where there is an error, figures are null,
and other columns are empty if they are unknown; so are the last three where no heat map was drawn.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from sprue.inference.calibration import Calibration
from sprue.scoring.decoding import Record
from sprue.scoring.drawing import heatmap_path
from sprue.tracking.registry import RegisteredDetector

Figures = Mapping[str, Any]
"""Of a sample: ``score``, ``p_value``, ``is_anomalous`` and ``image_score`` [V]."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Rows:
    """Makes rows of one version's scores.

    Attributes:
        registered: The version.
        digest: The digest of its files.
        views: Its views.
        calibration: Its calibration.
    """

    registered: RegisteredDetector
    digest: str
    views: tuple[str, ...]
    calibration: Calibration

    def row(self, record: Record, figures: Figures) -> Row:
        """The row of a sample."""
        failed = bool(record["error"])
        row = {"sample": record["name"], **self._files(record)}
        row |= {
            "score": np.float32("nan") if failed else figures["score"],
            "p_value": float("nan") if failed else figures["p_value"],
            "is_anomalous": None if failed else bool(figures["is_anomalous"]),
            "threshold": self.calibration.threshold,
            "alpha": self.calibration.alpha,
        }
        if len(self.views) > 1:
            for view, score in zip(self.views, figures["image_score"], strict=True):
                row[f"score_{view}"] = np.float32("nan" if failed else score)
        return row | {
            "dataset": self.registered.dataset,
            "class_name": self.registered.class_name,
            "version": self.registered.version,
            "detector": self.digest,
            "error": record["error"],
            **_heatmap(record),
        }

    def _files(self, record: Record) -> Row:
        if len(self.views) == 1:
            return {"sha256": record["sha256"][0]}
        return {
            f"{column}_{view}": value
            for column, values in (("path", record["paths"]), ("sha256", record["sha256"]))
            for view, value in zip(self.views, values, strict=True)
        }


def _heatmap(record: Record) -> Row:
    """The columns of a sample's heat map, whose path is relative to the version's folder."""
    drawn = "heatmap_view" in record
    return {
        "heatmap": heatmap_path(record["name"]) if drawn else "",
        "heatmap_view": record["heatmap_view"] if drawn else "",
        "predicted_mask_fraction": record["predicted_mask_fraction"] if drawn else float("nan"),
    }


def as_table(rows: Sequence[Row]) -> pd.DataFrame:
    """Rows as a table, in which a decision may be null."""
    table = pd.DataFrame(rows)
    return table.assign(is_anomalous=table["is_anomalous"].astype("boolean"))
