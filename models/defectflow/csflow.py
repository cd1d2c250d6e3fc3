"""CS-Flow: fully convolutional cross-scale couplings.

Shapes: B images, C channels, H rows, W columns of a scale's map.
"""

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from defectflow.adaptor import ChannelAdaptor
from defectflow.config import CSFlowConfig
from defectflow.flow import Flow
from defectflow.subnets import CrossScaleSubnet


class CSFlow(Flow):
    """The joint density of the feature maps of one image at several scales.

    A coupling's subnetworks read a neighbourhood in adjacent scales, so a position's score depends on its
    surroundings at several resolutions. The published anomaly score is the mean over all positions of all scales.

    Source: Rudolph et al., "Fully Convolutional Cross-Scale-Flows for Image-based Defect Detection" (WACV 2022).

    >>> import torch
    >>> flow = CSFlow(CSFlowConfig(channels=(6, 6), hidden=8, steps=2))
    >>> maps = [torch.randn(3, 6, 8, 8), torch.randn(3, 6, 4, 4)]
    >>> latents, log_dets = flow(maps)
    >>> [z.shape[2] for z in latents], [log_det.shape[2] for log_det in log_dets], flow.score(maps).shape
    ([8, 4], [8, 4], torch.Size([3]))
    """

    config_class = CSFlowConfig
    version = 2
    config: CSFlowConfig
    top = 1.0

    def __init__(self, config: CSFlowConfig) -> None:
        """Builds an unfitted flow: the identity up to the order of channels."""
        super().__init__(config)
        channels, nodes = config.channels[config.maps[0]], len(config.maps)
        first, last = config.kernels
        self.adaptor = ChannelAdaptor(nodes, channels, config.adaptation)
        self.blocks = nn.ModuleList(
            self.coupling(nodes, channels, partial(CrossScaleSubnet, nodes=nodes, hidden=config.hidden, kernel=kernel))
            for kernel in [first] * (config.steps - 1) + [last]
        )

    def merge(self, scores: Sequence[Tensor]) -> Tensor:
        """The finest scale's position scores [B, H, W], or the mean over the scales."""
        return scores[0] if self.config.localise == "finest" else super().merge(scores)
