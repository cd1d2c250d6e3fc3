"""PCA whitening: the linear map after which features have mean zero and the identity as covariance.

Shapes: N feature vectors, D channels, A kept components.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

RELATIVE_FLOOR = 1e-6
"""Directions whose variance is below this share of the largest are constant in the data but for rounding."""


def fit_whitening(batches: Iterable[Tensor], components: int, *, decorrelate: bool = True) -> tuple[Tensor, Tensor]:
    """Fits the whitening in one pass, accumulated in float64.

    Args:
        batches: Feature vectors [N, D], several times.
        components: A, how many of the directions with the largest variance are kept.
        decorrelate: False leaves the channels as they are but for their mean and variance; then all are kept.

    Returns:
        The weight [A, D] and the bias [A] in float32: ``weight @ x + bias`` is white.

    Raises:
        ValueError: If there are no more vectors than components, or a value is not finite.

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
    if count <= components:
        raise ValueError(f"whitening to {components} components needs more than {components} vectors; got {count}")
    mean = total / count
    covariance = outer / count - torch.outer(mean, mean)
    if not torch.isfinite(covariance).all():
        raise ValueError("whitening met features that are not finite")
    if not decorrelate:
        variances = covariance.diagonal()
        weight = variances.clamp_min(variances.max() * RELATIVE_FLOOR).rsqrt().diag()
        return weight.float(), -(weight @ (shift.double() + mean)).float()
    variances, directions = torch.linalg.eigh(covariance)
    variances, directions = variances.flip(0)[:components], directions.flip(1)[:, :components]
    weight = directions.T / variances.clamp_min(variances[0] * RELATIVE_FLOOR).sqrt()[:, None]
    return weight.float(), -(weight @ (shift.double() + mean)).float()
