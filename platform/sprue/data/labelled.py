"""Labelled samples from a folder that a user names: good ones, and those of each defect."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from sprue.data.layouts import GOOD
from sprue.data.synthetic import KINDS, synthesize_defect
from sprue.errors import SprueError
from sprue.inference.images import open_image


@dataclass(frozen=True)
class LabelledSample:
    """A sample's images and label.

    Attributes:
        paths: A file for each view.
        images: The images, RGB.
        defect_type: ``good``, or the defect's name.
        group: Number of the sample among those that were read; its variants share it.
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
    """Reads ``good/*`` and ``<defect>/*``: an image for each sample, or a folder of ``<view>.*`` for several views.

    Raises:
        SprueError: If there are no good samples, a view is missing, or an image can't be read.
    """
    if not (folder / GOOD).is_dir():
        raise SprueError(f"{folder} has no folder {GOOD}; put good images there, and those of each defect beside it")
    found = [
        (sample, kind.name)
        for kind in sorted(folder.iterdir())
        if kind.is_dir() and not kind.name.startswith(".")
        for sample in sorted(kind.iterdir())
        if not sample.name.startswith(".")
    ]
    samples = [LabelledSample(*read_sample(sample, views), kind, number) for number, (sample, kind) in enumerate(found)]
    if not any(sample.defect_type == GOOD for sample in samples):
        raise SprueError(f"{folder / GOOD} is empty: at least one good image is needed")
    return samples


def with_synthetic_defects(good: list[LabelledSample]) -> list[LabelledSample]:
    """The good samples, then each of them with a synthetic defect of each kind, on its views in turn; deterministic."""
    defective = []
    for sample in good:
        for index, kind in enumerate(KINDS):
            view = (sample.group + index) % len(sample.images)
            rng = np.random.default_rng([sample.group, index])
            altered = Image.fromarray(synthesize_defect(np.asarray(sample.images[view]), kind, rng)[0])
            images = (*sample.images[:view], altered, *sample.images[view + 1 :])
            defective.append(LabelledSample(sample.paths, images, f"synthetic {kind}", sample.group))
    return good + defective


def read_sample(sample: Path, views: tuple[str, ...]) -> tuple[tuple[Path, ...], tuple[Image.Image, ...]]:
    """The files and images of a sample: an image file, or a folder of ``<view>.*`` for several views.

    Raises:
        SprueError: If a view is missing or an image can't be read.
    """
    if len(views) == 1:
        if sample.is_dir():
            raise SprueError(f"{sample} is a folder: the class's samples have one image each")
        paths: tuple[Path, ...] = (sample,)
    else:
        found = {path.stem: path for path in sample.iterdir()} if sample.is_dir() else {}
        missing = [view for view in views if view not in found]
        if missing:
            raise SprueError(f"{sample} has no image of view {', '.join(missing)}")
        paths = tuple(found[view] for view in views)
    try:
        return paths, tuple(open_image(path.read_bytes(), str(path)) for path in paths)
    except OSError as error:
        raise SprueError(f"{error.filename} can't be read: {error.strerror}") from error
