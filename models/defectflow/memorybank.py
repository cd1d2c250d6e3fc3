"""A memory of good feature vectors, to whose nearest one the distance is the score.

Shapes: B images, D channels of all maps that are read, H rows, W columns of the finest; N feature vectors, M vectors of
the bank, K channels of a random projection.
"""

from collections.abc import Iterable, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from defectflow.config import MemoryBankConfig
from defectflow.flow import LOG_2PI, Flow, Maps
from defectflow.pyramid import Grid, finest_size, fuse, fuse_projected
from defectflow.whitening import fit_whitening, sample_vectors

CANDIDATES = 16
"""Training vectors for each of the bank's, among which the coreset is chosen."""

PROJECTED = 64
"""Channels in which the coreset is chosen; random projections keep distances (Johnson and Lindenstrauss)."""

CHUNK = 4096
"""Positions whose distances to the bank are held at once."""


class MemoryBank(Flow):
    """A position's score is half its squared distance to the nearest vector of the bank, per channel.

    Nothing is trained. The bank is a coreset of the training images' feature vectors: greedily the vector that is
    farthest from those chosen. With vectors as kernels of a density estimate, half the squared distance is the negative
    log-likelihood under the nearest kernel, up to a constant.

    Source: Roth et al., "Towards Total Recall in Industrial Anomaly Detection" (PatchCore, 2022). An image's score is
    the mean of its highest positions, as of all flows here, not the paper's reweighted maximum.

    >>> bank, maps = MemoryBank(MemoryBankConfig(channels=(4, 6), size=20)), [torch.randn(3, 4, 8, 8)]
    >>> maps.append(torch.randn(3, 6, 4, 4))
    >>> bank.fit_adaptor([maps]).score(maps).shape
    torch.Size([3])
    """

    config_class = MemoryBankConfig
    version = 2
    top = 0.01
    searchable = ()
    config: MemoryBankConfig  # type: ignore[assignment]

    def __init__(self, config: MemoryBankConfig) -> None:
        """Builds an empty bank."""
        super().__init__(config)
        self.register_buffer("weight", torch.eye(config.fused))
        self.register_buffer("bias", torch.zeros(config.fused))
        self.register_buffer("bank", torch.zeros(config.size, config.fused))
        self.blocks = nn.ModuleList()

    @torch.no_grad()
    def fit_adaptor(self, batches: Iterable[Maps]) -> Self:
        """Fits the linear map and chooses the bank; reads the batches once for each.

        Raises:
            ValueError: If a feature is not finite.
        """
        if self.config.adaptation != "none":
            vectors = (sample_vectors(fuse(self.select(maps), self.config.neighbourhood)) for maps in batches)
            decorrelate = self.config.adaptation == "whiten"
            weight_DD, bias_D = fit_whitening(vectors, self.config.fused, decorrelate=decorrelate, shrink=True)
            self.get_buffer("weight").copy_(weight_DD)
            self.get_buffer("bias").copy_(bias_D)
        vectors = (sample_vectors(self.adapt(maps)[0]) for maps in batches)
        candidates_ND = random_subset(vectors, CANDIDATES * self.config.size)
        if not torch.isfinite(candidates_ND).all():
            raise ValueError("memory bank: the features are not finite")
        self.get_buffer("bank").copy_(candidates_ND[coreset(candidates_ND, self.config.size)])
        return self

    def adapt(self, maps: Maps) -> list[Tensor]:
        """The adapted fused map [B, D, H, W]."""
        selected, neighbourhood = self.select(maps), self.config.neighbourhood
        if self.config.adaptation == "none":
            return [fuse(selected, neighbourhood)]
        weight_DD, bias_D = self.get_buffer("weight"), self.get_buffer("bias")
        return [fuse_projected(selected, neighbourhood, weight_DD, bias_D, Grid(finest_size(selected)))]

    def position_nll(
        self, maps: Maps, condition: Sequence[Tensor] | None = None, mask: Sequence[Tensor] | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Half the squared distances to the bank [B, H, W], per channel, and the same with a kernel's constant."""
        (map_BDHW,) = self.adapt(maps)
        vectors_ND = map_BDHW.movedim(1, 3).flatten(0, 2)
        distance_N = torch.cat([self._nearest(chunk_ND) for chunk_ND in torch.split(vectors_ND, CHUNK)])
        energy_BHW = 0.5 * distance_N.square().reshape(map_BDHW[:, 0].shape) / map_BDHW.shape[1]
        return [energy_BHW], [energy_BHW + 0.5 * LOG_2PI]

    def nll(
        self, maps: Maps, condition: Sequence[Tensor] | None = None, mask: Sequence[Tensor] | None = None
    ) -> Tensor:
        """Mean of the (foreground's) positions' negative log-likelihoods under the nearest kernels, [B]."""
        nll_BHW = self.position_nll(maps)[1][0]
        if mask is None:
            return nll_BHW.mean((1, 2))
        mask_BHW = mask[0][:, 0]
        return (nll_BHW * mask_BHW).sum((1, 2)) / mask_BHW.sum((1, 2)).clamp_min(1.0)

    def forward(
        self, maps: Maps, condition: Sequence[Tensor] | None = None, mask: Sequence[Tensor] | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Raises NotImplementedError: a memory bank has no latents."""
        raise NotImplementedError("a memory bank has distances, and no latents")

    def inverse(self, latents: Sequence[Tensor], condition: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Raises NotImplementedError, as `forward`."""
        raise NotImplementedError("a memory bank has distances, and no latents")

    def _nearest(self, vectors_ND: Tensor) -> Tensor:
        return torch.cdist(vectors_ND, self.get_buffer("bank")).amin(1)


def random_subset(batches: Iterable[Tensor], size: int) -> Tensor:
    """At most `size` of the vectors [N, D] of some batches, chosen at random; holds about twice as many.

    >>> random_subset([torch.arange(6.0)[:, None], torch.arange(6.0, 9.0)[:, None]], size=3).shape
    torch.Size([3, 1])
    """
    generator = torch.Generator().manual_seed(0)
    kept, keys = [], []
    for vectors_ND in batches:
        kept.append(vectors_ND)
        keys.append(torch.rand(len(vectors_ND), generator=generator, dtype=torch.float64))
        if sum(map(len, keys)) > 2 * size:
            kept, keys = [[each] for each in _largest(torch.cat(kept), torch.cat(keys), size)]
    return _largest(torch.cat(kept), torch.cat(keys), size)[0]


def _largest(vectors_ND: Tensor, keys_N: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The vectors with the largest keys, in their order, and the keys."""
    chosen_N = keys_N.topk(min(size, len(keys_N))).indices.sort().values
    return vectors_ND[chosen_N.to(vectors_ND.device)], keys_N[chosen_N]


def coreset(vectors_ND: Tensor, size: int) -> Tensor:
    """Indices [M] of vectors that cover all: greedily the one that is farthest from those chosen (k-centre).

    Vectors repeat where there are fewer than `size`.

    >>> coreset(torch.tensor([[0.0], [0.1], [5.0], [9.0]]), size=3).tolist()
    [0, 3, 2]
    """
    generator = torch.Generator().manual_seed(0)
    projection_DK = torch.randn(vectors_ND.shape[1], PROJECTED, generator=generator).to(vectors_ND)
    projected_NK = vectors_ND if vectors_ND.shape[1] <= PROJECTED else vectors_ND @ projection_DK
    chosen_M = torch.zeros(size, dtype=torch.long, device=vectors_ND.device)
    distance_N = torch.full((len(vectors_ND),), torch.inf, device=vectors_ND.device)
    for index in range(size):
        chosen = chosen_M[index]
        distance_N = torch.minimum(distance_N, (projected_NK - projected_NK[chosen]).square().sum(1))
        if index + 1 < size:
            chosen_M[index + 1] = distance_N.argmax()
    return chosen_M
