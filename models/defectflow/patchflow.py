"""PatchFlow: a flow of 1x1 bottleneck couplings on the fused feature pyramid.

Shapes: B pictures, C channels of a backbone map, D fused channels, A adapted channels, K kept components, H rows,
W columns.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from defectflow.coupling import GraphCoupling
from defectflow.flow import Flow, FlowConfig, Maps, Shape
from defectflow.pyramid import Grid, finest_size, fuse, fuse_projected
from defectflow.subnets import BottleneckSubnet
from defectflow.whitening import fit_whitening

SAMPLES_PER_CHANNEL = 5
"""Positions for each channel below which a covariance is too uncertain to whiten by."""

ADAPTOR_POSITIONS = 256
"""Positions of a picture that the adaptor is fitted on; neighbours are nearly copies of each other."""


@dataclass(frozen=True)
class PatchFlowConfig(FlowConfig):
    """Settings of `PatchFlow`; the defaults are the published ones where the paper states them.

    Attributes:
        maps: Paper: all, three scales of three blocks. Coarse maps add channels, but few independent positions:
            with some hundred pictures the whitening overfits them.
        adaptor: How the fused channels are reduced, always by a projection that can't shrink what it keeps:
            ``whiten`` keeps the principal components, each brought to unit variance; ``orthogonal`` keeps random
            directions of the standardised channels; ``trained`` begins as ``whiten`` and then turns, trained with
            the flow, among all directions of the whitened features.
        adapted: Channels after the adaptor (paper: 768), at most the fused ones. The directions with the least
            variance are dropped first, though defects show there well.
        bottleneck: Hidden channels of a subnetwork (paper: 128).
        steps: Coupling blocks (paper: 1).
        clamp: Bound of the log-scales (not stated; 1.9 as in the related CFlow-AD and Multi-Flow).
        neighbourhood: Side of the neighbourhood that is averaged (3; see `defectflow.pyramid`).
        stride: In training every stride-th position each way is read, from an offset drawn for every step (paper:
            1, all). Neighbours are nearly copies of each other, so 2 learns as much a step in a quarter of the time.
    """

    adaptor: Literal["whiten", "orthogonal", "trained"] = "whiten"
    adapted: int = 768
    bottleneck: int = 128
    neighbourhood: int = 3
    stride: int = 1

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            ValueError: If a setting is out of range; the message names it.
        """
        super().__post_init__()
        object.__setattr__(self, "adapted", min(self.adapted, self.fused))
        if self.adapted < 2:
            raise ValueError(f"adapted: {self.adapted} is below 2 (of {self.fused} fused channels)")
        if min(self.bottleneck, self.stride) < 1:
            raise ValueError(f"bottleneck and stride are at least 1; got {self.bottleneck} and {self.stride}")
        if self.adaptor not in ("whiten", "orthogonal", "trained"):
            raise ValueError(f"adaptor: {self.adaptor!r} is none of 'whiten', 'orthogonal', 'trained'")
        if self.neighbourhood < 1 or self.neighbourhood % 2 == 0:
            raise ValueError(f"neighbourhood: {self.neighbourhood} is not an odd number from 1")

    @classmethod
    def fitting(cls, scales: Sequence[Sequence[Shape]], pictures: int, **settings: Any) -> Self:
        """The config for features of some shapes and a number of training pictures.

        Unless `maps` are given, they are taken scale by scale, the largest first, as long as the coarsest has
        `SAMPLES_PER_CHANNEL` positions in all pictures for each fused channel. The first scale is always read.

        >>> scales = [[(40, 48, 48), (192, 12, 12)], [(40, 24, 24), (192, 6, 6)]]
        >>> PatchFlowConfig.fitting(scales, pictures=500).maps, PatchFlowConfig.fitting(scales, pictures=50).maps
        ((0, 1, 2, 3), (0, 1))
        """
        taken, fused = 0, 0
        for scale in scales:
            fused += sum(channels for channels, _, _ in scale)
            samples = pictures * min(rows * columns for _, rows, columns in scale)
            if taken and samples < SAMPLES_PER_CHANNEL * fused:
                break
            taken += len(scale)
        return super().fitting(scales, pictures, **{"maps": tuple(range(taken)), **settings})

    @property
    def fused(self) -> int:
        """Channels of the fused pyramid."""
        return sum(self.channels[place] for place in self.maps)


class PatchFlow(Flow):
    """The density of a position's fused, whitened feature vector.

    The pyramid's maps are averaged over neighbourhoods, upsampled and concatenated (section 3). The paper trains its
    adaptor by the likelihood, which pays for shrinking its output; here an adaptor is frozen, or a rotation of
    whitened features, under which they keep the identity as covariance. Then come couplings whose subnetworks are
    three 1x1 convolutions through a bottleneck.

    Source: Zhang, Yang, Wang, Vian, "PatchFlow: Leveraging a Flow-Based Model with Patch Features" (2026).

    >>> flow = PatchFlow(PatchFlowConfig(channels=(4, 6), adapted=5, bottleneck=8, steps=2))
    >>> maps = [torch.randn(3, 4, 8, 8), torch.randn(3, 6, 4, 4)]
    >>> (z,), (log_det_BHW,) = flow.fit_adaptor([maps])(maps)
    >>> z.shape, log_det_BHW.shape, flow.anomaly_map(maps, size=(32, 32)).shape
    (torch.Size([3, 5, 8, 8]), torch.Size([3, 8, 8]), torch.Size([3, 32, 32]))
    """

    config_class = PatchFlowConfig
    searchable = ("steps", "bottleneck", "noise")
    config: PatchFlowConfig

    def __init__(self, config: PatchFlowConfig) -> None:
        """Makes an unfitted flow: the couplings are the identity, the adaptor is zero."""
        super().__init__(config)
        kept = config.fused if config.adaptor == "trained" else config.adapted
        self.register_buffer("adaptor_weight", torch.zeros(kept, config.fused))
        self.register_buffer("adaptor_bias", torch.zeros(kept))
        if config.adaptor == "trained":
            self.rotation = orthogonal(nn.Linear(config.fused, config.adapted, bias=False))
            self.rotation.weight = torch.eye(config.adapted, config.fused)
        self.blocks = nn.ModuleList(
            GraphCoupling(
                [(config.adapted, 1, 1)],
                partial(BottleneckSubnet, bottleneck=config.bottleneck),
                config.clamp,
                config.dims_c(),
            )
            for _ in range(config.steps)
        )

    def fit_adaptor(self, batches: Iterable[Maps]) -> "PatchFlow":
        """Fits the adaptor on a fixed grid of each picture's positions.

        Raises:
            ValueError: If there are too few positions for the components, or features are not finite.
        """
        weight, bias = self.get_buffer("adaptor_weight"), self.get_buffer("adaptor_bias")
        if self.config.adaptor == "orthogonal":
            weight_DD, bias_D = fit_whitening(self._sampled(batches), self.config.fused, decorrelate=False)
            rows_AD = nn.init.orthogonal_(torch.empty_like(weight))
            weight.copy_(rows_AD @ weight_DD)
            bias.copy_(rows_AD @ bias_D)
        else:
            weight_KD, bias_K = fit_whitening(self._sampled(batches), len(weight))
            weight.copy_(weight_KD)
            bias.copy_(bias_K)
        return self

    @torch.no_grad()
    def _sampled(self, batches: Iterable[Maps]) -> Iterator[Tensor]:
        for maps in batches:
            fused_BDP = fuse(self.chosen(maps), self.config.neighbourhood).flatten(2)
            stride = max(1, fused_BDP.shape[2] // ADAPTOR_POSITIONS)
            yield fused_BDP[:, :, ::stride].transpose(1, 2).flatten(0, 1)

    def adapt(self, maps: Maps) -> list[Tensor]:
        """The adapted pyramid, [B, A, H, W], one node; in training at the stride's positions alone."""
        chosen = self.chosen(maps)
        grid = Grid(finest_size(chosen))
        if self.training and self.config.stride > 1:
            top, left = torch.randint(self.config.stride, (2,)).tolist()
            grid = Grid(grid.size, self.config.stride, (top, left))
        weight_AD, bias_A = self.get_buffer("adaptor_weight"), self.get_buffer("adaptor_bias")
        if self.config.adaptor == "trained":
            rows_AK = cast(Tensor, self.rotation.weight)
            weight_AD, bias_A = rows_AK @ weight_AD, rows_AK @ bias_A
        return [fuse_projected(chosen, self.config.neighbourhood, weight_AD, bias_A, grid)]
