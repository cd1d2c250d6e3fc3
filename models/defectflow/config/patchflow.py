"""Settings of `PatchFlow`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from defectflow.config.base import CouplingConfig, Shape, check_odd

Adaptor = Literal["whiten", "orthogonal", "trained"]
"""How the fused channels are reduced; see `PatchFlowConfig`."""

POSITIONS_PER_CHANNEL = 5
"""Training positions per channel below which an estimated covariance is too uncertain for whitening."""


@dataclass(frozen=True)
class PatchFlowConfig(CouplingConfig):
    """Settings of `PatchFlow`; the defaults are the published ones where the paper states them.

    Attributes:
        maps: Indices of the maps (paper: all, three scales of three blocks). Coarse maps add channels but few
            independent positions, so with some hundred images the whitening overfits them.
        adaptor: The projection of the fused channels. None of the three can shrink its output. ``whiten``: principal
            components with unit variance. ``orthogonal``: random orthogonal directions of the standardised channels.
            ``trained``: starts as ``whiten``; a rotation of all whitened features is trained with the flow.
        adapted: Channels after the adaptor (paper: 768), at most the fused ones. ``whiten`` drops the directions with
            the least variance, though defects often show there.
        bottleneck: Hidden channels of a subnetwork (paper: 128).
        steps: Number of coupling blocks (paper: 1).
        clamp: Bound of the log-scales (not stated; 1.9 as in the related CFlow-AD and Multi-Flow).
        neighbourhood: Side of the averaged neighbourhood (3; see `defectflow.pyramid`).
        stride: Stride of the positions read in training, from a random offset per step (paper: 1, all). Adjacent
            positions are nearly equal, so a step of stride 2 learns as much in a quarter of the time.
    """

    adaptor: Adaptor = "whiten"
    adapted: int = 768
    bottleneck: int = 128
    neighbourhood: int = 3
    stride: int = 1

    def __post_init__(self) -> None:
        """Checks the ranges."""
        super().__post_init__()
        object.__setattr__(self, "adapted", min(self.adapted, self.fused))
        if self.adapted < 2:
            raise ValueError(f"adapted: {self.adapted} is below 2 (of {self.fused} fused channels)")
        self.check_least(bottleneck=1, stride=1)
        check_odd("neighbourhood", [self.neighbourhood])

    @classmethod
    def for_features(cls, scales: Sequence[Sequence[Shape]], images: int, **settings: Any) -> Self:
        """As `FlowConfig.for_features`; if `maps` are not given, they follow from the number of training images.

        Scales are added, the largest first, while the coarsest map has `POSITIONS_PER_CHANNEL` positions in all images
        for each fused channel. The first scale is always read.

        >>> scales = [[(40, 48, 48), (192, 12, 12)], [(40, 24, 24), (192, 6, 6)]]
        >>> PatchFlowConfig.for_features(scales, images=500).maps, PatchFlowConfig.for_features(scales, images=50).maps
        ((0, 1, 2, 3), (0, 1))
        """
        maps, fused = 0, 0
        for scale in scales:
            fused += sum(channels for channels, _, _ in scale)
            positions = images * min(rows * columns for _, rows, columns in scale)
            if maps and positions < POSITIONS_PER_CHANNEL * fused:
                break
            maps += len(scale)
        return super().for_features(scales, images, **{"maps": tuple(range(maps)), **settings})
