"""Settings of `DNFAD`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from defectflow.config.base import Adaptation, CouplingConfig, Shape, check_choice

Branch = Literal["local", "global"]


@dataclass(frozen=True)
class DNFADConfig(CouplingConfig):
    """Settings of `DNFAD`; the defaults are the published ones.

    Attributes:
        maps: Indices of the maps, resized to the finest and concatenated (paper: two blocks of a ViT).
        steps: Number of coupling blocks of each branch (paper: 6; authors' code: 4).
        hidden: Channels of a subnetwork's hidden map; 0 for as many as its output has.
        clamp: Bound of the log-scales (authors' code: 2).
        position_channels: Channels of the local branch's position code (authors' code: 64).
        branches: The branches (paper: both).
        rectified: Branches whose subnetworks end in a ReLU (authors' code: the local one). Then all log-scales and
            shifts of a half have one sign.
        adaptation: The linear map of the channels before the couplings (paper: none).
        relative: Whether a branch's log-probabilities are relative to each image's maximum (authors' code). Then an
            image that is anomalous everywhere to the same degree gets a low score.
        upsampling: Factor by which the map is upsampled before it is scored, bilinear with aligned corners (authors'
            code: 8, to the image's size). A position at the border, where a backbone sees padding, gets half the
            weight and one in a corner a quarter. 1 does not upsample.
    """

    steps: int = 6
    hidden: int = 0
    clamp: float = 2.0
    position_channels: int = 64
    branches: tuple[Branch, ...] = ("local", "global")
    rectified: tuple[Branch, ...] = ("local",)
    adaptation: Adaptation = "none"
    relative: bool = False
    upsampling: int = 8

    def __post_init__(self) -> None:
        """Checks the ranges."""
        super().__post_init__()
        for field in ("branches", "rectified"):
            for branch in getattr(self, field):
                check_choice(field, branch, Branch)
        if not self.branches:
            raise ValueError("branches: there is none; name 'local', 'global' or both")
        if self.position_channels < 0 or self.position_channels % 4:
            raise ValueError(f"position_channels: {self.position_channels} is not a multiple of 4 from 0")
        self.check_least(hidden=0, upsampling=1)

    @classmethod
    def for_features(cls, scales: Sequence[Sequence[Shape]], images: int, **settings: Any) -> Self:
        """As `FlowConfig.for_features`; if `maps` are not given, the deepest block's map of the first scale is read.

        >>> DNFADConfig.for_features([[(40, 8, 8), (192, 4, 4)], [(40, 4, 4), (192, 2, 2)]], images=9).maps
        (1,)
        """
        maps = tuple(settings.pop("maps", ())) or (len(scales[0]) - 1,)
        return super().for_features(scales, images, maps=maps, **settings)
