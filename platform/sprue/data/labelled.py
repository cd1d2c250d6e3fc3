"""Labelled pictures that a person names: a folder of good samples, and one for each defect."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from sprue.data.defects import KINDS, draw_defect
from sprue.data.layouts import GOOD
from sprue.errors import SprueError
from sprue.inference.images import open_image


@dataclass(frozen=True)
class LabelledSample:
    """A sample's pictures, and what is known of it.

    Attributes:
        paths: A file for each view.
        images: The pictures, RGB.
        defect_type: ``good``, or the defect's name.
        group: Its number among the samples that were read; variants of one have the same.
    """

    paths: tuple[Path, ...]
    images: tuple[Image.Image, ...]
    defect_type: str
    group: int

    @property
    def label(self) -> int:
        """1 for a defective sample."""
        return int(self.defect_type != GOOD)


def read_labelled(folder: Path, views: tuple[str, ...]) -> list[LabelledSample]:
    """Reads ``good/*`` and ``<defect>/*``: a picture for each sample, or a folder of ``<view>.*`` for several views.

    Args:
        folder: Holds ``good``, and a folder for each defect.
        views: Names of the views; one without a name for samples of one picture.

    Raises:
        SprueError: If there are no good samples, a view is missing, or a picture can't be read.
    """
    if not (folder / GOOD).is_dir():
        raise SprueError(f"{folder} has no folder {GOOD}: put good pictures there, and those of each defect beside it")
    found = [
        (sample, kind.name)
        for kind in sorted(folder.iterdir())
        if kind.is_dir() and not kind.name.startswith(".")
        for sample in sorted(kind.iterdir())
        if not sample.name.startswith(".")
    ]
    samples = [_read(sample, views, kind, number) for number, (sample, kind) in enumerate(found)]
    if not any(sample.defect_type == GOOD for sample in samples):
        raise SprueError(f"{folder / GOOD} is empty: at least one good picture is needed")
    return samples


def with_drawn_defects(good: list[LabelledSample]) -> list[LabelledSample]:
    """The good samples, and each of them with a drawn defect of each kind, on its views in turn; always the same."""
    drawn = []
    for sample in good:
        for place, kind in enumerate(KINDS):
            view = (sample.group + place) % len(sample.images)
            rng = np.random.default_rng([sample.group, place])
            altered = Image.fromarray(draw_defect(np.asarray(sample.images[view]), kind, rng)[0])
            images = (*sample.images[:view], altered, *sample.images[view + 1 :])
            drawn.append(LabelledSample(sample.paths, images, f"drawn {kind}", sample.group))
    return good + drawn


def _read(sample: Path, views: tuple[str, ...], defect_type: str, group: int) -> LabelledSample:
    if len(views) == 1:
        if not sample.is_file():
            raise SprueError(f"{sample} is a folder: the class's samples have one picture each")
        paths: tuple[Path, ...] = (sample,)
    else:
        found = {path.stem: path for path in sample.iterdir()} if sample.is_dir() else {}
        missing = [view for view in views if view not in found]
        if missing:
            raise SprueError(f"{sample} has no picture of view {', '.join(missing)}")
        paths = tuple(found[view] for view in views)
    try:
        images = tuple(open_image(path.read_bytes(), str(path)) for path in paths)
    except OSError as error:
        raise SprueError(f"{error.filename} can't be read: {error.strerror}") from error
    return LabelledSample(paths, images, defect_type, group)
