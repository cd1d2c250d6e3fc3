"""Makes a detector of fitted flows, calibrated on good samples that each was fitted without.

One flow and a held-out calibration set give split-conformal calibration. Several flows, each with the fold that its fit
did not see, give cross-conformal calibration.

Shapes: N samples, V views of a sample, H rows, W columns of a map.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from defectflow import Ensemble, Flow
from sprue.config import CalibrationSettings, ScoringSettings
from sprue.data.samples import samples_of, views_of
from sprue.errors import SprueError
from sprue.features.tables import FeatureTable
from sprue.inference.calibration import Calibration
from sprue.inference.detector import Detector, anomaly_map, best_device, require_views, score_features
from sprue.inference.spec import FeatureSpec


class HeldOut(NamedTuple):
    """A fitted flow, and the manifest's rows of good samples that its fit did not see."""

    flow: Flow
    rows: pd.DataFrame


def score_held_out(
    held_out: Sequence[HeldOut], scoring: ScoringSettings, table: FeatureTable
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Scores [N] and position scores [N, V, H, W] of the held-out samples, each by its own flow, in order."""
    scores, position_scores = [], []
    for flow, rows in held_out:
        samples, views = samples_of(rows), len(views_of(rows))
        flow.to(best_device())
        for maps in table.read_in_turn(samples, views):
            scores_N, _, position_scores_NVHW = score_features(flow, scoring, maps)
            scores.append(scores_N)
            position_scores.append(position_scores_NVHW)
    return np.concatenate(scores), np.concatenate(position_scores)


def calibrate(
    dataset: str,
    class_name: str,
    spec: FeatureSpec,
    flow_name: str,
    held_out: Sequence[HeldOut],
    scoring: ScoringSettings,
    settings: CalibrationSettings,
    table: FeatureTable,
) -> Detector:
    """A detector of one flow, or of the mean of several, calibrated on what was held out of each.

    Raises:
        SprueError: If there are too few samples for the guarantee, a flow expects another number of views, or scores
            are not finite; the message names the class.
    """
    rows = pd.concat([each.rows for each in held_out], ignore_index=True)
    flows, views = [each.flow for each in held_out], views_of(rows)
    for flow in flows:
        require_views(class_name, flow_name, flow, len(views))
    scores_N, position_scores_NVHW = score_held_out(held_out, scoring, table)
    sizes_NV2 = rows[["height", "width"]].to_numpy().reshape(-1, len(views), 2)
    anomaly_maps = (
        [anomaly_map(*each).ravel() for each in zip(position_scores_VHW, sizes_V2.tolist(), strict=True)]
        for position_scores_VHW, sizes_V2 in zip(position_scores_NVHW, sizes_NV2, strict=True)
    )
    try:
        calibrated = Calibration.fit(
            scores_N,
            position_scores_NVHW,
            settings.alpha,
            anomaly_maps,
            settings.guarantee,
            settings.confidence,
            len(flows),
        )
    except SprueError as error:
        raise SprueError(f"class {class_name}: {error}") from error
    flow_or_ensemble = flows[0] if len(flows) == 1 else Ensemble(flows)
    return Detector(dataset, class_name, spec, flow_name, flow_or_ensemble, scoring, calibrated, views)
