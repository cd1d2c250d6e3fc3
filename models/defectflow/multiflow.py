"""Multi-Flow: couplings of a sample's views, which tell each other what they see.

Shapes: B samples, V views, N pictures of all views, P positions, C channels, H rows, W columns of a view's map.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from defectflow.adaptor import Adaptation, ChannelAdaptor, check_adaptation
from defectflow.coupling import GraphCoupling
from defectflow.flow import Evidence, Flow, FlowConfig, Maps, Shape, top_mean
from defectflow.noise import NoiseScheme
from defectflow.subnets import CrossViewSubnet


def top_and_ring(views: int) -> tuple[tuple[int, ...], ...]:
    """The published graph: view 0, from the top, with all others, which are neighbours in a ring.

    >>> top_and_ring(5)
    ((1, 2, 3, 4), (0, 2, 4), (0, 1, 3), (0, 2, 4), (0, 1, 3))
    >>> top_and_ring(1), top_and_ring(3)
    (((),), ((1, 2), (0, 2), (0, 1)))
    """
    sides = views - 1
    graph = [tuple(range(1, views))]
    for side in range(sides):
        ring = {(side - 1) % sides, (side + 1) % sides} - {side}
        graph.append((0, *sorted(1 + other for other in ring)))
    return tuple(graph)


@dataclass(frozen=True)
class MultiFlowConfig(FlowConfig):
    """Settings of `MultiFlow`; the defaults are the published ones.

    Attributes:
        maps: The one map that is read of each view; the first if empty.
        views: Pictures of a sample.
        neighbours: For each view, the views that it gets messages from; the published graph if empty. Views without
            neighbours are judged alone.
        steps: Coupling blocks (paper: 6).
        hidden: Channels of a subnetwork's hidden maps (paper: 64).
        kernels: Sides of the convolutions of the first blocks and of the last (paper: 3 and 5).
        adaptation: What is done to each view's channels first (paper: nothing).
        noise: The largest standard deviation (paper: a variance of 0.15; authors' code: a deviation of 0.15).
        sample_score: A sample's score is the largest of its views' (paper) or their mean (authors' code).
    """

    views: int = 5
    neighbours: tuple[tuple[int, ...], ...] = ()
    steps: int = 6
    hidden: int = 64
    kernels: tuple[int, int] = (3, 5)
    adaptation: Adaptation = "none"
    noise: float = 0.15**0.5
    noise_scheme: NoiseScheme = "uniform"
    sample_score: Literal["max", "mean"] = "max"

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            ValueError: If a setting is out of range; the message names it.
        """
        object.__setattr__(self, "maps", tuple(self.maps or (0,)))
        super().__post_init__()
        if self.views < 1 or self.hidden < 1 or any(kernel < 1 or kernel % 2 == 0 for kernel in self.kernels):
            raise ValueError(
                f"views and hidden are at least 1, kernels are odd; got {self.views}, {self.hidden} and "
                f"{list(self.kernels)}"
            )
        if len(self.maps) != 1:
            raise ValueError(f"maps: Multi-Flow reads one map of each view; got {list(self.maps)}")
        graph = tuple(tuple(sources) for sources in self.neighbours) or top_and_ring(self.views)
        for view, sources in enumerate(graph):
            if not set(sources) <= set(range(self.views)) - {view}:
                raise ValueError(f"neighbours: view {view} can't have {list(sources)} among {self.views} views")
        if len(graph) != self.views:
            raise ValueError(f"neighbours: there are {self.views} views, but {len(graph)} lists of neighbours")
        object.__setattr__(self, "neighbours", graph)
        object.__setattr__(self, "kernels", tuple(self.kernels))
        check_adaptation(self.adaptation)
        if self.sample_score not in ("max", "mean"):
            raise ValueError(f"sample_score: {self.sample_score!r} is neither 'max' nor 'mean'")

    @classmethod
    def fitting(cls, scales: Sequence[Sequence[Shape]], pictures: int, **settings: Any) -> Self:
        """The config for features of some shapes: unless `maps` are given, the deepest block's map of the first scale.

        >>> MultiFlowConfig.fitting([[(40, 8, 8), (192, 4, 4)]], pictures=9, views=3).maps
        (1,)
        """
        maps = tuple(settings.pop("maps", ())) or (len(scales[0]) - 1,)
        return super().fitting(scales, pictures, maps=maps, **settings)


class MultiFlow(Flow):
    """The joint density of the feature maps of a sample's views.

    The maps of a sample are those of its first view in the feature spec's order, then those of its second, and so
    on. Evidence maps have the views as their second dimension, [B, V, H, W].

    Source: Kruse and Rosenhahn, "Multi-Flow: Multi-View-Enriched Normalizing Flows for Industrial Anomaly Detection"
    (CVPR workshops 2025).

    >>> flow = MultiFlow(MultiFlowConfig(channels=(6,), views=3, hidden=8, steps=2)).eval()
    >>> views = [torch.randn(2, 6, 4, 4) for _ in range(3)]
    >>> score_B, score_BV, evidence_BVHW = flow.assess_pictures(views)
    >>> score_B.shape, score_BV.shape, evidence_BVHW.shape
    (torch.Size([2]), torch.Size([2, 3]), torch.Size([2, 3, 4, 4]))
    """

    config_class = MultiFlowConfig
    config: MultiFlowConfig
    top = 1e-9

    def __init__(self, config: MultiFlowConfig) -> None:
        """Makes an unfitted flow, the identity."""
        super().__init__(config)
        channels = config.channels[config.maps[0]]
        first, last = config.kernels
        self.adaptor = ChannelAdaptor(config.views, channels, config.adaptation)
        self.blocks = nn.ModuleList(
            GraphCoupling(
                [(channels, 1, 1)] * config.views,
                partial(CrossViewSubnet, neighbours=config.neighbours, hidden=config.hidden, kernel=kernel),
                config.clamp,
                config.dims_c(),
            )
            for kernel in [first] * (config.steps - 1) + [last]
        )

    @property
    def views(self) -> int:
        """Pictures of a sample."""
        return self.config.views

    def chosen(self, maps: Maps) -> list[Tensor]:
        """The map that is read of each view."""
        return list(maps[self.config.maps[0] :: len(self.config.channels)])

    def fit_adaptor(self, batches: Iterable[Maps]) -> "MultiFlow":
        """Fits the views' adaptors."""
        self.adaptor.fit(self.chosen(maps) for maps in batches)
        return self

    def adapt(self, maps: Maps) -> list[Tensor]:
        """The views' maps, adapted."""
        return self.adaptor(self.chosen(maps))

    def merge(self, evidence: Sequence[Tensor]) -> Tensor:
        """The views' evidence, [B, V, H, W]."""
        return torch.stack(list(evidence), dim=1)

    def assess_pictures(
        self,
        maps: Maps,
        evidence: Evidence = "latent",
        top: float | None = None,
        mask: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Score [B] of each sample, score [B, V] and evidence [B, V, H, W] of its pictures; see `Flow.assess`.

        A picture's score is how unusual it is, given the sample's other pictures.
        """
        evidence_BVHW = self.merge(self.evidence(maps, evidence, mask))
        positions_NP = evidence_BVHW.flatten(0, 1).flatten(1)
        score_BV = top_mean(positions_NP, self.top if top is None else top).reshape(evidence_BVHW.shape[:2])
        score_B = score_BV.amax(1) if self.config.sample_score == "max" else score_BV.mean(1)
        return score_B, score_BV, evidence_BVHW

    def assess(
        self,
        maps: Maps,
        evidence: Evidence = "latent",
        top: float | None = None,
        mask: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Score [B] and evidence [B, V, H, W] of each sample; see `Flow.assess`."""
        score_B, _, evidence_BVHW = self.assess_pictures(maps, evidence, top, mask)
        return score_B, evidence_BVHW
