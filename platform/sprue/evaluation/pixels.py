"""The curve over all pixels of a test split, exact, in memory that the anomalous pixels take.

Every figure of pixels needs to know, at each value that an anomalous pixel has, how many normal pixels lie above it. So
the anomalous values are sorted once, and the normal ones, of which there are many more, are counted among them.

Shapes: N pictures, H rows, W columns of a picture (they may differ between pictures), K thresholds, Q bins.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from sprue.errors import SprueError
from sprue.evaluation.curves import Counts, Curve

Maps = Callable[[int], NDArray[np.floating[Any]]]
"""Gives a picture's anomaly map [H, W] by its place; called twice, so that no two maps need be held at once."""

Masks = Callable[[int], NDArray[np.bool_] | None]
"""Gives its ground truth [H, W], True where anomalous, of its map's size; None for a good picture. Called as often."""

BINS = 1024
"""Bins of each picture's own counts, at most."""

SAMPLED = 256
"""Normal pixels of a picture that the bins are laid by."""

CHUNK = 4_000_000
"""Normal pixels that are counted together, at least."""

_EIGHT_NEIGHBOURS = np.ones((3, 3))


def marked_shares(marked: Callable[[int], NDArray[np.bool_]], masks: Masks, pictures: int) -> tuple[Counts, Counts]:
    """Shares of each picture's normal and of its anomalous pixels that are marked, [N]; NaN where it has none.

    Args:
        marked: Gives which of a picture's pixels are, [H, W].
        masks: Gives its ground truth.
        pictures: How many pictures there are.

    >>> marked_shares(lambda i: np.array([[False, True]]), lambda i: np.array([[False, True]]), pictures=1)
    (array([0.]), array([1.]))
    """
    alarms_N, found_N = np.full(pictures, np.nan), np.full(pictures, np.nan)
    for index in range(pictures):
        marked_HW, mask_HW = marked(index), masks(index)
        normal = marked_HW if mask_HW is None else marked_HW[~mask_HW]
        if normal.size:
            alarms_N[index] = normal.mean()
        if mask_HW is not None and mask_HW.any():
            found_N[index] = marked_HW[mask_HW].mean()
    return alarms_N, found_N


@dataclass(frozen=True)
class PixelCounts:
    """Counts of all pixels, and coarser ones of each picture's, from which a bootstrap can draw.

    Attributes:
        curve: Over all pixels.
        overlap_K: Mean over the defects' regions of their share at or above each of the curve's thresholds.
        found_NQ: Each picture's anomalous pixels, in bins from the highest values to the lowest.
        alarms_NQ: Its normal pixels.
        overlap_NQ: Its pixels' shares of their regions.
        regions_N: Its regions.
    """

    curve: Curve
    overlap_K: Counts
    found_NQ: Counts
    alarms_NQ: Counts
    overlap_NQ: Counts
    regions_N: Counts


def count_pixels(maps: Maps, masks: Masks, pictures: int) -> PixelCounts:
    """Counts the pixels of a test split.

    A region is what hangs together in a mask, corners included.

    Args:
        maps: Gives each picture's map.
        masks: Gives each picture's ground truth.
        pictures: How many pictures there are.

    Raises:
        SprueError: If a mask is not boolean or not of its map's shape, or a map holds a value that is no number; the
            message gives the picture's place.
    """
    rng = np.random.default_rng(0)
    values: list[NDArray[Any]] = [np.zeros(0)]
    shares, sampled = [np.zeros(0)], [np.zeros(0)]
    for index in range(pictures):
        mask = masks(index)
        map_HW = _checked(maps(index), mask, index)
        normal = map_HW.ravel() if mask is None else map_HW[~mask]
        sampled.append(rng.choice(normal, min(SAMPLED, len(normal)), replace=False))
        values.append(np.zeros(0, map_HW.dtype) if mask is None else map_HW[mask])
        shares.append(_shares(mask))
    thresholds_K, place = np.unique(np.concatenate(values), return_inverse=True)
    bins = _Bins.laid(thresholds_K, np.concatenate(sampled))
    binned = np.array([bins.count(*each) for each in zip(values[1:], shares[1:], strict=True)])
    found_NQ, overlap_NQ = binned.reshape(pictures, 2, len(bins.edges_Q)).swapaxes(0, 1)
    alarms, alarms_above, alarms_NQ = _count_normal(maps, masks, pictures, thresholds_K, bins)
    found = np.bincount(place, minlength=len(thresholds_K)).astype(float)
    overlap = np.bincount(place, np.concatenate(shares), minlength=len(thresholds_K))
    regions_N = np.array([round(share.sum()) for share in shares[1:]], float)
    curve = Curve(
        np.cumsum(found[::-1]),
        alarms,
        alarms_above,
        anomalous=np.array(float(len(place))),
        normal=np.array(alarms_NQ.sum()),
    )
    overlap_K = np.cumsum(overlap[::-1]) / max(1.0, regions_N.sum())
    return PixelCounts(curve, overlap_K, found_NQ, alarms_NQ, overlap_NQ, regions_N)


@dataclass(frozen=True)
class _Bins:
    """Bins of values, by their lower edges, ascending; the first also takes what is below."""

    edges_Q: NDArray[np.floating[Any]]

    @classmethod
    def laid(cls, thresholds_K: NDArray[np.floating[Any]], normal: NDArray[np.floating[Any]]) -> "_Bins":
        """Bins that tell apart what the figures do: anomalous values, and normal ones the finer the higher they are."""
        top = 1.0 - np.geomspace(0.1, 1e-5, BINS // 4)
        levels = np.concatenate([np.linspace(0.0, 0.9, BINS // 4), top])
        edges = [
            np.quantile(each, at, method="lower")
            for each, at in ((thresholds_K, np.linspace(0, 1, BINS // 2)), (normal, levels))
            if len(each)
        ]
        return cls(np.unique(np.concatenate(edges)) if edges else np.zeros(1))

    def count(self, values: NDArray[np.floating[Any]], weights: NDArray[np.floating[Any]]) -> Counts:
        """How many values each bin holds, and their weight, [2, Q], from the highest bin to the lowest."""
        place = np.clip(np.searchsorted(self.edges_Q, values, side="right") - 1, 0, None)
        size = len(self.edges_Q)
        return np.stack([np.bincount(place, minlength=size), np.bincount(place, weights, minlength=size)])[
            :, ::-1
        ].astype(float)

    def count_sorted(self, values: NDArray[np.floating[Any]]) -> Counts:
        """How many of some ascending values each bin holds, [Q], from the highest bin to the lowest."""
        starts = np.searchsorted(values, self.edges_Q[1:], side="left")
        return np.diff(starts, prepend=0, append=len(values))[::-1].astype(float)


def _checked(
    map_HW: NDArray[np.floating[Any]], mask: NDArray[np.bool_] | None, index: int
) -> NDArray[np.floating[Any]]:
    if mask is not None and mask.dtype != np.bool_:
        raise SprueError(f"picture {index}: its mask holds {mask.dtype}; give it as booleans, True where anomalous")
    if mask is not None and mask.shape != map_HW.shape:
        raise SprueError(f"picture {index}: its map is {map_HW.shape}, its mask {mask.shape}")
    if np.isnan(map_HW).any():
        raise SprueError(f"picture {index}: its anomaly map holds values that are no numbers")
    return map_HW


def _shares(mask: NDArray[np.bool_] | None) -> Counts:
    """What share of its region each anomalous pixel is, in the mask's order."""
    if mask is None or not mask.any():
        return np.zeros(0)
    regions_HW, _ = ndimage.label(mask, _EIGHT_NEIGHBOURS)
    region = regions_HW[mask]
    return 1.0 / np.bincount(region)[region]


def _count_normal(
    maps: Maps, masks: Masks, pictures: int, thresholds_K: NDArray[np.floating[Any]], bins: _Bins
) -> tuple[Counts, Counts, Counts]:
    """Normal pixels at or above and above each threshold, the highest first, [K]; those of each picture, [N, Q]."""
    # Place k counts the pixels from threshold k - 1 up to below threshold k; those on a threshold are counted apart.
    between = np.zeros(len(thresholds_K) + 1, np.int64)
    on = np.zeros(len(thresholds_K) + 1, np.int64)
    waiting: list[NDArray[np.floating[Any]]] = []
    alarms_NQ = np.zeros((pictures, len(bins.edges_Q)))

    def count_waiting() -> None:
        normal = np.sort(np.concatenate(waiting))
        waiting.clear()
        below = np.searchsorted(thresholds_K, normal, side="left")
        between[:] += np.bincount(below, minlength=len(between))
        tied = below[(below < len(thresholds_K)) & (np.append(thresholds_K, np.nan)[below] == normal)]
        on[:] += np.bincount(tied, minlength=len(on))

    for index in range(pictures):
        map_HW, mask = maps(index), masks(index)
        normal = np.sort(map_HW.ravel() if mask is None else map_HW[~mask])
        alarms_NQ[index] = bins.count_sorted(normal)
        waiting.append(normal)
        if sum(map(len, waiting)) >= max(CHUNK, len(thresholds_K)):
            count_waiting()
    if waiting:
        count_waiting()
    # `below` is the number of thresholds that a pixel is above.
    above_K = np.cumsum(between[::-1])[::-1][1:]
    return (above_K + on[:-1])[::-1].astype(float), above_K[::-1].astype(float), alarms_NQ
