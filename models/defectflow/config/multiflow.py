"""Settings of `MultiFlow`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from defectflow.config.base import Adaptation, CouplingConfig, NoiseScheme, Shape, check_odd

SampleScore = Literal["max", "mean"]
"""How the scores of a sample's images are combined."""


def top_and_ring(views: int) -> tuple[tuple[int, ...], ...]:
    """The published graph: the top view, 0, is connected with all side views, each side view with its ring neighbours.

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
class MultiFlowConfig(CouplingConfig):
    """Settings of `MultiFlow`; the defaults are the published ones.

    Attributes:
        maps: Index of the one map that is read of each view; the first if empty.
        views: Images of a sample.
        neighbours: For each view, the views that it gets messages from; the published graph if empty. A view without
            neighbours is scored independently.
        steps: Number of coupling blocks (paper: 6).
        hidden: Channels of a subnetwork's hidden maps (paper: 64).
        kernels: Kernel sides of all blocks but the last, and of the last (paper: 3 and 5).
        adaptation: The linear map of each view's channels before the couplings (paper: none).
        noise: Largest standard deviation (paper: a variance of 0.15; authors' code: a deviation of 0.15).
        sample_score: A sample's score is the maximum of its images' (paper) or their mean (authors' code).
    """

    views: int = 5
    neighbours: tuple[tuple[int, ...], ...] = ()
    steps: int = 6
    hidden: int = 64
    kernels: tuple[int, int] = (3, 5)
    adaptation: Adaptation = "none"
    noise: float = 0.15**0.5
    noise_scheme: NoiseScheme = "uniform"
    sample_score: SampleScore = "max"

    def __post_init__(self) -> None:
        """Checks the ranges."""
        object.__setattr__(self, "maps", tuple(self.maps or (0,)))
        super().__post_init__()
        if len(self.maps) != 1:
            raise ValueError(f"maps: Multi-Flow reads one map of each view; got {list(self.maps)}")
        self.check_least(views=1, hidden=1)
        check_odd("kernels", self.kernels)
        graph = tuple(tuple(sources) for sources in self.neighbours) or top_and_ring(self.views)
        object.__setattr__(self, "neighbours", graph)
        for view, sources in enumerate(graph):
            if not set(sources) <= set(range(self.views)) - {view}:
                raise ValueError(f"neighbours: view {view} can't have {list(sources)} among {self.views} views")
        if len(graph) != self.views:
            raise ValueError(f"neighbours: {len(graph)} lists of neighbours for {self.views} views")

    @classmethod
    def for_features(cls, scales: Sequence[Sequence[Shape]], images: int, **settings: Any) -> Self:
        """As `FlowConfig.for_features`; if `maps` are not given, the deepest block's map of the first scale is read.

        >>> MultiFlowConfig.for_features([[(40, 8, 8), (192, 4, 4)]], images=9, views=3).maps
        (1,)
        """
        maps = tuple(settings.pop("maps", ())) or (len(scales[0]) - 1,)
        return super().for_features(scales, images, maps=maps, **settings)
