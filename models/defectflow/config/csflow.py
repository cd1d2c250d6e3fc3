"""Settings of `CSFlow`."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from defectflow.config.base import Adaptation, CouplingConfig, Shape, check_odd

Localisation = Literal["finest", "all"]
"""The scales whose position scores make the anomaly map."""


@dataclass(frozen=True)
class CSFlowConfig(CouplingConfig):
    """Settings of `CSFlow`; the defaults are the published ones.

    Attributes:
        steps: Number of coupling blocks (paper: 4).
        hidden: Channels of a subnetwork's hidden maps (authors' code: 1024).
        clamp: Bound of the log-scales (authors' code: 3).
        kernels: Kernel sides of all blocks but the last, and of the last (paper: 3 and 5).
        adaptation: The linear map of each scale's channels before the couplings (paper: none).
        localise: Whether the anomaly map is the finest scale's position scores (paper) or the mean of all scales'.
    """

    steps: int = 4
    hidden: int = 1024
    clamp: float = 3.0
    kernels: tuple[int, int] = (3, 5)
    adaptation: Adaptation = "none"
    localise: Localisation = "finest"

    def __post_init__(self) -> None:
        """Checks the ranges."""
        super().__post_init__()
        channels = [self.channels[index] for index in self.maps]
        if len(set(channels)) != 1:
            raise ValueError(f"maps: the maps share one number of channels; they have {channels}")
        self.check_least(hidden=1)
        check_odd("kernels", self.kernels)

    @classmethod
    def for_features(cls, scales: Sequence[Sequence[Shape]], images: int, **settings: Any) -> Self:
        """As `FlowConfig.for_features`; if `maps` are not given, the deepest block's map of each scale is read.

        Raises:
            ValueError: If a setting is out of range or a scale is not half the one before.

        >>> CSFlowConfig.for_features([[(40, 8, 8), (192, 4, 4)], [(40, 4, 4), (192, 2, 2)]], images=9).maps
        (1, 3)
        """
        deepest = itertools.accumulate((len(scale) for scale in scales), initial=-1)
        maps = tuple(settings.pop("maps", ())) or tuple(deepest)[1:]
        config = super().for_features(scales, images, maps=maps, **settings)
        sizes = [shape[1:] for scale in scales for shape in scale]
        for finer, coarser in itertools.pairwise(config.maps):
            if sizes[finer] != (2 * sizes[coarser][0], 2 * sizes[coarser][1]):
                raise ValueError(
                    f"maps: CS-Flow's scales halve one another, but map {coarser} is {sizes[coarser]} after "
                    f"{sizes[finer]}; choose other scales or an input size that halves evenly"
                )
        return config
