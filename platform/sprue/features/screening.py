"""Good training images that look foreign: of another product, uniform, or unlike everything else in their class.

One foreign image among those for calibration raises the threshold until no defect is found. So the classes are screened
after extraction, before anything is fitted, by a short vector of each image: mean and spread over the positions of each
channel of its maps. A distance to the fifth neighbour is meant throughout, so that up to five foreign images of one
kind don't vouch for one another. An image is suspicious if

- its distance to its own class is at least `FAR` times the typical one there (mean and spread, in units of the class's
  own deviations), or
- it is nearer to another class than to its own, and far more so than is typical of its class (mean alone, in units of
  the deviations of all classes).

With EfficientNet-Lite0 and CS-Flow's nine maps at 384 pixels, the farthest good image of bottle, pcb, toy, the magnetic
tiles and the demo's textures lies at 1.1 to 1.9 times the typical distance, an image of one colour at 3.6 to 20. The
ratio of the distances to the own and to the nearest other class is at most 0.8 for good images and 1.25 to 14 for
images of another of these classes, the least between grass and gravel. A foreign image that is of no class and not
uniform lies at 2.4 (among pcb, which is missed) to 17.

Shapes: N images, C channels, H rows, W columns of a map, D entries of a vector, G groups, K candidates.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.neighbors import NearestNeighbors

from sprue.data.splits import TEST
from sprue.features.tables import FeatureTable

NEIGHBOURS = 5

LEAST_IMAGES = 2 * NEIGHBOURS
"""Of a class; nothing can be said of fewer."""

FAR = 3.0

FAR_FROM_TYPICAL = 1.75
"""Two classes of one product are near each other. A foreign image is nearer to another class by at least this factor
than is typical of the images around it."""

NAMED = 5
"""Images that a reason names at most."""

CANDIDATES = 8
"""Other classes that each image is held against, where there are more."""

BATCH = 64
"""Images whose maps are in memory together."""

_SPREAD_FLOOR = 0.02
_DEVIATION_FLOOR = 0.5


@dataclass(frozen=True)
class Suspicion:
    """A good training image that looks foreign.

    Attributes:
        path: The image, as in the manifest.
        distance: To its class, as a multiple of the distance that is typical there.
        product: The other class that it is nearer to; empty if there is none.
    """

    path: str
    distance: float
    product: str

    def __str__(self) -> str:
        """The path, and what is odd about the image."""
        looks = f"looks like class {self.product!r}" if self.product else "like no other image of the dataset"
        return f"{self.path} ({self.distance:.1f} times as far from the others as is typical; {looks})"


@dataclass(frozen=True)
class Screening:
    """What was found in one class.

    Attributes:
        suspicious: Images that look foreign, the farthest first.
        typical: Paths of three images that are near many others.
    """

    suspicious: tuple[Suspicion, ...]
    typical: tuple[str, ...]

    def reason(self, dataset: str, class_name: str) -> str:
        """Why the class can't be trained on before a user has decided, and how that is done."""
        count = len(self.suspicious)
        named = "; ".join(str(each) for each in self.suspicious[:NAMED])
        more = f"; and {count - NAMED} more" if count > NAMED else ""
        images = "1 good training image that looks" if count == 1 else f"{count} good training images that look"
        return (
            f"class {class_name!r} has {images} foreign: {named}{more}. Look at them in features/screening.html of the "
            f"store, add the path of each to datasets.{dataset}.manifest.drop or datasets.{dataset}.manifest.keep in "
            "params.yaml, and run again"
        )


@dataclass(frozen=True)
class Group:
    """The good training images of one view of a class, each content once.

    Attributes:
        class_name: The class.
        paths: Of the files of each image.
        mean_ND: Means over the positions of each channel of the image's maps.
        distance_N: Distance of each image to the fifth of the others, as a multiple of the typical one; None if nothing
            can be said, for there are too few or all are alike.
    """

    class_name: str
    paths: tuple[tuple[str, ...], ...]
    mean_ND: NDArray[np.float32]
    distance_N: NDArray[np.float64] | None


def describe(class_name: str, images: pd.DataFrame, table: FeatureTable) -> list[Group]:
    """What the screening has to know of a class, one group for each view; reads all its maps.

    Args:
        class_name: The class.
        images: Its rows of the manifest; those of the test split are not looked at.
        table: Its table, which holds all its images.

    Raises:
        SprueError: If the table lacks an image or can't be read.
    """
    return [_group(class_name, rows, table) for _, rows in images[images["split"] != TEST].groupby("view")]


def screen(groups: Sequence[Group], keep: Collection[str]) -> dict[str, Screening]:
    """Screens the good training images of all classes.

    Args:
        groups: Of all classes and views; see `describe`.
        keep: Paths of images that are good whatever they look like. They are not reported.
    """
    if not groups:
        return {}
    deviations_D = _floored(np.median([_deviations(group.mean_ND) for group in groups], axis=0))
    large = [group for group in groups if len(group.paths) >= NEIGHBOURS]
    centres_GD = np.array([(group.mean_ND / deviations_D).mean(axis=0) for group in large])
    screenings: dict[str, Screening] = {}
    for group in groups:
        before = screenings.get(group.class_name, Screening((), ()))
        found = _screen(group, large, centres_GD, deviations_D, keep)
        suspicious = sorted(before.suspicious + found.suspicious, key=lambda each: (-each.distance, each.path))
        screenings[group.class_name] = Screening(tuple(suspicious), before.typical or found.typical)
    return screenings


def _group(class_name: str, rows: pd.DataFrame, table: FeatureTable) -> Group:
    paths_of = {str(digest): tuple(paths) for digest, paths in rows.groupby("sha256")["path"]}
    # Images that are stored together are read together.
    digests = sorted(paths_of, key=table.location)
    means, spreads = [], []
    for start in range(0, len(digests), BATCH):
        maps = table.read(digests[start : start + BATCH])
        means.append(np.concatenate([map_NCHW.mean((2, 3), np.float64) for map_NCHW in maps], axis=1))
        spreads.append(np.concatenate([map_NCHW.std((2, 3), np.float64) for map_NCHW in maps], axis=1))
    mean_ND = np.concatenate(means)
    paths = tuple(paths_of[digest] for digest in digests)
    distance_N = _relative_distances(mean_ND, np.concatenate(spreads))
    return Group(class_name, paths, mean_ND.astype(np.float32), distance_N)


def _relative_distances(mean_ND: NDArray[np.float64], spread_ND: NDArray[np.float64]) -> NDArray[np.float64] | None:
    if len(mean_ND) < LEAST_IMAGES:
        return None
    distance_N = _distances_within(_description(mean_ND, spread_ND))
    typical = float(np.median(distance_N))
    return distance_N / typical if typical else None


def _screen(
    group: Group,
    large: Sequence[Group],
    centres_GD: NDArray[np.float64],
    deviations_D: NDArray[np.float64],
    keep: Collection[str],
) -> Screening:
    if group.distance_N is None:
        return Screening((), ())
    ratio_N, products = _nearer(group, large, centres_GD, deviations_D)
    is_foreign_N = (ratio_N > 1) & (ratio_N > FAR_FROM_TYPICAL * np.median(ratio_N))
    suspicious = [
        Suspicion(path, float(group.distance_N[index]), products[index] if ratio_N[index] > 1 else "")
        for index in np.flatnonzero((group.distance_N >= FAR) | is_foreign_N)
        for path in group.paths[index]
        if path not in keep
    ]
    return Screening(tuple(suspicious), tuple(group.paths[index][0] for index in np.argsort(group.distance_N)[:3]))


def _description(mean_ND: NDArray[np.float64], spread_ND: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean and logarithmic spread, in units of the class's deviations: in a uniform image nothing varies."""
    median_D = np.median(spread_ND, axis=0)
    spread_ND = np.log(spread_ND / np.where(median_D > 0, median_D, 1) + _SPREAD_FLOOR)
    described_ND = np.concatenate([mean_ND, spread_ND], axis=1)
    return described_ND / _floored(_deviations(described_ND))


def _nearer(
    group: Group, large: Sequence[Group], centres_GD: NDArray[np.float64], deviations_D: NDArray[np.float64]
) -> tuple[NDArray[np.float64], list[str]]:
    """How many times as far each image is from its class as from the nearest other class, and that class's name."""
    own_ND = group.mean_ND / deviations_D
    others = [large[index] for index in _candidates(group, own_ND, large, centres_GD)]
    if not others:
        return np.zeros(len(group.paths)), [""] * len(group.paths)
    distances_GN = np.stack([_distances_to(other.mean_ND / deviations_D, own_ND) for other in others])
    nearest_N = distances_GN.argmin(axis=0)
    # An image that is in two classes has copies there; it is not at all far from either.
    least_N = np.maximum(distances_GN.min(axis=0), np.finfo(float).tiny)
    return _distances_within(own_ND) / least_N, [others[index].class_name for index in nearest_N]


def _candidates(
    group: Group, own_ND: NDArray[np.float64], large: Sequence[Group], centres_GD: NDArray[np.float64]
) -> list[int]:
    """The other classes' groups that may be nearest to an image: those with the nearest centres.

    Among thousands of classes, each against each would take hours.
    """
    others_G = np.array([index for index, other in enumerate(large) if other.class_name != group.class_name], int)
    if len(others_G) <= CANDIDATES:
        return others_G.tolist()
    centres_GD = centres_GD[others_G]
    # The image's own length does not matter for what is nearest to it.
    distances_NG = (centres_GD**2).sum(axis=1) - 2 * own_ND @ centres_GD.T
    nearest_NK = np.argpartition(distances_NG, CANDIDATES, axis=1)[:, :CANDIDATES]
    return others_G[np.unique(nearest_NK)].tolist()


def _distances_within(vectors_ND: NDArray[np.float64]) -> NDArray[np.float64]:
    """Distance of each image to the fifth of the others."""
    search = NearestNeighbors(n_neighbors=min(NEIGHBOURS, len(vectors_ND) - 1), algorithm="brute").fit(vectors_ND)
    return np.asarray(search.kneighbors()[0][:, -1])


def _distances_to(references_ND: NDArray[np.float64], vectors_ND: NDArray[np.float64]) -> NDArray[np.float64]:
    search = NearestNeighbors(n_neighbors=NEIGHBOURS, algorithm="brute").fit(references_ND)
    return np.asarray(search.kneighbors(vectors_ND)[0][:, -1])


def _deviations(vectors_ND: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """The median absolute deviation of each entry, which a few foreign images do not change."""
    return np.median(np.abs(vectors_ND - np.median(vectors_ND, axis=0)), axis=0)


def _floored(deviations_D: NDArray[np.float64]) -> NDArray[np.float64]:
    """Raises small deviations, so that entries that hardly vary, such as dead channels, do not outweigh all others."""
    floor = _DEVIATION_FLOOR * np.median(deviations_D)
    return np.maximum(deviations_D, floor if floor > 0 else 1.0)
