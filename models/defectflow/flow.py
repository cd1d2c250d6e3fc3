"""What every flow offers.

Shapes: B pictures, C channels, H rows, W columns of a node's map, h and w of an anomaly map, K channels of a condition.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defectflow.coupling import GraphCoupling, couple_all, uncouple_all
from defectflow.noise import NoiseScheme, Part, add_noise, condition_channels, no_noise
from defectflow.recompute import couple_all_recomputing

Shape = tuple[int, int, int]
"""Channels, rows and columns of a feature map."""

Maps = Sequence[Tensor]
"""A picture's feature maps [B, C, H, W], in the order of the feature spec."""

Evidence = Literal["latent", "likelihood"]
"""What counts against a position: the norm of its latent vector, or its negative log-likelihood."""

LOG_2PI = math.log(2.0 * math.pi)


@dataclass(frozen=True)
class FlowConfig:
    """Settings that all flows have.

    Attributes:
        channels: Channels of each backbone map, in the feature spec's order.
        maps: Which of these maps are read, by their place; all if empty.
        steps: Coupling blocks, the flow's depth.
        clamp: Bound of the log-scales.
        noise: Largest standard deviation of the noise on the adapted features in training.
        noise_scheme: How the noise is drawn and told; see `defectflow.noise`.
    """

    channels: tuple[int, ...]
    maps: tuple[int, ...] = ()
    steps: int = 1
    clamp: float = 1.9
    noise: float = 0.0
    noise_scheme: NoiseScheme = "simplenet"

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            ValueError: If a setting is out of range; the message names it.
        """
        object.__setattr__(self, "channels", tuple(self.channels))
        object.__setattr__(self, "maps", tuple(self.maps or range(len(self.channels))))
        if not set(self.maps) <= set(range(len(self.channels))):
            raise ValueError(f"maps: {list(self.maps)} are not places among the {len(self.channels)} feature maps")
        if self.steps < 1:
            raise ValueError(f"steps is at least 1; got {self.steps}")
        if self.clamp <= 0 or self.noise < 0:
            raise ValueError(f"clamp is above and noise not below zero; got {self.clamp} and {self.noise}")
        if self.noise_scheme not in ("simplenet", "softflow", "uniform"):
            raise ValueError(f"noise_scheme: {self.noise_scheme!r} is none of 'simplenet', 'softflow', 'uniform'")

    @classmethod
    def fitting(cls, scales: Sequence[Sequence[Shape]], pictures: int, **settings: Any) -> Self:
        """The config for features of some shapes and a number of training pictures.

        Args:
            scales: Shapes of the feature maps of each scale of the picture, the largest scale first.
            pictures: How many pictures the flow is fitted on.
            **settings: Fields that are set by hand.

        Raises:
            ValueError: If a setting is out of range or the shapes do not suit the flow.
        """
        return cls(**{"channels": tuple(shape[0] for scale in scales for shape in scale), **settings})

    @property
    def noise_channels(self) -> int:
        """Channels of the condition that tells the couplings of the noise."""
        return condition_channels(self.noise_scheme, self.noise)

    def dims_c(self, extra: int = 0) -> list[tuple[int, int, int]]:
        """The condition's dimensions as the coupling block takes them, with `extra` channels before the noise's."""
        channels = extra + self.noise_channels
        return [(channels, 1, 1)] if channels else []

    def check_equal_channels(self) -> None:
        """Raises: ValueError: If the maps that are read differ in their channels."""
        channels = [self.channels[place] for place in self.maps]
        if len(set(channels)) != 1:
            raise ValueError(f"maps: the maps that are read share one number of channels; they have {channels}")


class Flow(nn.Module, ABC):
    """A normalizing flow over a backbone's feature maps, with a standard normal latent.

    A flow is fitted in two steps: `fit_adaptor` sees the training features once and freezes the linear map in
    front of the couplings; then `nll` is minimised by gradient descent.

    Attributes:
        top: Share of the positions whose mean is a picture's score in the paper.
        searchable: Settings that are worth a search: depth, width and noise.
        blocks: The couplings; `DNFAD` has ``branches`` in their place, a chain of couplings each.
        recompute: Whether training saves memory by computing inputs anew from outputs; see `defectflow.recompute`.
        part: Which part of a step's batch this process has, where several share it.
    """

    config_class: ClassVar[type[FlowConfig]]
    top: ClassVar[float] = 0.03
    searchable: ClassVar[tuple[str, ...]] = ("steps", "hidden", "noise")
    config: FlowConfig
    blocks: nn.ModuleList
    recompute: bool = False
    part: Part | None = None

    def __init__(self, config: FlowConfig) -> None:
        """Keeps the settings; subclasses make the blocks."""
        super().__init__()
        self.config = config

    @property
    def views(self) -> int:
        """Pictures of a sample; where there are several, `maps` are those of the first, then those of the second ..."""
        return 1

    @abstractmethod
    def fit_adaptor(self, batches: Iterable[Maps]) -> "Flow":
        """Fits what stands in front of the couplings on the training features; returns the flow."""

    @abstractmethod
    def adapt(self, maps: Maps) -> list[Tensor]:
        """The nodes' maps [B, C, H, W] that the couplings read, without noise."""

    def chosen(self, maps: Maps) -> list[Tensor]:
        """The backbone's maps that this flow reads."""
        return [maps[place] for place in self.config.maps]

    def forward(
        self, maps: Maps, condition: Sequence[Tensor] | None = None, mask: Sequence[Tensor] | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """From feature maps to latents.

        Args:
            maps: The backbone's maps.
            condition: For each node [B, K, H, W], instead of what the flow itself tells its couplings. With a
                condition no noise is added.
            mask: For each node [B, 1, H, W], 1 where a position counts; elsewhere latents and log-determinants
                are zero.

        Returns:
            A latent map [B, C, H, W] for each node, and for each its log-determinants [B, H, W].
        """
        with torch.autocast(maps[0].device.type, enabled=False):
            # Whitening divides by small standard deviations, which short floats do not survive.
            nodes = self.adapt(maps)
        if condition is None:
            nodes, condition = self.told(nodes)
        return masked(*self.couple(nodes, condition), mask)

    def couple(self, nodes: Sequence[Tensor], condition: Sequence[Tensor] | None) -> tuple[list[Tensor], list[Tensor]]:
        """The couplings alone: from adapted maps to latents and log-determinants, as `forward`."""
        return self.chain(self.blocks, nodes, condition)

    def chain(
        self, blocks: Iterable[nn.Module], nodes: Sequence[Tensor], condition: Sequence[Tensor] | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Some couplings one after the other, with or without keeping what backward needs."""
        couple = couple_all_recomputing if self.recompute and self.training else couple_all
        return couple(cast(Sequence[GraphCoupling], list(blocks)), nodes, condition)

    def told(self, nodes: list[Tensor]) -> tuple[list[Tensor], Sequence[Tensor] | None]:
        """The nodes, with noise in training, and the condition that the couplings are told."""
        if not (self.training and self.config.noise > 0):
            return nodes, self.condition(nodes)
        noisy, deviations = add_noise(nodes, self.config.noise_scheme, self.config.noise, self.part)
        return noisy, self.condition(noisy, deviations)

    def condition(self, nodes: Sequence[Tensor], deviations: Sequence[Tensor] | None = None) -> list[Tensor] | None:
        """What the couplings are told of each node, [B, K, H, W]; None if nothing.

        Args:
            nodes: The nodes' maps or latents.
            deviations: How much noise there is, from `defectflow.noise.add_noise`; none if not given.
        """
        if not self.config.noise_channels:
            return None
        return list(deviations or no_noise(nodes))

    def inverse(self, latents: Sequence[Tensor], condition: Sequence[Tensor] | None = None) -> list[Tensor]:
        """From latents to what the couplings read (the adapted maps); see `forward` for the arguments."""
        if condition is None:
            condition = self.condition(latents)
        return uncouple_all(self.blocks, latents, condition)

    def position_nll(
        self, maps: Maps, condition: Sequence[Tensor] | None = None, mask: Sequence[Tensor] | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The latent's share of the negative log-likelihood and the whole, a node [B, H, W], in nats a dimension."""
        latents, log_dets = self(maps, condition, mask)
        norms = [0.5 * z.square().mean(1) for z in latents]
        wholes = [
            norm + 0.5 * LOG_2PI - log_det / z.shape[1]
            for norm, z, log_det in zip(norms, latents, log_dets, strict=True)
        ]
        return norms, wholes

    def nll(
        self, maps: Maps, condition: Sequence[Tensor] | None = None, mask: Sequence[Tensor] | None = None
    ) -> Tensor:
        """Negative log-likelihood of each picture, [B], in nats per dimension of the latent that counts."""
        latents, log_dets = self(maps, condition, mask)
        energy_B = torch.stack(
            [0.5 * z.flatten(1).square().sum(1) - d.flatten(1).sum(1) for z, d in zip(latents, log_dets, strict=True)]
        ).sum(0)
        if mask is None:
            return energy_B / sum(z[0].numel() for z in latents) + 0.5 * LOG_2PI
        counted_B = torch.stack(
            [z.shape[1] * counts.flatten(1).sum(1) for z, counts in zip(latents, mask, strict=True)]
        ).sum(0)
        return energy_B / counted_B.clamp_min(1.0) + 0.5 * LOG_2PI

    def evidence(self, maps: Maps, evidence: Evidence = "latent", mask: Sequence[Tensor] | None = None) -> list[Tensor]:
        """How unusual each position of each node is, [B, H, W]; outside of the mask, as usual as any within."""
        norms, wholes = self.position_nll(maps, mask=mask)
        return least_outside(norms if evidence == "latent" else wholes, mask)

    def merge(self, evidence: Sequence[Tensor]) -> Tensor:
        """The nodes' evidence as one map [B, H, W] of the finest node's size: the mean over the nodes."""
        size = max((tuple(node.shape[-2:]) for node in evidence), key=math.prod)
        return torch.stack([_resize(node, size) for node in evidence]).mean(0)

    def assess(
        self,
        maps: Maps,
        evidence: Evidence = "latent",
        top: float | None = None,
        mask: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Score [B] and evidence map [B, H, W] of each picture, in one pass.

        Args:
            maps: The backbone's maps.
            evidence: What counts against a position.
            top: Share of the positions of all nodes, those with the most evidence, whose mean is the score; the
                paper's if not given.
            mask: Where the foreground is, for each node; see `forward`.
        """
        nodes = self.evidence(maps, evidence, mask)
        positions_BP = torch.cat([node.flatten(1) for node in nodes], dim=1)
        return top_mean(positions_BP, self.top if top is None else top), self.merge(nodes)

    def assess_pictures(
        self,
        maps: Maps,
        evidence: Evidence = "latent",
        top: float | None = None,
        mask: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `assess`: score [B] of each sample, score [B, V] and evidence [B, V, H, W] of each of its V pictures."""
        score_B, evidence_BHW = self.assess(maps, evidence, top, mask)
        return score_B, score_B[:, None], evidence_BHW[:, None]

    def score(self, maps: Maps, evidence: Evidence = "latent", top: float | None = None) -> Tensor:
        """How unusual each picture is, [B]; see `assess`."""
        return self.assess(maps, evidence, top)[0]

    def anomaly_map(self, maps: Maps, size: tuple[int, int], evidence: Evidence = "latent") -> Tensor:
        """The evidence of each pixel, [B, h, w] (Multi-Flow: [B, V, h, w]), for pictures of `size` (rows, columns)."""
        return _resize(self.assess(maps, evidence)[1], size)


def masked(
    latents: list[Tensor], log_dets: list[Tensor], mask: Sequence[Tensor] | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Latents and log-determinants, zero where a node's mask [B, 1, H, W] is."""
    if mask is None:
        return latents, log_dets
    return (
        [z * counts for z, counts in zip(latents, mask, strict=True)],
        [log_det * counts[:, 0] for log_det, counts in zip(log_dets, mask, strict=True)],
    )


def least_outside(evidence: list[Tensor], mask: Sequence[Tensor] | None) -> list[Tensor]:
    """Evidence [B, H, W] of each node, outside of its mask [B, 1, H, W] the least that there is within.

    >>> least_outside([torch.tensor([[[3.0, 1.0, 2.0]]])], [torch.tensor([[[[1.0, 0.0, 1.0]]]])])
    [tensor([[[3., 2., 2.]]])]
    """
    if mask is None:
        return evidence
    clipped = []
    for node_BHW, counts_B1HW in zip(evidence, mask, strict=True):
        outside_BHW = counts_B1HW[:, 0] == 0
        least_B = node_BHW.masked_fill(outside_BHW, math.inf).amin((1, 2)).nan_to_num(posinf=0.0)
        clipped.append(torch.where(outside_BHW, least_B[:, None, None], node_BHW))
    return clipped


def _resize(evidence: Tensor, size: tuple[int, ...]) -> Tensor:
    """Evidence [..., H, W] at another size, bilinear."""
    if evidence.shape[-2:] == size:
        return evidence
    map_N1HW = evidence.reshape(-1, 1, *evidence.shape[-2:])
    resized = F.interpolate(map_N1HW, size=size, mode="bilinear", align_corners=False)
    return resized.reshape(*evidence.shape[:-2], *size)


def top_mean(values_BP: Tensor, top: float) -> Tensor:
    """Mean of the largest `top` share of the values, [B]; of the largest alone where the share is less than one.

    >>> top_mean(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), top=0.5)
    tensor([3.5000])
    """
    if top == 1.0:
        return values_BP.mean(1)
    count = max(1, round(top * values_BP.shape[1]))
    return values_BP.topk(count, dim=1).values.mean(1)
