"""Multi-Flow: couplings of a sample's views, with messages between the views.

Shapes: B samples, V views, N images of all views, P positions, C channels, H rows, W columns of a view's map.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from defectflow.adaptor import ChannelAdaptor
from defectflow.config import MultiFlowConfig
from defectflow.flow import Flow, Maps, top_mean
from defectflow.subnets import CrossViewSubnet


class MultiFlow(Flow):
    """The joint density of the feature maps of a sample's views.

    The maps of a sample are those of its first view in the feature spec's order, then those of its second, and so
    on. Anomaly maps have the views as their second dimension, [B, V, H, W]. An image's score is conditional on the
    sample's other images.

    Source: Kruse and Rosenhahn, "Multi-Flow: Multi-View-Enriched Normalizing Flows for Industrial Anomaly Detection"
    (CVPR workshops 2025).

    >>> flow = MultiFlow(MultiFlowConfig(channels=(6,), views=3, hidden=8, steps=2)).eval()
    >>> views = [torch.randn(2, 6, 4, 4) for _ in range(3)]
    >>> score_B, score_BV, map_BVHW = flow.predict_images(views)
    >>> score_B.shape, score_BV.shape, map_BVHW.shape
    (torch.Size([2]), torch.Size([2, 3]), torch.Size([2, 3, 4, 4]))
    """

    config_class = MultiFlowConfig
    version = 2
    config: MultiFlowConfig
    top = 1e-9

    def __init__(self, config: MultiFlowConfig) -> None:
        """Builds an unfitted flow: the identity up to the order of channels."""
        super().__init__(config)
        channels = config.channels[config.maps[0]]
        first, last = config.kernels
        self.adaptor = ChannelAdaptor(config.views, channels, config.adaptation)
        self.blocks = nn.ModuleList(
            self.coupling(
                config.views,
                channels,
                partial(CrossViewSubnet, neighbours=config.neighbours, hidden=config.hidden, kernel=kernel),
            )
            for kernel in [first] * (config.steps - 1) + [last]
        )

    @property
    def views(self) -> int:
        """Images of a sample."""
        return self.config.views

    def select(self, maps: Maps) -> list[Tensor]:
        """The map of each view that this flow reads."""
        return list(maps[self.config.maps[0] :: len(self.config.channels)])

    def merge(self, scores: Sequence[Tensor]) -> Tensor:
        """The views' position scores as one anomaly map, [B, V, H, W]."""
        return torch.stack(list(scores), dim=1)

    def image_scores(self, scores: Sequence[Tensor], top: float) -> Tensor:
        """Score [B, V] of each of a sample's images, from its own positions."""
        return top_mean(self.merge(scores).flatten(0, 1).flatten(1), top).reshape(-1, self.views)

    def sample_score(self, image_scores_BV: Tensor) -> Tensor:
        """Score [B] of each sample: the maximum or the mean of its images'."""
        return image_scores_BV.amax(1) if self.config.sample_score == "max" else image_scores_BV.mean(1)
