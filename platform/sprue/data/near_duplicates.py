"""Copies of images that are no copies of their files: saved as JPEG, BMP or PNG, or resized.

Two images are near-duplicates if their thumbnails' root-mean-square difference, in grey levels of 0..255, is tiny. What
was measured (magnetic tiles; bottle, pcb and toy of the development data; the demo's textures), largest of copies:
saved as BMP 0, as JPEG of quality 90 or 75 at most 0.49, resized to 0.5 or 0.9 at most 0.48, half the size and then
JPEG 75 at most 0.77; smallest of distinct images, a training and a test image: 2.65 on the tiles, 4.5 to 63 elsewhere.

Shapes: N images, D = 32 * 32 pixels of a thumbnail.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.neighbors import NearestNeighbors

from sprue.data.inspection import Inspection
from sprue.data.layouts import COPY, ImageRecord, SkippedFile
from sprue.data.splits import TEST, TRAIN

LIMIT = 1.0
"""Grey levels that a copy differs by less than."""

CONTRAST_FRACTION = 0.05
"""And less than this fraction of the thumbnail's standard deviation: faint images are always close to one another."""

TYPICAL_FRACTION = 0.2
"""And less than this fraction of the class's typical distance to the fifth neighbour: where a fixed camera sees parts
that are all alike, copies look no different, and none are reported."""

NEIGHBOURS = 5


def without_near_duplicates(
    records: Sequence[ImageRecord], found: Mapping[str, Inspection], keep: Collection[str]
) -> tuple[list[ImageRecord], list[SkippedFile]]:
    """Skips training images that are near-duplicates of a test image of any class, except those of `keep`.

    All images must be undamaged. Returns the other images, and the skipped ones.
    """
    tested = _Tested.of([record for record in records if record.split == TEST], found)
    twin_of: dict[str, str] = {}
    for training in _training(records).values() if tested.records else ():
        vectors_ND = _vectors(training, found)
        for record, vector_D, limit in zip(training, vectors_ND, _limits(vectors_ND), strict=True):
            if twin := tested.twin(vector_D, limit):
                twin_of[record.path] = twin.path
    skipped = [
        SkippedFile(
            path,
            f"{COPY} {twin}, saved in another way; if it is another part, add it to manifest.keep",
        )
        for path, twin in twin_of.items()
        if path not in keep
    ]
    gone = {entry.path for entry in skipped}
    return [record for record in records if record.path not in gone], skipped


@dataclass(frozen=True)
class _Tested:
    """The test images, by their mean grey level."""

    records: list[ImageRecord]
    vectors_ND: NDArray[np.float64]
    means_N: NDArray[np.float64]

    @classmethod
    def of(cls, records: Sequence[ImageRecord], found: Mapping[str, Inspection]) -> Self:
        vectors_ND = _vectors(records, found) if records else np.empty((0, 1))
        means_N = _means(vectors_ND)
        order_N = np.argsort(means_N, kind="stable")
        return cls([records[index] for index in order_N], vectors_ND[order_N], means_N[order_N])

    def twin(self, vector_D: NDArray[np.float64], limit: float) -> ImageRecord | None:
        """The nearest test image, if it is nearer than a limit.

        The means of two images differ by no more than the images do. So of thousands of classes' test images, few have
        to be looked at.
        """
        start, end = np.searchsorted(self.means_N, _means(vector_D) + np.array([-limit, limit]))
        distance_N = np.linalg.norm(self.vectors_ND[start:end] - vector_D, axis=1)
        nearest = int(distance_N.argmin()) if len(distance_N) else None
        return None if nearest is None or distance_N[nearest] >= limit else self.records[start + nearest]


def _means(vectors_ND: NDArray[np.float64]) -> Any:
    """Mean grey level of each image, or of the only one."""
    return vectors_ND.mean(axis=-1) * np.sqrt(vectors_ND.shape[-1])


def shared_digests(
    records: Sequence[ImageRecord], found: Mapping[str, Inspection], keep: Collection[str]
) -> dict[str, str]:
    """A digest for each training image of one class, by its path: near-duplicates have the same, others their own.

    The images of `keep` are near-duplicates of none.
    """
    own = {record.path: found[record.path].sha256 for record in records if record.split == TRAIN}
    training = [record for record in records if record.path in own and record.path not in keep]
    digests = [found[record.path].sha256 for record in training]
    if len(training) > 1:
        vectors_ND = _vectors(training, found)
        limits_N = _limits(vectors_ND)
        # With any larger radius, where a fixed camera sees parts that are all alike, each is a neighbour of each.
        search = NearestNeighbors(radius=float(limits_N.max()), algorithm="brute").fit(vectors_ND)
        near = [
            others[distances < limit]
            for distances, others, limit in zip(*search.radius_neighbors(vectors_ND), limits_N, strict=True)
        ]
        rows, columns = np.repeat(np.arange(len(near)), [len(others) for others in near]), np.concatenate(near)
        graph = coo_array((np.ones(len(rows)), (rows, columns)), shape=(len(training),) * 2)
        _, group_N = connected_components(graph, directed=False)
        # The least, so that the order of the files does not matter.
        least: dict[int, str] = {}
        for group, digest in zip(group_N.tolist(), digests, strict=True):
            least[group] = min(digest, least.get(group, digest))
        digests = [least[group] for group in group_N.tolist()]
    return own | {record.path: digest for record, digest in zip(training, digests, strict=True)}


def _training(records: Sequence[ImageRecord]) -> dict[str, list[ImageRecord]]:
    """The training images of each class."""
    of_class: dict[str, list[ImageRecord]] = defaultdict(list)
    for record in records:
        if record.split == TRAIN:
            of_class[record.class_name].append(record)
    return of_class


def _vectors(records: Sequence[ImageRecord], found: Mapping[str, Inspection]) -> NDArray[np.float64]:
    """Thumbnails, scaled so that their Euclidean distance is the root mean square in grey levels."""
    thumbnails_NHW = np.stack([np.asarray(found[record.path].thumbnail_HW, np.float64) for record in records])
    vectors_ND = thumbnails_NHW.reshape(len(records), -1)
    return vectors_ND / np.sqrt(vectors_ND.shape[1])


def _limits(vectors_ND: NDArray[np.float64]) -> NDArray[np.float64]:
    """The distance below which another image is a copy, for each training image of a class."""
    count, pixels = vectors_ND.shape
    typical = np.inf
    if count > NEIGHBOURS:
        search = NearestNeighbors(n_neighbors=NEIGHBOURS, algorithm="brute").fit(vectors_ND)
        typical = float(np.median(search.kneighbors()[0][:, -1]))
    contrast_N = vectors_ND.std(axis=1) * np.sqrt(pixels)
    return np.minimum(min(LIMIT, TYPICAL_FRACTION * typical), CONTRAST_FRACTION * contrast_N)
