"""How well a flow detects synthetic defects.

Shapes: N samples, C channels, H rows, W columns of a map.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import Tensor

from defectflow import build_flow
from sprue.config import ScoringSettings
from sprue.inference.detector import best_device, score_features


@dataclass(frozen=True)
class Objective:
    """The AUROC of the good validation samples against the same samples with synthetic defects.

    Attributes:
        good: Maps [N, C, H, W] of the good samples.
        synthetic: Those of the samples with a defect.
        scoring: How a sample's score is made.
    """

    good: Sequence[NDArray[np.float16]]
    synthetic: Sequence[NDArray[np.float16]]
    scoring: ScoringSettings

    def __call__(self, flow_name: str, flow_config: Mapping[str, Any], state: Mapping[str, Tensor]) -> float:
        """The AUROC, from 0 to 1, of a flow with some weights."""
        flow = build_flow(flow_name, **flow_config).to(best_device())
        flow.load_state_dict(state)
        good_N, synthetic_N = (score_features(flow, self.scoring, maps)[0] for maps in (self.good, self.synthetic))
        labels_N = np.r_[np.zeros(len(good_N)), np.ones(len(synthetic_N))]
        return float(roc_auc_score(labels_N, np.r_[good_N, synthetic_N]))
