"""Synthetic defects on the good validation images: they judge flows, and weigh members, where no real defect is known.

They are made once, their features are extracted once, and all fits of a class read the same.

Shapes: N synthetic samples, S side of the backbone's input, C channels, H rows, W columns of a map.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image
from upath import UPath

from sprue.data import region_defects, synthetic
from sprue.data.region_defects import REGION_KINDS, alter_region
from sprue.data.samples import Sample, samples_of
from sprue.data.synthetic import KINDS, synthesize_defect
from sprue.errors import SprueError
from sprue.features.tables import FeatureTable, write_part
from sprue.inference.detector import BATCH
from sprue.inference.engines import build_engine
from sprue.inference.images import model_input, open_image
from sprue.inference.spec import FeatureSpec

SYNTHETIC_VERSION = f"{synthetic.VERSION}.{region_defects.VERSION}.1"
"""Changes when the defects of the same samples change."""

ALL_KINDS = (*KINDS, *REGION_KINDS)

OF_EACH_KIND = 8
"""Defects of each kind; an AUROC over all kinds is then known to about two points."""


@dataclass(frozen=True)
class SyntheticDefect:
    """A synthetic defect on one view of a sample.

    Attributes:
        number: From 0; defects of other numbers differ in everything that is random.
        kind: Of the defect.
        sample: The sample's index.
        view: The view's index.
        image: Digest of the view's image.
        foreign: Digest of the image that some kinds take a piece of.
    """

    number: int
    kind: str
    sample: int
    view: int
    image: str
    foreign: str

    @property
    def digest(self) -> str:
        """Names the altered image in its feature table."""
        return hashlib.sha256(f"{self.number}: {self.kind} on {self.image} with {self.foreign}".encode()).hexdigest()

    def apply(self, image_HWC: NDArray[np.uint8], foreign_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The image with the defect, always the same."""
        rng = np.random.default_rng(int(self.digest, 16))
        if self.kind in REGION_KINDS:
            return alter_region(image_HWC, self.kind, rng, foreign_HWC)[0]
        return synthesize_defect(image_HWC, self.kind, rng)[0]


def plan_defects(samples: Sequence[Sample]) -> list[SyntheticDefect]:
    """`OF_EACH_KIND` defects of each kind, on the samples and their views in turn.

    >>> plan = plan_defects([("a0", "a1"), ("b0", "b1")])
    >>> [(defect.sample, defect.view, defect.kind, defect.foreign) for defect in plan[:3]]
    [(0, 0, 'scratch', 'b0'), (1, 1, 'stain', 'a1'), (0, 0, 'hole', 'b0')]
    """
    planned = []
    for number in range(OF_EACH_KIND * len(ALL_KINDS)):
        cycle, kind = divmod(number, len(ALL_KINDS))
        # Shifted with each cycle, so that a sample meets all kinds even where the numbers of both have a common factor.
        sample, view = (number + cycle) % len(samples), number % len(samples[0])
        image, foreign = samples[sample][view], samples[(sample + 1) % len(samples)][view]
        planned.append(SyntheticDefect(number, ALL_KINDS[kind], sample, view, image, foreign))
    return planned


def synthetic_folder(dataset: UPath, class_name: str, spec: FeatureSpec) -> UPath:
    """Folder of the feature table of a class's synthetic defects, in the dataset's part of the store."""
    return dataset / "search" / class_name / "synthetic" / f"{spec.fingerprint}-{SYNTHETIC_VERSION}"


def has_synthetic(altered: FeatureTable, samples: Sequence[Sample]) -> bool:
    """Whether a table of altered images has all synthetic defects of a class's validation samples."""
    return all(defect.digest in altered for defect in plan_defects(samples))


def extract_synthetic(
    spec: FeatureSpec, rows: pd.DataFrame, root: UPath, folder: UPath, threads: int | None = None
) -> int:
    """Makes the synthetic defects of a class's validation images; extracts the features of those that have none.

    `root` is the dataset's folder, `folder` that of the altered images' feature table. Returns the number of defects.

    Raises:
        SprueError: If an image can't be read or is too small for a defect, or the backbone can't be loaded.
    """
    planned = plan_defects(samples_of(rows))
    table = FeatureTable(folder)
    missing = [defect for defect in planned if defect.digest not in table]
    paths = dict(zip(rows["sha256"], rows["path"], strict=True))
    if missing:
        engine = build_engine(spec, threads=threads)
        for start in range(0, len(missing), BATCH):
            batch = missing[start : start + BATCH]
            inputs_BSS3 = np.stack([_input(defect, root, paths, spec.input_size) for defect in batch])
            write_part(folder, [defect.digest for defect in batch], engine(inputs_BSS3))
    return len(planned)


def _input(defect: SyntheticDefect, root: UPath, paths: Mapping[str, str], side: int) -> NDArray[np.uint8]:
    image_HWC, foreign_HWC = (_pixels(root / paths[digest], digest) for digest in (defect.image, defect.foreign))
    try:
        altered_HWC = defect.apply(image_HWC, foreign_HWC)
    except SprueError as error:
        raise SprueError(f"{root / paths[defect.image]}: {error}") from error
    return model_input(Image.fromarray(altered_HWC), side)


def _pixels(path: UPath, digest: str) -> NDArray[np.uint8]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SprueError(f"{path} can't be read: {error}") from error
    if hashlib.sha256(data).hexdigest() != digest:
        raise SprueError(f"{path} has changed since the manifest was written; run the manifest stage again")
    return np.asarray(open_image(data, str(path)))


def synthetic_maps(
    table: FeatureTable, altered: FeatureTable, samples: Sequence[Sample], indices: Sequence[int]
) -> list[NDArray[np.float16]]:
    """The maps [N, C, H, W] of samples with a synthetic defect; see `FeatureTable.read_samples` for their order.

    The maps of altered images are in the table `altered`, all others in `table`.

    Raises:
        SprueError: If an altered image is not in its table.
    """
    planned = plan_defects(samples)
    views = len(samples[0])
    maps = table.read_samples([samples[defect.sample] for defect in planned], views, indices)
    altered_maps = altered.read([defect.digest for defect in planned], indices)
    view_N = np.array([defect.view for defect in planned])
    for view in range(views):
        for index in indices:
            rows = view_N == view
            maps[view * len(altered_maps) + index][rows] = altered_maps[index][rows]
    return maps
