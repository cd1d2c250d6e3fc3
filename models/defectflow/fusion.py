"""A CS-Flow and several Gaussians in one detector: each sees defects that the others miss.

Shapes: B images, M members, H rows, W columns of a map.
"""

from collections.abc import Iterable, Sequence
from typing import Self, cast

import torch
from torch import Tensor, nn

from defectflow.config import FUSION_TOP, FusionConfig, GaussianConfig, ScoreType
from defectflow.csflow import CSFlow
from defectflow.flow import Flow, Maps, resize, top_mean
from defectflow.gaussian import Gaussian

COUNTED = 2
"""How many of the highest members' scores make an image's score."""

PRIOR = 8
"""The weight, in images, of the members' common relative spread when a member's own is estimated from few images."""


LEAST_POWER = 0.1
"""Of a member that finds no defect, so that it never counts for nothing."""

SPREAD = 2.0
"""Where a CS-Flow's map ends, an asinh of standard deviations: its convolutions spread what is more evident than that
over the whole map, which then says nothing of where."""


class Fusion(CSFlow):
    """The highest of the standardised scores of a CS-Flow and of Gaussians of other blocks and scales.

    Deep blocks see what is wrong, fine ones where; one part needs a high resolution, another a low one. So all members
    score, each in units of its own spread over good images and weighted by how well it tells synthetic defects from
    good images, and the mean of the `COUNTED` highest counts: a defect need not be evident to the others. A position's
    score is the root of the member's, a distance; an image's is the inverse hyperbolic sine, which is linear near the
    threshold and keeps far outliers readable. The anomaly map is the mean of such position scores of the located
    Gaussians and, bounded and weighted, of the CS-Flow.

    The CS-Flow is what is trained; `standardise` and `weigh` follow each epoch.

    >>> config = FusionConfig(channels=(4, 6, 6), maps=(1, 2), hidden=8, steps=1, gaussians=((0, 1), (0,)))
    >>> flow, maps = Fusion(config), [torch.randn(3, 4, 8, 8), torch.randn(3, 6, 8, 8), torch.randn(3, 6, 4, 4)]
    >>> score_B, map_BHW = flow.fit_adaptor([maps]).standardise([maps]).predict(maps)
    >>> score_B.shape, map_BHW.shape
    (torch.Size([3]), torch.Size([3, 8, 8]))
    """

    config_class = FusionConfig
    version = 4
    weighted = True
    top = FUSION_TOP
    config: FusionConfig

    def __init__(self, config: FusionConfig) -> None:
        """Builds an unfitted detector."""
        super().__init__(config)
        self.gaussians = nn.ModuleList(
            Gaussian(
                GaussianConfig(channels=config.channels, maps=maps, neighbourhood=3 if index in config.averaged else 1)
            )
            for index, maps in enumerate(config.gaussians)
        )
        neutral_M2 = torch.tensor([[0.0, 1.0]]).repeat(1 + len(config.gaussians), 1)
        self.register_buffer("position_scale", neutral_M2)
        self.register_buffer("image_scale", neutral_M2.clone())
        self.register_buffer("weight", torch.ones(len(self.scored)))

    @property
    def scored(self) -> tuple[int, ...]:
        """The members that score images: the CS-Flow, 0, and Gaussians, counted from 1."""
        return (0, *(1 + index for index in self.config.scored or range(len(self.config.gaussians))))

    def fit_adaptor(self, batches: Iterable[Maps]) -> Self:
        """Fits every member's linear map; reads the batches once for each."""
        super().fit_adaptor(batches)
        for gaussian in self.gaussians:
            cast(Flow, gaussian).fit_adaptor(batches)
        return self

    @torch.no_grad()
    def standardise(self, batches: Iterable[Maps]) -> Self:
        """Fits mean and standard deviation of each member's scores, of positions and of images, on good images."""
        self.eval()
        batched = list(zip(*(self._distances(maps) for maps in batches), strict=True))
        members = [torch.cat(parts) for parts in batched]
        cast(Tensor, self.position_scale).copy_(
            torch.stack([torch.stack([each.mean(), each.std()]) for each in members])
        )
        images_MB = torch.stack([top_mean(each.flatten(1), self.top) for each in members])
        mean_M, count = images_MB.mean(1), images_MB.shape[1]
        relative_M = images_MB.var(1, correction=min(1, count - 1)) / mean_M.square()
        pooled_M = (count * relative_M + PRIOR * relative_M.mean()) / (count + PRIOR)
        deviation_M = (mean_M * pooled_M.sqrt()).clamp_min(1e-6)
        cast(Tensor, self.image_scale).copy_(torch.stack([mean_M, deviation_M], dim=1))
        return self

    @torch.no_grad()
    def weigh(self, good: Iterable[Maps], defective: Iterable[Maps]) -> Self:
        """Weighs each member by the fourth power of 2 AUROC - 1 with which it tells defective images from good ones.

        The highest weight is 1. An AUROC depends on the order of scores alone, so it does not matter how large the
        synthetic defects are in units of the members' spreads, which says little of real ones.
        """
        self.eval()
        good_MB, defective_MB = (
            torch.cat([self._members(self.position_scores(maps), self.top) for maps in batches], dim=1)
            for batches in (good, defective)
        )
        auroc_M = torch.stack([auroc(*scores) for scores in zip(good_MB, defective_MB, strict=True)])
        power_M = (2 * auroc_M - 1).clamp_min(LEAST_POWER)
        cast(Tensor, self.weight).copy_((power_M / power_M.max()) ** 4)
        return self

    def _distances(self, maps: Maps) -> list[Tensor]:
        """Roots of the position scores [B, H, W] of the CS-Flow, merged over its scales, and of each Gaussian."""
        scores = [Flow.merge(self, super().position_scores(maps))]
        scores += [cast(Flow, gaussian).position_scores(maps)[0] for gaussian in self.gaussians]
        return [score_BHW.clamp_min(0).sqrt() for score_BHW in scores]

    def position_scores(
        self, maps: Maps, score_type: ScoreType = "latent", mask: Sequence[Tensor] | None = None
    ) -> list[Tensor]:
        """Each member's standardised distances [B, H, W]; neither a `mask` nor the likelihood is supported.

        Raises:
            ValueError: If a mask or the score type ``likelihood`` is given.
        """
        if score_type != "latent":
            raise ValueError("score_type: a fusion standardises latent norms; set it to latent")
        if mask is not None:
            raise ValueError("mask: a fusion scores all positions")
        scales = cast(Tensor, self.position_scale)
        return [
            (distances_BHW - mean) / deviation
            for distances_BHW, (mean, deviation) in zip(self._distances(maps), scales, strict=True)
        ]

    def _members(self, scores: Sequence[Tensor], top: float) -> Tensor:
        """Standardised scores [M, B] of images, by each member that scores them."""
        members = []
        for member in self.scored:
            mean, deviation = cast(Tensor, self.position_scale)[member]
            image_mean, image_deviation = cast(Tensor, self.image_scale)[member]
            distance_B = top_mean(scores[member].flatten(1), top) * deviation + mean
            members.append((distance_B - image_mean) / image_deviation)
        return torch.stack(members)

    def image_scores(self, scores: Sequence[Tensor], top: float) -> Tensor:
        """Score [B, 1] of each image: the mean of the highest of the members' weighted scores, by its asinh."""
        members_MB = cast(Tensor, self.weight)[:, None] * self._members(scores, top)
        highest = members_MB.topk(min(COUNTED, len(members_MB)), dim=0).values
        return highest.mean(0).asinh()[:, None]

    def merge(self, scores: Sequence[Tensor]) -> Tensor:
        """The mean of the located Gaussians' map and the CS-Flow's, [B, H, W], by their asinh."""
        located = self.config.located or range(len(self.gaussians))
        of_gaussians_BHW = Flow.merge(self, [scores[1 + index].asinh() for index in located])
        of_flow_BHW = resize(scores[0].asinh().clamp_max(SPREAD), of_gaussians_BHW.shape[-2:])
        weight = cast(Tensor, self.weight)[0]
        return (of_gaussians_BHW + weight * of_flow_BHW) / (1 + weight)


def auroc(negative_N: Tensor, positive_P: Tensor) -> Tensor:
    """The probability that a positive score is higher than a negative one; ties count half.

    >>> auroc(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 3.0])).item()
    0.875
    """
    difference_NP = positive_P[None] - negative_N[:, None]
    return ((difference_NP > 0).to(negative_N.dtype) + (difference_NP == 0).to(negative_N.dtype) / 2).mean()
