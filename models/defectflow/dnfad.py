"""DNFAD: two branches over one map, one that is told each position's place and one that is not.

Shapes: B pictures, C channels, H rows, W columns of the map, P channels of the position code.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defectflow.adaptor import Adaptation, ChannelAdaptor, check_adaptation
from defectflow.coupling import GraphCoupling, uncouple_all
from defectflow.flow import Evidence, Flow, FlowConfig, Maps, Shape, least_outside, top_mean
from defectflow.pyramid import fuse
from defectflow.subnets import AttentionSubnet

Branch = Literal["local", "global"]


def position_code(channels: int, rows: int, columns: int) -> Tensor:
    """The 2-D sinusoidal code of each position, [P, H, W]: half of the channels for the column, half for the row.

    Source: Wang and Liu, "Translating Math Formula Images to LaTeX Sequences" (2019), as DNFAD takes it from
    CFlow-AD.

    Raises:
        ValueError: If the channels can't be divided by four.

    >>> position_code(8, 3, 5).shape
    torch.Size([8, 3, 5])
    """
    if channels % 4:
        raise ValueError(f"position_channels: {channels} can't be divided by four")
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


@dataclass(frozen=True)
class DNFADConfig(FlowConfig):
    """Settings of `DNFAD`; the defaults are the published ones.

    Attributes:
        maps: The maps that are read, brought to the finest one's size and concatenated (paper: two blocks of a ViT).
        steps: Coupling blocks of each branch (paper: 6; authors' code: 4).
        hidden: Channels of a subnetwork's hidden map; as many as it puts out if 0.
        clamp: Bound of the log-scales (authors' code: 2).
        position_channels: Of the local branch's position code (authors' code: 64).
        branches: Which branches there are (paper: both).
        rectified: Those whose subnetworks end in a ReLU (authors' code: the local one), which makes all log-scales and
            shifts of a coupling's half of one sign.
        adaptation: What is done to the channels first (paper: nothing).
        relative: Whether a branch's log-probabilities are counted from each picture's own maximum (authors' code).
            Then a picture that is unusual everywhere alike goes unnoticed.
        upsampling: Of the map before the score is taken from it, bilinear with the corners aligned (authors' code: to
            the picture's size, 8 times). So a position at the border, where a backbone sees padding, counts half and
            one in a corner a quarter.
    """

    steps: int = 6
    hidden: int = 0
    clamp: float = 2.0
    position_channels: int = 64
    branches: tuple[Branch, ...] = ("local", "global")
    rectified: tuple[Branch, ...] = ("local",)
    adaptation: Adaptation = "none"
    relative: bool = False
    upsampling: int = 8

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            ValueError: If a setting is out of range; the message names it.
        """
        super().__post_init__()
        for name in ("branches", "rectified"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            if not set(getattr(self, name)) <= {"local", "global"}:
                raise ValueError(f"{name}: {list(getattr(self, name))} are not some of 'local' and 'global'")
        if not self.branches:
            raise ValueError("branches is empty; name 'local', 'global' or both")
        if self.position_channels < 0 or self.position_channels % 4 or self.hidden < 0:
            raise ValueError(
                f"position_channels is a multiple of four and hidden at least 0; got {self.position_channels} and "
                f"{self.hidden}"
            )
        if not isinstance(self.upsampling, int) or self.upsampling < 1:
            raise ValueError(
                f"upsampling: {self.upsampling} is not a whole number from 1, which leaves the map as it is"
            )
        check_adaptation(self.adaptation)

    @classmethod
    def fitting(cls, scales: Sequence[Sequence[Shape]], pictures: int, **settings: Any) -> Self:
        """The config for features of some shapes: unless `maps` are given, the deepest block's map of the first scale.

        >>> DNFADConfig.fitting([[(40, 8, 8), (192, 4, 4)], [(40, 4, 4), (192, 2, 2)]], pictures=9).maps
        (1,)
        """
        maps = tuple(settings.pop("maps", ())) or (len(scales[0]) - 1,)
        return super().fitting(scales, pictures, maps=maps, **settings)

    @property
    def fused(self) -> int:
        """Channels of the maps that are read, together."""
        return sum(self.channels[place] for place in self.maps)


class DNFAD(Flow):
    """The density of a map, once position by position with a code of where it is, and once as a whole.

    Both branches are couplings with dynamic spatial attention. The local one is told each position's place, so
    that it learns what is usual there; the global one is not. (The authors' code has FrEIA's ``AllInOneBlock`` in the
    global branch, and tells it the place too.) Each latent gives a probability for every position,
    ``exp(-mean(z^2) / 2)``, in units of one channel, since over hundreds of channels it would be zero in any float;
    the evidence is one minus the mean of the branches' probabilities (equations 15 to 17).

    Source: DNFAD, a dual-branch normalizing flow for anomaly detection and localisation.

    >>> flow = DNFAD(DNFADConfig(channels=(6,), steps=2, position_channels=8))
    >>> latents, log_dets = flow([torch.randn(2, 6, 5, 4)])
    >>> len(latents), log_dets[0].shape, flow.score([torch.randn(2, 6, 5, 4)]).shape
    (2, torch.Size([2, 5, 4]), torch.Size([2]))
    """

    config_class = DNFADConfig
    config: DNFADConfig

    def __init__(self, config: DNFADConfig) -> None:
        """Makes an unfitted flow, the identity."""
        super().__init__(config)
        self.adaptor = ChannelAdaptor(1, config.fused, config.adaptation)
        self.branches = nn.ModuleDict(
            {branch: nn.ModuleList(self._coupling(branch) for _ in range(config.steps)) for branch in config.branches}
        )

    def _coupling(self, branch: Branch) -> GraphCoupling:
        config = self.config
        return GraphCoupling(
            [(config.fused, 1, 1)],
            lambda c_in, c_out: AttentionSubnet(c_in, c_out, config.hidden or c_out, branch in config.rectified),
            config.clamp,
            config.dims_c(config.position_channels if branch == "local" else 0),
        )

    def fit_adaptor(self, batches: Iterable[Maps]) -> "DNFAD":
        """Fits the channels' adaptor."""
        self.adaptor.fit([fuse(self.chosen(maps), neighbourhood=1)] for maps in batches)
        return self

    def adapt(self, maps: Maps) -> list[Tensor]:
        """The maps that are read, of one size, concatenated and adapted, [B, C, H, W]: the same for each branch."""
        return self.adaptor([fuse(self.chosen(maps), neighbourhood=1)]) * len(self.branches)

    def condition(self, nodes: Sequence[Tensor], deviations: Sequence[Tensor] | None = None) -> list[Tensor]:
        """The position code for the local branch, then how much noise there is; without either no channels."""
        told = []
        noise = super().condition(nodes, deviations)
        for index, (branch, node) in enumerate(zip(self.config.branches, nodes, strict=True)):
            channels = self.config.position_channels if branch == "local" else 0
            code_PHW = position_code(channels, *node.shape[2:]).to(node)
            parts = [code_PHW.expand(len(node), *code_PHW.shape), *([noise[index]] if noise else [])]
            told.append(torch.cat(parts, dim=1))
        return told

    def couple(self, nodes: Sequence[Tensor], condition: Sequence[Tensor] | None) -> tuple[list[Tensor], list[Tensor]]:
        """A latent and its log-determinants for each branch, in the order of the config."""
        told = condition or self.condition(nodes)
        results = [
            self.chain(self.branches[branch].children(), [node], [tell])
            for branch, node, tell in zip(self.config.branches, nodes, told, strict=True)
        ]
        return [z for (z,), _ in results], [log_det for _, (log_det,) in results]

    def inverse(self, latents: Sequence[Tensor], condition: Sequence[Tensor] | None = None) -> list[Tensor]:
        """The adapted map as each branch's latent gives it back."""
        told = condition or self.condition(latents)
        return [
            uncouple_all(self.branches[branch].children(), [z], [tell])[0]
            for branch, z, tell in zip(self.config.branches, latents, told, strict=True)
        ]

    def evidence(self, maps: Maps, evidence: Evidence = "latent", mask: Sequence[Tensor] | None = None) -> list[Tensor]:
        """One minus the branches' mean probability, [B, H, W], as a list of one; see the class.

        With the likelihood as evidence the log-determinants are counted too, as in ``exp(log p / C)``.
        """
        norms, wholes = self.position_nll(maps, mask=mask)
        energies = norms if evidence == "latent" else wholes
        if self.config.relative:
            energies = [energy_BHW - energy_BHW.amin((1, 2), keepdim=True) for energy_BHW in energies]
        fused_BHW = 1.0 - torch.stack([(-energy_BHW).exp() for energy_BHW in energies]).mean(0)
        return least_outside([fused_BHW], mask[:1] if mask else None)

    def assess(
        self,
        maps: Maps,
        evidence: Evidence = "latent",
        top: float | None = None,
        mask: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `Flow.assess`; the score is the mean over the top of the upsampled map."""
        (map_BHW,) = self.evidence(maps, evidence, mask)
        rows, columns = (length * self.config.upsampling for length in map_BHW.shape[1:])
        fine_B1HW = F.interpolate(map_BHW[:, None], size=(rows, columns), mode="bilinear", align_corners=True)
        return top_mean(fine_B1HW.flatten(1), self.top if top is None else top), map_BHW
