"""DNFAD: two branches over one map; only the local branch is conditioned on the position.

Shapes: B images, C channels, H rows, W columns of the map, P channels of the position code, K
of the condition.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defectflow.adaptor import ChannelAdaptor
from defectflow.config import Branch, DNFADConfig, ScoreType
from defectflow.coupling import GraphCoupling, uncouple_all
from defectflow.flow import Flow, Maps, minimum_outside, top_mean
from defectflow.pyramid import fuse
from defectflow.subnets import AttentionSubnet


def position_code(channels: int, rows: int, columns: int) -> Tensor:
    """The 2-D sinusoidal position code [P, H, W]: half of the channels for the column, half for the row.

    Source: Wang and Liu, "Translating Math Formula Images to LaTeX Sequences" (2019); DNFAD adopts it from CFlow-AD.

    Raises:
        ValueError: If the channels are not a multiple of four.

    >>> position_code(8, 3, 5).shape
    torch.Size([8, 3, 5])
    """
    if channels % 4:
        raise ValueError(f"position_channels: {channels} is not a multiple of 4")
    if channels == 0:
        return torch.empty(0, rows, columns)
    half = channels // 2
    rates = torch.exp(torch.arange(0, half, 2, dtype=torch.float64) * (-math.log(1e4) / half))

    def waves(length: int) -> Tensor:
        angles_RL = rates[:, None] * torch.arange(length, dtype=torch.float64)
        return torch.stack([angles_RL.sin(), angles_RL.cos()], dim=1).flatten(0, 1)

    across = waves(columns)[:, None, :].expand(half, rows, columns)
    down = waves(rows)[:, :, None].expand(half, rows, columns)
    return torch.cat([across, down])


class DNFAD(Flow):
    """The density of a map in two branches: with position conditioning (local) and without (global).

    Both branches are couplings with dynamic spatial attention. Conditioned on the position code, the local branch
    learns what is normal at each position. (The authors' code has FrEIA's ``AllInOneBlock`` in the global branch,
    also conditioned on the position.) Each latent gives a probability for every position, ``exp(-mean(z^2) / 2)``.
    The mean over channels replaces the paper's sum, which underflows at hundreds of channels. The position score is
    one minus the mean of the branches' probabilities (equations 15 to 17).

    Source: DNFAD, a dual-branch normalizing flow for anomaly detection and localisation.

    >>> flow = DNFAD(DNFADConfig(channels=(6,), steps=2, position_channels=8))
    >>> latents, log_dets = flow([torch.randn(2, 6, 5, 4)])
    >>> len(latents), log_dets[0].shape, flow.score([torch.randn(2, 6, 5, 4)]).shape
    (2, torch.Size([2, 5, 4]), torch.Size([2]))
    """

    config_class = DNFADConfig
    version = 2
    config: DNFADConfig

    def __init__(self, config: DNFADConfig) -> None:
        """Builds an unfitted flow: the identity up to the order of channels."""
        super().__init__(config)
        self.adaptor = ChannelAdaptor(1, config.fused, config.adaptation)
        self.branches = nn.ModuleDict(
            {branch: nn.ModuleList(self._coupling(branch) for _ in range(config.steps)) for branch in config.branches}
        )

    def _coupling(self, branch: Branch) -> GraphCoupling:
        hidden, rectified = self.config.hidden, branch in self.config.rectified
        return self.coupling(
            1,
            self.config.fused,
            lambda c_in, c_out: AttentionSubnet(c_in, c_out, hidden or c_out, rectified),
            self._code_channels(branch),
        )

    def _code_channels(self, branch: Branch) -> int:
        return self.config.position_channels if branch == "local" else 0

    def select(self, maps: Maps) -> list[Tensor]:
        """The maps that this flow reads, concatenated into one."""
        return [fuse(super().select(maps), neighbourhood=1)]

    def adapt(self, maps: Maps) -> list[Tensor]:
        """The concatenated and adapted maps [B, C, H, W], the same for each branch."""
        return super().adapt(maps) * len(self.branches)

    def condition(self, nodes: Sequence[Tensor], deviations: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Each branch's condition: the local branch's position code, then the noise level; may have no channels."""
        conditions = []
        noise = super().condition(nodes, deviations)
        for index, (branch, node) in enumerate(zip(self.config.branches, nodes, strict=True)):
            code_PHW = position_code(self._code_channels(branch), *node.shape[2:]).to(node)
            parts = [code_PHW.expand(len(node), *code_PHW.shape), *([noise[index]] if noise else [])]
            conditions.append(torch.cat(parts, dim=1))
        return conditions

    def couple(self, nodes: Sequence[Tensor], condition: Sequence[Tensor] | None) -> tuple[list[Tensor], list[Tensor]]:
        """Latent [B, C, H, W] and log-determinants [B, H, W] of each branch, in the config's order."""
        conditions = condition or self.condition(nodes)
        results = [
            self.chain(self.branches[branch].children(), [node], [condition_BKHW])
            for branch, node, condition_BKHW in zip(self.config.branches, nodes, conditions, strict=True)
        ]
        return [z for (z,), _ in results], [log_det for _, (log_det,) in results]

    def inverse(self, latents: Sequence[Tensor], condition: Sequence[Tensor] | None = None) -> list[Tensor]:
        """The adapted map, once from each branch's latent."""
        conditions = condition or self.condition(latents)
        return [
            uncouple_all(self.branches[branch].children(), [z], [condition_BKHW])[0]
            for branch, z, condition_BKHW in zip(self.config.branches, latents, conditions, strict=True)
        ]

    def position_scores(
        self, maps: Maps, score_type: ScoreType = "latent", mask: Sequence[Tensor] | None = None
    ) -> list[Tensor]:
        """One minus the branches' mean probability, [B, H, W], as a list of one; see the class.

        The score type ``likelihood`` includes the log-determinants: the probability is ``exp(log p / C)``.
        """
        norms, nlls = self.position_nll(maps, mask=mask)
        energies = norms if score_type == "latent" else nlls
        if self.config.relative:
            energies = [energy_BHW - energy_BHW.amin((1, 2), keepdim=True) for energy_BHW in energies]
        fused_BHW = 1.0 - torch.stack([(-energy_BHW).exp() for energy_BHW in energies]).mean(0)
        return minimum_outside([fused_BHW], mask[:1] if mask else None)

    def image_scores(self, scores: Sequence[Tensor], top: float) -> Tensor:
        """As `Flow.image_scores`, but of the upsampled map's positions."""
        (map_BHW,) = scores
        rows, columns = (length * self.config.upsampling for length in map_BHW.shape[1:])
        fine_B1HW = F.interpolate(map_BHW[:, None], size=(rows, columns), mode="bilinear", align_corners=True)
        return top_mean(fine_B1HW.flatten(1), top)[:, None]
