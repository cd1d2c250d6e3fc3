"""Drawn defects on the good validation pictures: what a search judges flows by, for it knows no real defect.

They are drawn once, their features are extracted once, and every trial reads the same.

Shapes: N drawn samples, S side of the backbone's input, C channels, H rows, W columns of a map.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image
from upath import UPath

from sprue.data import defects
from sprue.data.defects import KINDS, draw_defect
from sprue.data.samples import Sample, samples_of
from sprue.errors import SprueError
from sprue.features.tables import FeatureTable, write_part
from sprue.inference.detector import BATCH
from sprue.inference.engines import build_engine
from sprue.inference.images import model_input, open_image
from sprue.inference.spec import FeatureSpec


@cache
def code_digest() -> str:
    """8 hexadecimal digits that name how defects are drawn and where."""
    sha = hashlib.sha256()
    for path in (Path(defects.__file__), Path(__file__)):
        sha.update(path.read_bytes())
    return sha.hexdigest()[:8]


@dataclass(frozen=True)
class DrawnDefect:
    """A defect that is drawn on one view of a sample.

    Attributes:
        sample: The sample's place.
        view: The view's place.
        kind: What is drawn.
        picture: Digest of the view's picture.
    """

    sample: int
    view: int
    kind: str
    picture: str

    @property
    def digest(self) -> str:
        """Names the drawn picture in its feature table."""
        return hashlib.sha256(f"drawn {self.kind} on {self.picture}".encode()).hexdigest()

    def draw(self, image_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The picture with the defect, always the same."""
        rng = np.random.default_rng(int(self.digest, 16))
        return draw_defect(image_HWC, self.kind, rng)[0]


def plan_defects(samples: Sequence[Sample]) -> list[DrawnDefect]:
    """One defect of each kind for each sample, on its views in turn.

    >>> [(defect.sample, defect.view, defect.kind) for defect in plan_defects([("a", "b")])]
    [(0, 0, 'scratch'), (0, 1, 'stain'), (0, 0, 'hole'), (0, 1, 'patch')]
    """
    return [
        DrawnDefect(number, (number + place) % len(sample), kind, sample[(number + place) % len(sample)])
        for number, sample in enumerate(samples)
        for place, kind in enumerate(KINDS)
    ]


def extract_drawn(spec: FeatureSpec, rows: pd.DataFrame, root: UPath, folder: UPath, threads: int | None = None) -> int:
    """Draws the defects of one class's validation pictures and stores their features, those that are not there yet.

    Args:
        spec: The resolved feature spec.
        rows: The manifest's rows of the class's validation pictures.
        root: The dataset's folder.
        folder: Of the drawn pictures' feature table.
        threads: CPU threads of the engine; all cores if None.

    Returns:
        How many drawn pictures there are.

    Raises:
        SprueError: If a picture can't be read or has no room for a defect, or the backbone can't be loaded.
    """
    planned = plan_defects(samples_of(rows))
    table = FeatureTable(folder)
    missing = [defect for defect in planned if defect.digest not in table]
    paths = dict(zip(rows["sha256"], rows["path"], strict=True))
    if missing:
        engine = build_engine(spec, threads=threads)
        for start in range(0, len(missing), BATCH):
            batch = missing[start : start + BATCH]
            inputs_BSS3 = np.stack([_input(defect, root / paths[defect.picture], spec.input_size) for defect in batch])
            write_part(folder, [defect.digest for defect in batch], engine(inputs_BSS3))
    return len(planned)


def _input(defect: DrawnDefect, path: UPath, side: int) -> NDArray[np.uint8]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SprueError(f"{path} can't be read: {error}") from error
    drawn_HWC = defect.draw(np.asarray(open_image(data, str(path))))
    return model_input(Image.fromarray(drawn_HWC), side)


def drawn_maps(
    table: FeatureTable, drawn: FeatureTable, samples: Sequence[Sample], places: Sequence[int]
) -> list[NDArray[np.float16]]:
    """The maps [N, C, H, W] of samples with a drawn defect, as a flow reads samples; see `FeatureTable.read_samples`.

    Args:
        table: The class's features.
        drawn: Those of its drawn pictures.
        samples: The validation samples.
        places: Which of a picture's maps the flow reads.

    Raises:
        SprueError: If a drawn picture is not in its table.
    """
    planned = plan_defects(samples)
    views = len(samples[0])
    maps = table.read_samples([samples[defect.sample] for defect in planned], views, places)
    altered = drawn.read([defect.digest for defect in planned], places)
    view_N = np.array([defect.view for defect in planned])
    for view in range(views):
        for place in places:
            rows = view_N == view
            maps[view * len(altered) + place][rows] = altered[place][rows]
    return maps
