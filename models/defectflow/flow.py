"""The interface of all flows.

Shapes: B images (or samples), V images of a sample, C channels, H rows, W columns of a node's map, h rows, w columns
of an image, K channels of a condition, P positions.
"""

import math
from collections.abc import Iterable, Sequence
from typing import ClassVar, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defectflow.adaptor import ChannelAdaptor
from defectflow.config import CouplingConfig, FlowConfig, ScoreType
from defectflow.coupling import GraphCoupling, Subnet, couple_all, uncouple_all
from defectflow.noise import Shard, add_noise, no_noise
from defectflow.recompute import couple_all_recomputing

Maps = Sequence[Tensor]
"""Feature maps [B, C, H, W] of a batch of images, in the order of the feature spec."""

LOG_2PI = math.log(2.0 * math.pi)


class Flow(nn.Module):
    """A normalizing flow over a backbone's feature maps, with a standard normal latent.

    A flow is fitted in two steps. `fit_adaptor` reads the training features once and fits the linear map before the
    couplings. Then gradient descent minimises `nll`.

    Attributes:
        config_class: The class of `config`.
        version: Changes when the flow's results change: its initialisation, likelihood, gradients or scores for the
            same settings and seed. Results of another version are stale.
        top: The published fraction of positions, those with the highest scores, whose mean is an image's score.
        weighted: Whether `weigh` belongs to the fit.
        searchable: Settings worth a hyperparameter search: depth, width and noise.
        config: The settings.
        adaptor: The linear maps before the couplings, one for each node. `PatchFlow` has its own.
        blocks: The couplings. `DNFAD` has ``branches`` instead, a chain of couplings each.
        recompute: Whether training recomputes activations to save memory; see `defectflow.recompute`.
        shard: The samples of a global batch that this process trains on; None if it trains alone.
    """

    config_class: ClassVar[type[FlowConfig]]
    version: ClassVar[int]
    top: ClassVar[float] = 0.03
    weighted: ClassVar[bool] = False
    searchable: ClassVar[tuple[str, ...]] = ("steps", "hidden", "noise")
    config: CouplingConfig
    adaptor: ChannelAdaptor
    blocks: nn.ModuleList
    recompute: bool = False
    shard: Shard | None = None

    def __init__(self, config: FlowConfig) -> None:
        """Stores the settings; subclasses build the blocks."""
        super().__init__()
        self.config = cast(CouplingConfig, config)

    @property
    def views(self) -> int:
        """Images of a sample. If there are several, `maps` lists those of the first image, then of the second ..."""
        return 1

    def coupling(self, nodes: int, channels: int, subnet: Subnet, condition: int = 0) -> GraphCoupling:
        """A coupling of nodes of equal channels, conditioned on `condition` channels and on the noise level."""
        extra = condition + self.config.noise_channels
        return GraphCoupling([(channels, 1, 1)] * nodes, subnet, self.config.clamp, [(extra, 1, 1)] if extra else [])

    def fit_adaptor(self, batches: Iterable[Maps]) -> Self:
        """Fits the adaptor on batches of training features; returns the flow."""
        self.adaptor.fit(self.select(maps) for maps in batches)
        return self

    def standardise(self, batches: Iterable[Maps]) -> Self:
        """Fits what scales the scores to batches of good images; most flows have nothing of the kind."""
        return self

    def weigh(self, good: Iterable[Maps], defective: Iterable[Maps]) -> Self:
        """Fits how much each member counts to good images and to defective ones; flows of one member have no weights.

        What is `weighted` needs it, after `standardise`; the defects may be synthetic.
        """
        return self

    def adapt(self, maps: Maps) -> list[Tensor]:
        """The adapted maps [B, C, H, W], one per node, without noise."""
        return self.adaptor(self.select(maps))

    def select(self, maps: Maps) -> list[Tensor]:
        """The backbone's maps that this flow reads."""
        return [maps[index] for index in self.config.maps]

    def forward(
        self, maps: Maps, condition: Sequence[Tensor] | None = None, mask: Sequence[Tensor] | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """From feature maps to latents.

        Args:
            maps: The backbone's maps.
            condition: For each node [B, K, H, W], replaces the flow's own condition. No noise is added then.
            mask: For each node [B, 1, H, W], 1 in the foreground, 0 elsewhere; there latents and log-determinants
                become zero.

        Returns:
            A latent map [B, C, H, W] for each node, and for each its log-determinants [B, H, W].
        """
        with torch.autocast(maps[0].device.type, enabled=False):
            # Whitening divides by small standard deviations, which 16-bit floats can't represent well.
            nodes = self.adapt(maps)
        if condition is None:
            nodes, condition = self.condition_with_noise(nodes)
        return masked(*self.couple(nodes, condition), mask)

    def couple(self, nodes: Sequence[Tensor], condition: Sequence[Tensor] | None) -> tuple[list[Tensor], list[Tensor]]:
        """Applies the couplings to adapted maps; returns latents and log-determinants as `forward`."""
        return self.chain(self.blocks, nodes, condition)

    def chain(
        self, blocks: Iterable[nn.Module], nodes: Sequence[Tensor], condition: Sequence[Tensor] | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Applies couplings in order, with recomputation if `recompute` is set."""
        couple = couple_all_recomputing if self.recompute and self.training else couple_all
        return couple(cast(Sequence[GraphCoupling], list(blocks)), nodes, condition)

    def condition_with_noise(self, nodes: list[Tensor]) -> tuple[list[Tensor], Sequence[Tensor] | None]:
        """The nodes, with noise in training, and the couplings' condition."""
        if not (self.training and self.config.noise > 0):
            return nodes, self.condition(nodes)
        noisy, deviations = add_noise(nodes, self.config.noise_scheme, self.config.noise, self.shard)
        return noisy, self.condition(noisy, deviations)

    def condition(self, nodes: Sequence[Tensor], deviations: Sequence[Tensor] | None = None) -> list[Tensor] | None:
        """The couplings' condition [B, K, H, W] for each node's map or latent; None if the flow has none.

        The deviations are the noise levels from `defectflow.noise.add_noise`, zero if not given.
        """
        if not self.config.noise_channels:
            return None
        return list(deviations or no_noise(nodes))

    def inverse(self, latents: Sequence[Tensor], condition: Sequence[Tensor] | None = None) -> list[Tensor]:
        """From latents to the adapted maps; see `forward` for the arguments."""
        if condition is None:
            condition = self.condition(latents)
        return uncouple_all(self.blocks, latents, condition)

    def position_nll(
        self, maps: Maps, condition: Sequence[Tensor] | None = None, mask: Sequence[Tensor] | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Negative log-likelihood of each position [B, H, W] of each node, in nats per dimension.

        Returns the latent's term ``|z|^2 / 2C`` alone, and the sum of all terms.
        """
        latents, log_dets = self(maps, condition, mask)
        norms = [0.5 * z.square().mean(1) for z in latents]
        nlls = [
            norm + 0.5 * LOG_2PI - log_det / z.shape[1]
            for norm, z, log_det in zip(norms, latents, log_dets, strict=True)
        ]
        return norms, nlls

    def nll(
        self, maps: Maps, condition: Sequence[Tensor] | None = None, mask: Sequence[Tensor] | None = None
    ) -> Tensor:
        """Negative log-likelihood of each image, [B], in nats per dimension of the (foreground's) latent."""
        latents, log_dets = self(maps, condition, mask)
        energy_B = torch.stack(
            [0.5 * z.flatten(1).square().sum(1) - d.flatten(1).sum(1) for z, d in zip(latents, log_dets, strict=True)]
        ).sum(0)
        if mask is None:
            return energy_B / sum(z[0].numel() for z in latents) + 0.5 * LOG_2PI
        dimensions_B = torch.stack(
            [z.shape[1] * mask_B1HW.flatten(1).sum(1) for z, mask_B1HW in zip(latents, mask, strict=True)]
        ).sum(0)
        return energy_B / dimensions_B.clamp_min(1.0) + 0.5 * LOG_2PI

    def position_scores(
        self, maps: Maps, score_type: ScoreType = "latent", mask: Sequence[Tensor] | None = None
    ) -> list[Tensor]:
        """Anomaly scores [B, H, W] of each node's positions; in the background, the foreground's minimum."""
        norms, nlls = self.position_nll(maps, mask=mask)
        return minimum_outside(norms if score_type == "latent" else nlls, mask)

    def merge(self, scores: Sequence[Tensor]) -> Tensor:
        """The mean over the nodes' position scores as one anomaly map [B, H, W] of the finest node's size."""
        size = max((tuple(node.shape[-2:]) for node in scores), key=math.prod)
        return torch.stack([resize(node, size) for node in scores]).mean(0)

    def image_scores(self, scores: Sequence[Tensor], top: float) -> Tensor:
        """Score [B, V] of each image: the mean over the `top` fraction of all nodes' position scores, the highest."""
        return top_mean(torch.cat([node.flatten(1) for node in scores], dim=1), top)[:, None]

    def sample_score(self, image_scores_BV: Tensor) -> Tensor:
        """Score [B] of each sample, from its images'."""
        return image_scores_BV[:, 0]

    def predict(
        self,
        maps: Maps,
        score_type: ScoreType = "latent",
        top: float | None = None,
        mask: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Anomaly score [B] and anomaly map [B, H, W] of each sample, in one pass; [B, V, H, W] for Multi-Flow.

        Args:
            maps: The backbone's maps.
            score_type: What a position's score is.
            top: Fraction of all nodes' positions (Multi-Flow: of an image's; DNFAD: of the upsampled map's), those
                with the highest scores, whose mean is the score; the published fraction if not given.
            mask: The foreground of each node; see `forward`.
        """
        scores = self.position_scores(maps, score_type, mask)
        image_scores_BV = self.image_scores(scores, self.top if top is None else top)
        return self.sample_score(image_scores_BV), self.merge(scores)

    def predict_images(
        self, maps: Maps, score_type: ScoreType = "latent", top: float | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Score [B] of each sample, and score [B, V] and anomaly map [B, V, H, W] of its V images; see `predict`."""
        scores = self.position_scores(maps, score_type)
        image_scores_BV = self.image_scores(scores, self.top if top is None else top)
        merged = self.merge(scores)
        map_BVHW = merged.reshape(len(merged), self.views, *merged.shape[-2:])
        return self.sample_score(image_scores_BV), image_scores_BV, map_BVHW

    def score(self, maps: Maps, score_type: ScoreType = "latent", top: float | None = None) -> Tensor:
        """Anomaly score of each sample, [B]; see `predict`."""
        return self.predict(maps, score_type, top)[0]

    def anomaly_map(self, maps: Maps, size: tuple[int, int], score_type: ScoreType = "latent") -> Tensor:
        """The anomaly map upsampled to `size` (rows, columns), [B, h, w]; [B, V, h, w] for Multi-Flow."""
        return resize(self.predict(maps, score_type)[1], size)


def masked(
    latents: list[Tensor], log_dets: list[Tensor], mask: Sequence[Tensor] | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Sets latents and log-determinants to zero where a node's mask [B, 1, H, W] is zero."""
    if mask is None:
        return latents, log_dets
    return (
        [z * mask_B1HW for z, mask_B1HW in zip(latents, mask, strict=True)],
        [log_det * mask_B1HW[:, 0] for log_det, mask_B1HW in zip(log_dets, mask, strict=True)],
    )


def minimum_outside(scores: list[Tensor], mask: Sequence[Tensor] | None) -> list[Tensor]:
    """Sets each node's position scores [B, H, W] outside of its mask [B, 1, H, W] to the minimum inside.

    >>> minimum_outside([torch.tensor([[[3.0, 1.0, 2.0]]])], [torch.tensor([[[[1.0, 0.0, 1.0]]]])])
    [tensor([[[3., 2., 2.]]])]
    """
    if mask is None:
        return scores
    clipped = []
    for node_BHW, mask_B1HW in zip(scores, mask, strict=True):
        outside_BHW = mask_B1HW[:, 0] == 0
        minimum_B = node_BHW.masked_fill(outside_BHW, math.inf).amin((1, 2)).nan_to_num(posinf=0.0)
        clipped.append(torch.where(outside_BHW, minimum_B[:, None, None], node_BHW))
    return clipped


def resize(scores: Tensor, size: tuple[int, ...]) -> Tensor:
    """Resizes position scores [..., H, W] bilinearly."""
    if scores.shape[-2:] == size:
        return scores
    map_N1HW = scores.reshape(-1, 1, *scores.shape[-2:])
    resized = F.interpolate(map_N1HW, size=size, mode="bilinear", align_corners=False)
    return resized.reshape(*scores.shape[:-2], *size)


def top_mean(values_BP: Tensor, top: float) -> Tensor:
    """Mean of the largest `top` fraction of the values, at least of one value, [B].

    >>> top_mean(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), top=0.5)
    tensor([3.5000])
    """
    if top == 1.0:
        return values_BP.mean(1)
    count = max(1, round(top * values_BP.shape[1]))
    return values_BP.topk(count, dim=1).values.mean(1)
