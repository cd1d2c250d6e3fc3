"""PCA whitening: the linear map that gives features zero mean and identity covariance.

Shapes: B images, C channels, H rows, W columns of a map; P positions; N feature vectors, D channels, A kept components.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

POSITIONS_PER_IMAGE = 256
"""Positions of an image that a whitening is fitted on. Adjacent positions are nearly equal."""

RELATIVE_FLOOR = 1e-6
"""A direction whose variance is below this fraction of the largest is constant up to rounding."""


EQUAL = 1e-12
"""Vectors whose variances are below this fraction of their squares are equal up to rounding."""

VECTORS_PER_COMPONENT = 5
"""Vectors for each component below which a covariance is always shrunk."""


@torch.no_grad()
def sample_vectors(map_BCHW: Tensor) -> Tensor:
    """Feature vectors [N, C] of a batch at positions on a fixed grid, about `POSITIONS_PER_IMAGE` an image.

    The grid is square and slightly turned, so that it has points in all rows and columns: those whose column plus k
    times the row is a multiple of k^2 + 1. An upright grid never sees most columns; one that takes each n-th position,
    row after row, sees few columns where n and the width have common factors, and else lies in stripes.
    """
    height, width = map_BCHW.shape[2:]
    k = round(math.sqrt(max(0, height * width // POSITIONS_PER_IMAGE - 1)))
    row_H, column_W = (torch.arange(size, device=map_BCHW.device) for size in (height, width))
    on_grid_HW = (column_W + k * row_H[:, None]) % (k**2 + 1) == 0
    return map_BCHW[:, :, on_grid_HW].transpose(1, 2).flatten(0, 1)


class Moments:
    """Mean and covariance of feature vectors [N, D] that come in batches, accumulated in float64.

    >>> moments = Moments()
    >>> for x_ND in torch.tensor([[[1.0, 2.0], [3.0, 2.0]], [[1.0, 4.0], [3.0, 4.0]]]):
    ...     moments.add(x_ND)
    >>> mean_D, covariance_DD = moments.solve()
    >>> mean_D.tolist(), covariance_DD.tolist()
    ([2.0, 3.0], [[1.0, 0.0], [0.0, 1.0]])
    """

    def __init__(self) -> None:
        """Starts without a vector."""
        self.count = 0
        self._shift = self._total = self._outer = torch.zeros(())

    def add(self, x_ND: Tensor) -> None:
        """Adds a batch."""
        if self.count == 0:
            # Sums of squares around a typical value keep the digits that sums around zero would cancel.
            self._shift = x_ND.mean(0)
            self._total, self._outer = self._shift.double() * 0, torch.outer(self._shift, self._shift).double() * 0
        centred_ND = x_ND - self._shift
        self.count += x_ND.shape[0]
        self._total += centred_ND.sum(0).double()
        self._outer += (centred_ND.T @ centred_ND).double()

    def solve(self) -> tuple[Tensor, Tensor]:
        """The mean [D] and the covariance [D, D].

        Raises:
            ValueError: If there are fewer than two vectors, all are equal, or a value is not finite.
        """
        if self.count < 2:
            raise ValueError(f"whitening needs at least two vectors; got {self.count}")
        mean_D = self._total / self.count
        covariance_DD = self._outer / self.count - torch.outer(mean_D, mean_D)
        if not torch.isfinite(covariance_DD).all():
            raise ValueError("whitening: the features are not finite")
        if covariance_DD.diagonal().max() <= EQUAL * self._shift.double().square().max():
            raise ValueError(f"whitening: the {self.count} vectors are all equal")
        return self._shift.double() + mean_D, covariance_DD


def fit_whitening(
    batches: Iterable[Tensor], components: int, *, decorrelate: bool = True, shrink: bool = False
) -> tuple[Tensor, Tensor]:
    """Fits the whitening of batches of feature vectors [N, D] in one pass; see `whitening`.

    >>> x_ND = torch.randn(1000, 3, dtype=torch.float64) * torch.tensor([1.0, 5.0, 0.1]) + 7
    >>> weight_AD, bias_A = fit_whitening([x_ND.float()], components=3)
    >>> white_NA = x_ND.float() @ weight_AD.T + bias_A
    >>> bool(torch.allclose(torch.cov(white_NA.T), torch.eye(3), atol=1e-2))
    True
    """
    moments = Moments()
    for x_ND in batches:
        moments.add(x_ND)
    return whitening(moments, components, decorrelate=decorrelate, shrink=shrink)


def whitening(
    moments: Moments, components: int, *, decorrelate: bool = True, shrink: bool = False
) -> tuple[Tensor, Tensor]:
    """The linear map that makes vectors of these moments white.

    Args:
        moments: Of the vectors.
        components: A, how many of the directions with the largest variance are kept.
        decorrelate: False scales each channel to unit variance instead; then all channels are kept.
        shrink: Shrinks the covariance, see `shrunk`. Fewer than `VECTORS_PER_COMPONENT` vectors for a component are
            always shrunk: their covariance is too uncertain, or singular.

    Returns:
        The weight [A, D] and the bias [A] in float32: ``weight @ x + bias`` is white.

    Raises:
        ValueError: If there are fewer than two vectors, all are equal, or a value is not finite.
    """
    mean_D, covariance_DD = moments.solve()
    if not decorrelate:
        variances_D = covariance_DD.diagonal()
        weight_AD = variances_D.clamp_min(variances_D.max() * RELATIVE_FLOOR).rsqrt().diag()
        return weight_AD.float(), -(weight_AD @ mean_D).float()
    if shrink or moments.count < VECTORS_PER_COMPONENT * components:
        covariance_DD = shrunk(covariance_DD, moments.count)
    variances_D, directions_DD = torch.linalg.eigh(covariance_DD)
    variances_A, directions_DA = variances_D.flip(0)[:components], directions_DD.flip(1)[:, :components]
    weight_AD = directions_DA.T / variances_A.clamp_min(variances_A[0] * RELATIVE_FLOOR).sqrt()[:, None]
    return weight_AD.float(), -(weight_AD @ mean_D).float()


def shrunk(covariance_DD: Tensor, count: int) -> Tensor:
    """A covariance of `count` vectors, drawn to its diagonal as far as it is uncertain.

    The weight is the oracle-approximating one (Chen, Wiesel, Eldar and Hero, "Shrinkage Algorithms for MMSE Covariance
    Estimation", 2010, equation 23) of the correlations, so that it does not depend on the channels' units.

    >>> shrunk(torch.tensor([[4.0, 1.0], [1.0, 1.0]], dtype=torch.float64), count=10**9).round(decimals=3).tolist()
    [[4.0, 1.0], [1.0, 1.0]]
    >>> shrunk(torch.tensor([[4.0, 1.0], [1.0, 1.0]], dtype=torch.float64), count=2).tolist()
    [[4.0, 0.0], [0.0, 1.0]]
    """
    variances_D = covariance_DD.diagonal()
    floor_D = variances_D.clamp_min(variances_D.max() * RELATIVE_FLOOR).sqrt()
    size = len(covariance_DD)
    squares = float((covariance_DD / torch.outer(floor_D, floor_D)).square().sum())
    numerator = (1 - 2 / size) * squares + size**2
    denominator = (count + 1 - 2 / size) * (squares - size)
    weight = 1.0 if denominator <= numerator else numerator / denominator
    return (1 - weight) * covariance_DD + weight * variances_D.diag()
