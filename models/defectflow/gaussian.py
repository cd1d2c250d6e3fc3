"""The baseline of the flows: one Gaussian for the feature vectors of all positions.

Shapes: B images, D channels of all maps that are read, H rows, W columns of the finest.
"""

from collections.abc import Iterable, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from defectflow.config import GaussianConfig
from defectflow.flow import Flow, Maps
from defectflow.pyramid import Grid, finest_size, fuse, fuse_projected
from defectflow.whitening import fit_whitening


class Gaussian(Flow):
    """A flow without couplings: a position's score is half its squared Mahalanobis distance, per channel.

    Nothing is trained; the mean and the covariance of all positions of all training images are the fit. What a flow
    is worth on a class is what it adds to this.

    Source: Defard et al., "PaDiM: a Patch Distribution Modeling Framework for Anomaly Detection and Localization"
    (2021), with one Gaussian for all positions, so that parts need not lie still.

    >>> flow = Gaussian(GaussianConfig(channels=(4, 6)))
    >>> maps = [torch.randn(3, 4, 8, 8), torch.randn(3, 6, 4, 4)]
    >>> flow.fit_adaptor([maps]).score(maps).shape
    torch.Size([3])
    """

    config_class = GaussianConfig
    version = 1
    top = 0.01
    searchable = ()
    config: GaussianConfig  # type: ignore[assignment]

    def __init__(self, config: GaussianConfig) -> None:
        """Builds an unfitted detector."""
        super().__init__(config)
        self.register_buffer("weight", torch.eye(config.fused))
        self.register_buffer("bias", torch.zeros(config.fused))
        self.blocks = nn.ModuleList()

    @torch.no_grad()
    def fit_adaptor(self, batches: Iterable[Maps]) -> Self:
        """Fits mean and covariance.

        Raises:
            ValueError: If a feature is not finite.
        """
        fused = (fuse(self.select(maps), self.config.neighbourhood) for maps in batches)
        vectors = (map_BDHW.movedim(1, 3).flatten(0, 2) for map_BDHW in fused)
        weight_DD, bias_D = fit_whitening(vectors, self.config.fused, shrink=True)
        self.get_buffer("weight").copy_(weight_DD)
        self.get_buffer("bias").copy_(bias_D)
        return self

    def adapt(self, maps: Maps) -> list[Tensor]:
        """The white map [B, D, H, W]."""
        selected = self.select(maps)
        weight_DD, bias_D = self.get_buffer("weight"), self.get_buffer("bias")
        return [fuse_projected(selected, self.config.neighbourhood, weight_DD, bias_D, Grid(finest_size(selected)))]

    def condition_with_noise(self, nodes: list[Tensor]) -> tuple[list[Tensor], Sequence[Tensor] | None]:
        """The nodes as they are, and no condition."""
        return nodes, None

    def condition(self, nodes: Sequence[Tensor], deviations: Sequence[Tensor] | None = None) -> list[Tensor] | None:
        """None."""
        return None

    def couple(self, nodes: Sequence[Tensor], condition: Sequence[Tensor] | None) -> tuple[list[Tensor], list[Tensor]]:
        """The nodes as they are; their log-determinants are zero."""
        return list(nodes), [node_BDHW.new_zeros(node_BDHW[:, 0].shape) for node_BDHW in nodes]
