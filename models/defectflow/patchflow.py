"""PatchFlow: a flow of 1x1 bottleneck couplings on the fused feature pyramid.

Shapes: B images, D fused channels, A adapted channels, K whitened components, H rows, W columns.
"""

from collections.abc import Iterable
from functools import partial
from typing import Self, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from defectflow.config import PatchFlowConfig
from defectflow.flow import Flow, Maps
from defectflow.pyramid import Grid, finest_size, fuse, fuse_projected
from defectflow.subnets import BottleneckSubnet
from defectflow.whitening import fit_whitening, sample_vectors


class PatchFlow(Flow):
    """The density of a position's fused, whitened feature vector.

    The pyramid's maps are averaged over neighbourhoods, upsampled and concatenated (section 3). The paper trains its
    adaptor by the likelihood, which rewards shrinking the adaptor's output. Here the adaptor is frozen, or a trained
    rotation of whitened features, whose covariance stays the identity. The couplings' subnetworks are three 1x1
    convolutions through a bottleneck.

    Source: Zhang, Yang, Wang, Vian, "PatchFlow: Leveraging a Flow-Based Model with Patch Features" (2026).

    >>> flow = PatchFlow(PatchFlowConfig(channels=(4, 6), adapted=5, bottleneck=8, steps=2))
    >>> maps = [torch.randn(3, 4, 8, 8), torch.randn(3, 6, 4, 4)]
    >>> (z,), (log_det_BHW,) = flow.fit_adaptor([maps])(maps)
    >>> z.shape, log_det_BHW.shape, flow.anomaly_map(maps, size=(32, 32)).shape
    (torch.Size([3, 5, 8, 8]), torch.Size([3, 8, 8]), torch.Size([3, 32, 32]))
    """

    config_class = PatchFlowConfig
    version = 2
    searchable = ("steps", "bottleneck", "noise")
    config: PatchFlowConfig

    def __init__(self, config: PatchFlowConfig) -> None:
        """Builds an unfitted flow: the couplings are the identity up to the order of channels, the adaptor is zero."""
        super().__init__(config)
        components = config.fused if config.adaptor == "trained" else config.adapted
        self.register_buffer("adaptor_weight", torch.zeros(components, config.fused))
        self.register_buffer("adaptor_bias", torch.zeros(components))
        if config.adaptor == "trained":
            self.rotation = orthogonal(nn.Linear(config.fused, config.adapted, bias=False))
            self.rotation.weight = torch.eye(config.adapted, config.fused)
        self.blocks = nn.ModuleList(
            self.coupling(1, config.adapted, partial(BottleneckSubnet, bottleneck=config.bottleneck))
            for _ in range(config.steps)
        )

    @torch.no_grad()
    def fit_adaptor(self, batches: Iterable[Maps]) -> Self:
        """Fits the adaptor on a fixed grid of each image's positions.

        Raises:
            ValueError: If there are fewer than two positions, or features are not finite.
        """
        neighbourhood = self.config.neighbourhood
        vectors = (sample_vectors(fuse(self.select(maps), neighbourhood)) for maps in batches)
        weight, bias = self.get_buffer("adaptor_weight"), self.get_buffer("adaptor_bias")
        if self.config.adaptor == "orthogonal":
            weight_DD, bias_D = fit_whitening(vectors, self.config.fused, decorrelate=False)
            rows_AD = nn.init.orthogonal_(torch.empty_like(weight))
            weight_KD, bias_K = rows_AD @ weight_DD, rows_AD @ bias_D
        else:
            weight_KD, bias_K = fit_whitening(vectors, len(weight))
        weight.copy_(weight_KD)
        bias.copy_(bias_K)
        return self

    def adapt(self, maps: Maps) -> list[Tensor]:
        """The adapted pyramid [B, A, H, W], one node; in training only the stride's positions."""
        selected = self.select(maps)
        grid = Grid(finest_size(selected))
        if self.training and self.config.stride > 1:
            top, left = torch.randint(self.config.stride, (2,)).tolist()
            grid = Grid(grid.size, self.config.stride, (top, left))
        weight_AD, bias_A = self.get_buffer("adaptor_weight"), self.get_buffer("adaptor_bias")
        if self.config.adaptor == "trained":
            rows_AK = cast(Tensor, self.rotation.weight)
            weight_AD, bias_A = rows_AK @ weight_AD, rows_AK @ bias_A
        return [fuse_projected(selected, self.config.neighbourhood, weight_AD, bias_A, grid)]
