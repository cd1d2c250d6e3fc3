"""Copies of images that are no copies of their files: saved as JPEG, BMP or PNG, or resized.

Two images are near-duplicates if their thumbnails' root-mean-square difference, in grey levels of 0..255, is tiny. What
was measured (magnetic tiles; bottle, pcb and toy of the development data; the demo's textures), largest of copies:
saved as BMP 0, as JPEG of quality 90 or 75 at most 0.49, resized to 0.5 or 0.9 at most 0.48, half the size and then
JPEG 75 at most 0.77; smallest of distinct images, a training and a test image: 2.65 on the tiles, 4.5 to 63 elsewhere.

A sample of several views is a copy of another if one view is nearly the other's, and no view contradicts. For a camera
may see the same in all parts, or a bland side of each: such a view says nothing.

Shapes: N samples, V views of a sample, M images of test samples, D = 32 * 32 pixels of a thumbnail; X may be nothing or
several other samples.
"""

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
from sprue.data.samples import by_class, by_sample
from sprue.data.splits import TEST, TRAIN

LIMIT = 1.0
"""Grey levels that a copy differs by less than."""

CONTRAST_FRACTION = 0.05
"""And less than this fraction of the thumbnail's standard deviation: faint images are always close to one another."""

TYPICAL_FRACTION = 0.2
"""And less than this fraction of the typical distance to the fifth neighbour in the class's images of the same view:
where a fixed camera sees parts that are all alike, copies look no different, and none are reported."""

NEIGHBOURS = 5


def without_near_duplicates(
    records: Sequence[ImageRecord], found: Mapping[str, Inspection], keep: Collection[str]
) -> tuple[list[ImageRecord], list[SkippedFile]]:
    """Skips training samples that are near-duplicates of a test sample of any class, except those of `keep`.

    All images must be undamaged, all samples complete. Returns the other samples' images, and the skipped samples.
    """
    tested = _Tested.of([record for record in records if record.split == TEST], found)
    if not tested.images:
        return list(records), []
    skipped = []
    for of_class in by_class(record for record in records if record.split == TRAIN).values():
        samples = by_sample(of_class)
        own, distinct = _contents(samples, found)
        vectors_NVD = _vectors(distinct.values(), found)
        twins = map(tested.twin, vectors_NVD, _limits(vectors_NVD))
        twin_of = dict(zip(distinct, twins, strict=True))
        for sample_id, images in samples.items():
            twin = twin_of[own[sample_id]]
            if twin and not _kept(images, keep):
                advice = "if it is another part, add its images to manifest.keep"
                skipped.append(SkippedFile(sample_id, f"{COPY} {twin.path}, saved in another way; {advice}"))
    gone = {entry.path for entry in skipped}
    return [record for record in records if record.sample_id not in gone], skipped


@dataclass(frozen=True)
class _Tested:
    """The test samples' images, by their mean grey level; and where those of each sample are, by their views."""

    images: list[ImageRecord]
    vectors_MD: NDArray[np.float64]
    means_M: NDArray[np.float64]
    places: Mapping[str, list[int]]

    @classmethod
    def of(cls, records: Sequence[ImageRecord], found: Mapping[str, Inspection]) -> Self:
        vectors_MD = _vectors([[record] for record in records], found)[:, 0] if records else np.empty((0, 1))
        means_M = _means(vectors_MD)
        order_M = np.argsort(means_M, kind="stable")
        images = [records[index] for index in order_M]
        places: dict[str, list[int]] = {}
        for place in sorted(range(len(images)), key=lambda place: images[place].view):
            places.setdefault(images[place].sample_id, []).append(place)
        return cls(images, vectors_MD[order_M], means_M[order_M], places)

    def twin(self, vectors_VD: NDArray[np.float64], limits_V: NDArray[np.float64]) -> ImageRecord | None:
        """An image of the test sample, with as many views, that a sample is a near-duplicate of.

        The means of two images differ by no more than the images do. So of thousands of classes' test images, few have
        to be looked at.
        """
        for vector_D, limit in zip(vectors_VD, limits_V, strict=True):
            start, end = np.searchsorted(self.means_M, _means(vector_D) + np.array([-limit, limit]))
            distances_M = np.linalg.norm(self.vectors_MD[start:end] - vector_D, axis=1)
            for index in np.argsort(distances_M, kind="stable")[: (distances_M < limit).sum()]:
                image = self.images[start + index]
                others_VD = self.vectors_MD[self.places[image.sample_id]]
                if len(others_VD) == len(vectors_VD) and _are_copies(vectors_VD, others_VD, limits_V):
                    return image
        return None


def _are_copies(
    vectors_VD: NDArray[np.float64], others_XVD: NDArray[np.float64], limits_V: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """Whether a view says that a sample is a copy of another, or of each of several, and no view contradicts."""
    distances_XV = np.linalg.norm(others_XVD - vectors_VD, axis=-1)
    return (distances_XV < limits_V).any(axis=-1) & (distances_XV < LIMIT).all(axis=-1)


def _means(vectors_ND: NDArray[np.float64]) -> Any:
    """Mean grey level of each image, or of the only one."""
    return vectors_ND.mean(axis=-1) * np.sqrt(vectors_ND.shape[-1])


def shared_digests(records: Sequence[ImageRecord], found: Mapping[str, Inspection]) -> dict[str, str]:
    """A digest for each training sample of one class, by its id: copies have the same, others their own.

    All samples must be complete.
    """
    samples = by_sample(record for record in records if record.split == TRAIN)
    own, distinct = _contents(samples, found)
    shared = _shared(list(distinct), _vectors(distinct.values(), found)) if len(distinct) > 1 else {}
    return {sample_id: shared.get(digest, digest) for sample_id, digest in own.items()}


def _contents(
    samples: Mapping[str, Sequence[ImageRecord]], found: Mapping[str, Inspection]
) -> tuple[dict[str, str], dict[str, Sequence[ImageRecord]]]:
    """The digest of each sample, and each digest's images once.

    Copies of the same bytes need no comparison. They would make it slow, and the typical distance 0.
    """
    own = {sample_id: "".join(found[image.path].sha256 for image in images) for sample_id, images in samples.items()}
    return own, {own[sample_id]: images for sample_id, images in samples.items()}


def _shared(digests: Sequence[str], vectors_NVD: NDArray[np.float64]) -> dict[str, str]:
    """The least digest of each one's near-duplicates, so that the order of the files does not matter."""
    rows, columns, limits_NV = [], [], _limits(vectors_NVD)
    for vectors_ND, limits_N in zip(vectors_NVD.swapaxes(0, 1), limits_NV.T, strict=True):
        # With any larger radius, where a fixed camera sees parts that are all alike, each is a neighbour of each.
        search = NearestNeighbors(radius=float(limits_N.max()), algorithm="brute").fit(vectors_ND)
        distances, neighbours = search.radius_neighbors(vectors_ND)
        for index, limits_V in enumerate(limits_NV):
            near = neighbours[index][distances[index] < limits_N[index]]
            copies = near[_are_copies(vectors_NVD[index], vectors_NVD[near], limits_V)]
            rows.append(np.full(len(copies), index))
            columns.append(copies)
    pairs = np.concatenate(rows), np.concatenate(columns)
    graph = coo_array((np.ones(len(pairs[0])), pairs), shape=(len(digests),) * 2)
    _, group_N = connected_components(graph, directed=False)
    least: dict[int, str] = {}
    for group, digest in zip(group_N.tolist(), digests, strict=True):
        least[group] = min(digest, least.get(group, digest))
    return {digest: least[group] for group, digest in zip(group_N.tolist(), digests, strict=True)}


def _kept(images: Sequence[ImageRecord], keep: Collection[str]) -> bool:
    return any(image.path in keep for image in images)


def _vectors(samples: Collection[Sequence[ImageRecord]], found: Mapping[str, Inspection]) -> NDArray[np.float64]:
    """Thumbnails [N, V, D], scaled so that their Euclidean distance is the root mean square in grey levels."""
    thumbnails = [np.asarray(found[image.path].thumbnail_HW, np.float64) for images in samples for image in images]
    vectors_NVD = np.stack(thumbnails).reshape(len(samples), -1, thumbnails[0].size)
    return vectors_NVD / np.sqrt(vectors_NVD.shape[-1])


def _limits(vectors_NVD: NDArray[np.float64]) -> NDArray[np.float64]:
    """The distance [N, V] below which another image is a copy, for each view of the training samples of a class."""
    samples, views, pixels = vectors_NVD.shape
    typical_V = np.full(views, np.inf)
    if samples > NEIGHBOURS:
        for view in range(views):
            search = NearestNeighbors(n_neighbors=NEIGHBOURS, algorithm="brute").fit(vectors_NVD[:, view])
            # Rounded, for the distance of equal images is an error of rounding, and no measure.
            typical_V[view] = np.round(np.median(search.kneighbors()[0][:, -1]), 3)
    contrast_NV = vectors_NVD.std(axis=2) * np.sqrt(pixels)
    return np.minimum(np.minimum(LIMIT, TYPICAL_FRACTION * typical_V), CONTRAST_FRACTION * contrast_NV)
