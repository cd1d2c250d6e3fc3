"""The mean of several flows, each fitted on other samples.

Shapes: B samples, V images of a sample, H rows, W columns of a map.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from defectflow.config import CouplingConfig, ScoreType
from defectflow.flow import Flow, Maps


class Ensemble(nn.Module):
    """Predicts the mean of its members' scores and anomaly maps; the members have one configuration.

    Cross-conformal calibration fits them: each member leaves out another fold of the good samples. Source: Barber,
    Candès, Ramdas, Tibshirani, "Predictive inference with the jackknife+" (2021), section 3.

    Attributes:
        members: The flows.

    >>> from defectflow import build_flow
    >>> maps = [torch.randn(2, 4, 8, 8)]
    >>> ensemble = Ensemble([build_flow("gaussian", channels=(4,)).fit_adaptor([maps]) for _ in range(2)])
    >>> score_B, score_BV, map_BVHW = ensemble.predict_images(maps)
    >>> score_B.shape, map_BVHW.shape
    (torch.Size([2]), torch.Size([2, 1, 8, 8]))
    """

    def __init__(self, members: Sequence[Flow]) -> None:
        """Takes fitted flows, or such whose weights are loaded later.

        Raises:
            ValueError: If there are none, or they differ in their configuration.
        """
        super().__init__()
        if not members:
            raise ValueError("members: an ensemble has at least one flow")
        if any(member.config != members[0].config for member in members):
            raise ValueError("members: the flows of an ensemble have one configuration")
        self.members = nn.ModuleList(members)

    @property
    def _first(self) -> Flow:
        return cast(Flow, self.members[0])

    @property
    def config(self) -> CouplingConfig:
        """The members' settings."""
        return self._first.config

    @property
    def views(self) -> int:
        """Images of a sample."""
        return self._first.views

    @property
    def top(self) -> float:
        """The members' own fraction of positions that make a score."""
        return self._first.top

    def predict_images(
        self, maps: Maps, score_type: ScoreType = "latent", top: float | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The members' mean score [B] of each sample, and score [B, V] and anomaly map [B, V, H, W] of its images."""
        of_members = [cast(Flow, member).predict_images(maps, score_type, top) for member in self.members]
        score_B, image_score_BV, map_BVHW = (torch.stack(each).mean(0) for each in zip(*of_members, strict=True))
        return score_B, image_score_BV, map_BVHW
