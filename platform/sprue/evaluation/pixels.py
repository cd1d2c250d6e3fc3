"""The curve over all pixels of a test split, exact, in memory for the anomalous pixels alone.

A pixel metric needs, at each value of an anomalous pixel, the number of normal pixels above it. So the anomalous values
are sorted once, and the normal values, of which there are many more, are counted between them.

Shapes: N images, H rows, W columns of an image (they may differ between images), A anomalous pixels of an image,
K thresholds, Q bins.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from sprue.errors import SprueError
from sprue.evaluation.curves import Counts, Curve

Values = NDArray[np.floating[Any]]

Maps = Callable[[int], Values]
"""Gives an image's anomaly map [H, W] by its index; called twice, so that no two maps are in memory at once."""

Masks = Callable[[int], NDArray[np.bool_] | None]
"""Gives an image's ground truth [H, W], True where anomalous; None for a good image. Called as often as `Maps`."""

BINS = 1024
"""Bins of each image's own counts, at most."""

SAMPLED = 256
"""Normal pixels of an image from which the bins' edges are chosen."""

CHUNK = 4_000_000
"""Normal pixels that are counted together, at least."""

_EIGHT_NEIGHBOURS = np.ones((3, 3))


def predicted_mask_fractions(
    predicted_masks: Callable[[int], NDArray[np.bool_]], masks: Masks, images: int
) -> tuple[Counts, Counts]:
    """Fractions of each image's normal and of its anomalous pixels in its predicted mask, [N]; NaN where it has none.

    >>> predicted_mask_fractions(lambda i: np.array([[False, True]]), lambda i: np.array([[False, True]]), images=1)
    (array([0.]), array([1.]))
    """
    of_normal_N, of_anomalous_N = np.full(images, np.nan), np.full(images, np.nan)
    for index in range(images):
        predicted_mask_HW, mask_HW = predicted_masks(index), masks(index)
        normal = predicted_mask_HW if mask_HW is None else predicted_mask_HW[~mask_HW]
        if normal.size:
            of_normal_N[index] = normal.mean()
        if mask_HW is not None and mask_HW.any():
            of_anomalous_N[index] = predicted_mask_HW[mask_HW].mean()
    return of_normal_N, of_anomalous_N


@dataclass(frozen=True)
class PixelCounts:
    """Exact counts of all pixels, and binned counts of each image's, from which a bootstrap can resample.

    Attributes:
        curve: Over all pixels.
        overlap_K: Mean over the defects' regions of their fraction at or above each of the curve's thresholds.
        anomalous_NQ: Each image's anomalous pixels, in bins from the highest values to the lowest.
        normal_NQ: Each image's normal pixels, likewise.
        overlap_NQ: Sum of its anomalous pixels' fractions of their regions, likewise.
        regions_N: Its regions.
    """

    curve: Curve
    overlap_K: Counts
    anomalous_NQ: Counts
    normal_NQ: Counts
    overlap_NQ: Counts
    regions_N: Counts

    @property
    def is_defective_N(self) -> NDArray[np.bool_]:
        """Whether an image has anomalous pixels."""
        return self.anomalous_NQ.sum(1) > 0

    @property
    def aupro(self) -> Counts:
        """The area under the curve of the overlap; NaN where there are no regions or no normal pixels."""
        return self.curve.overlap_area(self.overlap_K)


def count_pixels(maps: Maps, masks: Masks, images: int) -> PixelCounts:
    """Counts the pixels of a test split; a region is a connected component of a mask, corners included.

    Raises:
        SprueError: If a mask is not boolean or has another shape than its map, or a map holds NaN; the message gives
            the image's index.
    """
    rng = np.random.default_rng(0)
    values: list[NDArray[Any]] = [np.zeros(0)]
    fractions, sampled = [np.zeros(0)], [np.zeros(0)]
    for index in range(images):
        mask = masks(index)
        map_HW = _checked(maps(index), mask, index)
        normal = map_HW.ravel() if mask is None else map_HW[~mask]
        sampled.append(rng.choice(normal, min(SAMPLED, len(normal)), replace=False))
        values.append(np.zeros(0, map_HW.dtype) if mask is None else map_HW[mask])
        fractions.append(_region_fractions(mask))
    thresholds_K, threshold_index = np.unique(np.concatenate(values), return_inverse=True)
    bins = _Bins.chosen(thresholds_K, np.concatenate(sampled))
    binned = np.array([bins.count(*each) for each in zip(values[1:], fractions[1:], strict=True)])
    anomalous_NQ, overlap_NQ = binned.reshape(images, 2, len(bins.edges_Q)).swapaxes(0, 1)
    false_positives, false_positives_above, normal_NQ = _count_normal(maps, masks, images, thresholds_K, bins)
    anomalous = np.bincount(threshold_index, minlength=len(thresholds_K)).astype(float)
    overlap = np.bincount(threshold_index, np.concatenate(fractions), minlength=len(thresholds_K))
    regions_N = np.array([round(each.sum()) for each in fractions[1:]], float)
    curve = Curve(
        np.cumsum(anomalous[::-1]),
        false_positives,
        false_positives_above,
        anomalous=np.array(float(len(threshold_index))),
        normal=np.array(normal_NQ.sum()),
    )
    overlap_K = np.cumsum(overlap[::-1]) / max(1.0, regions_N.sum())
    return PixelCounts(curve, overlap_K, anomalous_NQ, normal_NQ, overlap_NQ, regions_N)


@dataclass(frozen=True)
class _Bins:
    """Bins of values, by their lower edges, ascending; the first bin also holds all lower values."""

    edges_Q: Values

    @classmethod
    def chosen(cls, thresholds_K: Values, normal: Values) -> "_Bins":
        """Bins as fine as the metrics need: at anomalous values, and at normal values the finer the higher they are."""
        top = 1.0 - np.geomspace(0.1, 1e-5, BINS // 4)
        levels = np.concatenate([np.linspace(0.0, 0.9, BINS // 4), top])
        edges = [
            np.quantile(each, at, method="lower")
            for each, at in ((thresholds_K, np.linspace(0, 1, BINS // 2)), (normal, levels))
            if len(each)
        ]
        return cls(np.unique(np.concatenate(edges)) if edges else np.zeros(1))

    def count(self, values_A: Values, weights_A: Values) -> Counts:
        """Number of values in each bin, and their weight, [2, Q], from the highest bin to the lowest."""
        bin_A = np.clip(np.searchsorted(self.edges_Q, values_A, side="right") - 1, 0, None)
        size = len(self.edges_Q)
        counts_2Q = np.stack([np.bincount(bin_A, minlength=size), np.bincount(bin_A, weights_A, minlength=size)])
        return counts_2Q[:, ::-1].astype(float)

    def count_sorted(self, values: Values) -> Counts:
        """Number of some ascending values in each bin, [Q], from the highest bin to the lowest."""
        starts = np.searchsorted(values, self.edges_Q[1:], side="left")
        return np.diff(starts, prepend=0, append=len(values))[::-1].astype(float)


def _checked(map_HW: Values, mask: NDArray[np.bool_] | None, index: int) -> Values:
    if mask is not None and mask.dtype != np.bool_:
        raise SprueError(f"image {index}: its mask holds {mask.dtype}; give it as booleans, True where anomalous")
    if mask is not None and mask.shape != map_HW.shape:
        raise SprueError(f"image {index}: its map is {map_HW.shape}, its mask {mask.shape}")
    if np.isnan(map_HW).any():
        raise SprueError(f"image {index}: its anomaly map holds NaN")
    return map_HW


def _region_fractions(mask: NDArray[np.bool_] | None) -> Counts:
    """One pixel's fraction of its region, for each anomalous pixel [A] in the mask's order."""
    if mask is None or not mask.any():
        return np.zeros(0)
    regions_HW, _ = ndimage.label(mask, _EIGHT_NEIGHBOURS)
    region_A = regions_HW[mask]
    return 1.0 / np.bincount(region_A)[region_A]


def _count_normal(
    maps: Maps, masks: Masks, images: int, thresholds_K: Values, bins: _Bins
) -> tuple[Counts, Counts, Counts]:
    """Normal pixels at or above and above each threshold, the highest first, [K]; those of each image, [N, Q]."""
    # Index k counts the pixels from threshold k - 1 up to below threshold k; those on a threshold are counted apart.
    between = np.zeros(len(thresholds_K) + 1, np.int64)
    on = np.zeros(len(thresholds_K) + 1, np.int64)
    waiting: list[Values] = []
    normal_NQ = np.zeros((images, len(bins.edges_Q)))

    def count_waiting() -> None:
        normal = np.sort(np.concatenate(waiting))
        waiting.clear()
        below = np.searchsorted(thresholds_K, normal, side="left")
        between[:] += np.bincount(below, minlength=len(between))
        tied = below[(below < len(thresholds_K)) & (np.append(thresholds_K, np.nan)[below] == normal)]
        on[:] += np.bincount(tied, minlength=len(on))

    for index in range(images):
        map_HW, mask = maps(index), masks(index)
        normal = np.sort(map_HW.ravel() if mask is None else map_HW[~mask])
        normal_NQ[index] = bins.count_sorted(normal)
        waiting.append(normal)
        if sum(map(len, waiting)) >= max(CHUNK, len(thresholds_K)):
            count_waiting()
    if waiting:
        count_waiting()
    # `below` is the number of thresholds that a pixel is above.
    above_K = np.cumsum(between[::-1])[::-1][1:]
    return (above_K + on[:-1])[::-1].astype(float), above_K[::-1].astype(float), normal_NQ
