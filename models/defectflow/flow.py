"""What every flow offers.

Shapes: B pictures, C channels, H rows, W columns of a feature map, h and w those of an anomaly map.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Maps = Sequence[Tensor]
"""A picture's feature maps [B, C, H, W], in the order of the feature spec."""

Evidence = Literal["latent", "likelihood"]
"""What counts against a position: the norm of its latent vector, or its negative log-likelihood."""

LOG_2PI = math.log(2.0 * math.pi)


class Flow(nn.Module, ABC):
    """A normalizing flow over a backbone's feature maps, with a standard normal latent.

    A flow is fitted in two steps: `fit_adaptor` sees the training features once and freezes the linear map in
    front of the couplings; then `nll` is minimised by gradient descent.
    """

    config_class: ClassVar[Any]
    config: Any

    @abstractmethod
    def fit_adaptor(self, batches: Iterable[Maps]) -> "Flow":
        """Fits what stands in front of the couplings on the training features; returns the flow."""

    @abstractmethod
    def forward(
        self, maps: Maps, condition: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """From feature maps to latents.

        Args:
            maps: The backbone's maps.
            condition: [B, K, H, W], for flows that have one.
            mask: [B, 1, H, W], 1 where a position counts; elsewhere latents and log-determinants are zero.

        Returns:
            A latent map [B, C, H, W] for each node, and for each its log-determinants [B, H, W].
        """

    @abstractmethod
    def inverse(self, latents: Sequence[Tensor], condition: Tensor | None = None) -> list[Tensor]:
        """From latents to what the couplings read (the adapted maps)."""

    def position_nll(
        self, maps: Maps, condition: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The latent's share of the negative log-likelihood and the whole, a node [B, H, W], in nats a dimension."""
        latents, log_dets = self(maps, condition, mask)
        norms = [0.5 * z.square().mean(1) for z in latents]
        wholes = [
            norm + 0.5 * LOG_2PI - log_det / z.shape[1]
            for norm, z, log_det in zip(norms, latents, log_dets, strict=True)
        ]
        return norms, wholes

    def nll(self, maps: Maps, condition: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Negative log-likelihood of each picture, [B], in nats per dimension of the latent."""
        latents, log_dets = self(maps, condition, mask)
        energy = torch.stack(
            [0.5 * z.flatten(1).square().sum(1) - d.flatten(1).sum(1) for z, d in zip(latents, log_dets, strict=True)]
        )
        dimensions = sum(z[0].numel() for z in latents)
        return energy.sum(0) / dimensions + 0.5 * LOG_2PI

    def evidence_map(self, maps: Maps, evidence: Evidence = "latent") -> Tensor:
        """How unusual each position is, [B, H, W] at the finest node's size: the mean over the nodes."""
        norms, wholes = self.position_nll(maps)
        nodes = norms if evidence == "latent" else wholes
        size = max((tuple(node.shape[-2:]) for node in nodes), key=math.prod)
        return torch.stack([_resize(node, size) for node in nodes]).mean(0)

    def anomaly_map(self, maps: Maps, size: tuple[int, int], evidence: Evidence = "latent") -> Tensor:
        """The evidence of each pixel, [B, h, w], for maps of pictures of `size` (rows, columns)."""
        return _resize(self.evidence_map(maps, evidence), size)

    def score(self, maps: Maps, evidence: Evidence = "latent", top: float = 0.03) -> Tensor:
        """How unusual each picture is, [B]: the mean of the `top` share of its positions' evidence."""
        return top_mean(self.evidence_map(maps, evidence), top)


def _resize(map_BHW: Tensor, size: tuple[int, ...]) -> Tensor:
    return F.interpolate(map_BHW[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


def top_mean(map_BHW: Tensor, top: float) -> Tensor:
    """Mean of the largest `top` share of a map's values, [B]; of the largest alone where the share is less than one.

    >>> top_mean(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), top=0.5)
    tensor([3.5000])
    """
    values = map_BHW.flatten(1)
    count = max(1, round(top * values.shape[1]))
    return values.topk(count, dim=1).values.mean(1)
