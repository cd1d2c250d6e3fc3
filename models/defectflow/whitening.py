"""PCA whitening: the linear map that gives features zero mean and identity covariance.

Shapes: B images, C channels, H rows, W columns of a map; P positions; N feature vectors, D channels, A kept components.
"""

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
    """Feature vectors [N, C] of a batch at positions on a fixed grid, about `POSITIONS_PER_IMAGE` an image."""
    map_BCP = map_BCHW.flatten(2)
    stride = max(1, map_BCP.shape[2] // POSITIONS_PER_IMAGE)
    return map_BCP[:, :, ::stride].transpose(1, 2).flatten(0, 1)


def fit_whitening(
    batches: Iterable[Tensor], components: int, *, decorrelate: bool = True, shrink: bool = False
) -> tuple[Tensor, Tensor]:
    """Fits the whitening in one pass, accumulated in float64.

    Args:
        batches: Batches of feature vectors [N, D].
        components: A, how many of the directions with the largest variance are kept.
        decorrelate: False scales each channel to unit variance instead; then all channels are kept.
        shrink: Shrinks the covariance, see `shrunk`. Fewer than `VECTORS_PER_COMPONENT` vectors for a component are
            always shrunk: their covariance is too uncertain, or singular.

    Returns:
        The weight [A, D] and the bias [A] in float32: ``weight @ x + bias`` is white.

    Raises:
        ValueError: If there are fewer than two vectors, all are equal, or a value is not finite.

    >>> x_ND = torch.randn(1000, 3, dtype=torch.float64) * torch.tensor([1.0, 5.0, 0.1]) + 7
    >>> weight_AD, bias_A = fit_whitening([x_ND.float()], components=3)
    >>> white_NA = x_ND.float() @ weight_AD.T + bias_A
    >>> bool(torch.allclose(torch.cov(white_NA.T), torch.eye(3), atol=1e-2))
    True
    """
    count, shift, total, outer = 0, torch.zeros(()), torch.zeros(()), torch.zeros(())
    for x_ND in batches:
        if count == 0:
            # Sums of squares around a typical value keep the digits that sums around zero would cancel.
            shift = x_ND.mean(0)
            total, outer = shift.double() * 0, torch.outer(shift, shift).double() * 0
        centred_ND = x_ND - shift
        count += x_ND.shape[0]
        total += centred_ND.sum(0).double()
        outer += (centred_ND.T @ centred_ND).double()
    if count < 2:
        raise ValueError(f"whitening needs at least two vectors; got {count}")
    mean = total / count
    covariance = outer / count - torch.outer(mean, mean)
    if not torch.isfinite(covariance).all():
        raise ValueError("whitening: the features are not finite")
    if covariance.diagonal().max() <= EQUAL * shift.double().square().max():
        raise ValueError(f"whitening: the {count} vectors are all equal")
    if not decorrelate:
        variances = covariance.diagonal()
        weight = variances.clamp_min(variances.max() * RELATIVE_FLOOR).rsqrt().diag()
        return weight.float(), -(weight @ (shift.double() + mean)).float()
    if shrink or count < VECTORS_PER_COMPONENT * components:
        covariance = shrunk(covariance, count)
    variances, directions = torch.linalg.eigh(covariance)
    variances, directions = variances.flip(0)[:components], directions.flip(1)[:, :components]
    weight = directions.T / variances.clamp_min(variances[0] * RELATIVE_FLOOR).sqrt()[:, None]
    return weight.float(), -(weight @ (shift.double() + mean)).float()


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
