"""CS-Flow: fully convolutional cross-scale couplings.

Shapes: B pictures, C channels, H rows, W columns of the largest map; each scale halves the one before.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Self

from torch import Tensor, nn

from defectflow.adaptor import Adaptation, ChannelAdaptor, check_adaptation
from defectflow.coupling import GraphCoupling
from defectflow.flow import Flow, FlowConfig, Maps, Shape
from defectflow.subnets import CrossScaleSubnet


@dataclass(frozen=True)
class CSFlowConfig(FlowConfig):
    """Settings of `CSFlow`; the defaults are the published ones.

    Attributes:
        steps: Coupling blocks (paper: 4).
        hidden: Channels of a subnetwork's hidden maps (authors' code: 1024).
        clamp: Bound of the log-scales (authors' code: 3).
        kernels: Sides of the convolutions of the first blocks and of the last (paper: 3 and 5).
        adaptation: What is done to each scale's channels first (paper: nothing).
        localise: Whether the anomaly map is the finest scale's evidence (paper) or the mean of all scales'.
    """

    steps: int = 4
    hidden: int = 1024
    clamp: float = 3.0
    kernels: tuple[int, int] = (3, 5)
    adaptation: Adaptation = "none"
    localise: Literal["finest", "all"] = "finest"

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            ValueError: If a setting is out of range; the message names it.
        """
        super().__post_init__()
        object.__setattr__(self, "kernels", tuple(self.kernels))
        self.check_equal_channels()
        if self.hidden < 1 or any(kernel < 1 or kernel % 2 == 0 for kernel in self.kernels):
            raise ValueError(f"hidden is at least 1, kernels are odd; got {self.hidden} and {list(self.kernels)}")
        check_adaptation(self.adaptation)
        if self.localise not in ("finest", "all"):
            raise ValueError(f"localise: {self.localise!r} is neither 'finest' nor 'all'")

    @classmethod
    def fitting(cls, scales: Sequence[Sequence[Shape]], pictures: int, **settings: Any) -> Self:
        """The config for features of some shapes: unless `maps` are given, the deepest block's map of each scale.

        Raises:
            ValueError: If a scale is not half the one before.

        >>> CSFlowConfig.fitting([[(40, 8, 8), (192, 4, 4)], [(40, 4, 4), (192, 2, 2)]], pictures=9).maps
        (1, 3)
        """
        shapes = [shape for scale in scales for shape in scale]
        deepest = itertools.accumulate((len(scale) for scale in scales), initial=-1)
        maps = tuple(settings.pop("maps", ())) or tuple(deepest)[1:]
        for finer, coarser in itertools.pairwise(maps):
            if shapes[finer][1:] != (2 * shapes[coarser][1], 2 * shapes[coarser][2]):
                raise ValueError(
                    f"maps: CS-Flow's scales halve one another, but map {coarser} is {shapes[coarser][1:]} after "
                    f"{shapes[finer][1:]}; choose other scales or an input size that halves evenly"
                )
        return super().fitting(scales, pictures, maps=maps, **settings)


class CSFlow(Flow):
    """The joint density of the feature maps of one picture at several scales.

    Each coupling's subnetworks look at a neighbourhood in all scales, so that a position is judged by what is
    around it and by what it looks like from further away. The published score is the whole picture's: the mean
    over all positions of all scales.

    Source: Rudolph et al., "Fully Convolutional Cross-Scale-Flows for Image-based Defect Detection" (WACV 2022).

    >>> import torch
    >>> flow = CSFlow(CSFlowConfig(channels=(6, 6), hidden=8, steps=2))
    >>> maps = [torch.randn(3, 6, 8, 8), torch.randn(3, 6, 4, 4)]
    >>> latents, log_dets = flow(maps)
    >>> [z.shape[2] for z in latents], [log_det.shape[2] for log_det in log_dets], flow.score(maps).shape
    ([8, 4], [8, 4], torch.Size([3]))
    """

    config_class = CSFlowConfig
    config: CSFlowConfig
    top = 1.0

    def __init__(self, config: CSFlowConfig) -> None:
        """Makes an unfitted flow, the identity."""
        super().__init__(config)
        channels, nodes = config.channels[config.maps[0]], len(config.maps)
        first, last = config.kernels
        self.adaptor = ChannelAdaptor(nodes, channels, config.adaptation)
        self.blocks = nn.ModuleList(
            GraphCoupling(
                [(channels, 1, 1)] * nodes,
                partial(CrossScaleSubnet, nodes=nodes, hidden=config.hidden, kernel=kernel),
                config.clamp,
                config.dims_c(),
            )
            for kernel in [first] * (config.steps - 1) + [last]
        )

    def fit_adaptor(self, batches: Iterable[Maps]) -> "CSFlow":
        """Fits the scales' adaptors."""
        self.adaptor.fit(self.chosen(maps) for maps in batches)
        return self

    def adapt(self, maps: Maps) -> list[Tensor]:
        """The scales' maps, adapted."""
        return self.adaptor(self.chosen(maps))

    def merge(self, evidence: Sequence[Tensor]) -> Tensor:
        """The finest scale's evidence, or the mean over the scales."""
        return evidence[0] if self.config.localise == "finest" else super().merge(evidence)
