"""Labelled samples from a folder that a user names: good ones, and those of each defect."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from sprue.data.layouts import GOOD
from sprue.data.synthetic import KINDS, synthesize_defect
from sprue.errors import SprueError
from sprue.inference.images import open_image


@dataclass(frozen=True)
class LabelledSample:
    """A sample's files and label; a folder's images need not be in memory at once.

    Attributes:
        paths: A file for each view.
        defect_type: ``good``, or the defect's name.
        group: Number of the sample among those that were read; its variants share it.
        synthetic: Number of the kind of the synthetic defect that is put on a view; None without one.
    """

    paths: tuple[Path, ...]
    defect_type: str
    group: int
    synthetic: int | None = None

    @property
    def label(self) -> int:
        """1 for a defective sample."""
        return int(self.defect_type != GOOD)

    def read(self) -> tuple[Image.Image, ...]:
        """The image of each view, RGB, the same each time.

        Raises:
            SprueError: If an image can't be read.
        """
        images = list(_open(self.paths))
        if self.synthetic is not None:
            view = (self.group + self.synthetic) % len(images)
            rng = np.random.default_rng([self.group, self.synthetic])
            altered_HWC, _ = synthesize_defect(np.asarray(images[view]), KINDS[self.synthetic], rng)
            images[view] = Image.fromarray(altered_HWC)
        return tuple(images)


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
    samples = [LabelledSample(_files(sample, views), kind, number) for number, (sample, kind) in enumerate(found)]
    if not any(sample.defect_type == GOOD for sample in samples):
        raise SprueError(f"{folder / GOOD} is empty: at least one good image is needed")
    for sample in samples:
        sample.read()  # a damaged file is named before any is scored
    return samples


def with_synthetic_defects(good: list[LabelledSample]) -> list[LabelledSample]:
    """The good samples, then each of them with a synthetic defect of each kind, on its views in turn; deterministic."""
    return good + [
        replace(sample, defect_type=f"synthetic {kind}", synthetic=number)
        for sample in good
        for number, kind in enumerate(KINDS)
    ]


def read_sample(sample: Path, views: tuple[str, ...]) -> tuple[Image.Image, ...]:
    """The images of a sample: an image file, or a folder of ``<view>.*`` for several views.

    Raises:
        SprueError: If a view is missing or an image can't be read.
    """
    return _open(_files(sample, views))


def _files(sample: Path, views: tuple[str, ...]) -> tuple[Path, ...]:
    if len(views) == 1:
        if sample.is_dir():
            raise SprueError(f"{sample} is a folder: the class's samples have one image each")
        return (sample,)
    found: dict[str, Path] = {}
    for path in sorted(sample.iterdir()) if sample.is_dir() else ():
        if path.stem in found:
            raise SprueError(f"{path}: {found[path.stem].name} is already the view of this name; delete one of them")
        if not path.name.startswith("."):
            found[path.stem] = path
    missing = [view for view in views if view not in found]
    if missing:
        raise SprueError(f"{sample} has no image of view {', '.join(missing)}")
    return tuple(found[view] for view in views)


def _open(paths: tuple[Path, ...]) -> tuple[Image.Image, ...]:
    try:
        return tuple(open_image(path.read_bytes(), str(path)) for path in paths)
    except OSError as error:
        raise SprueError(f"{error.filename} can't be read: {error.strerror}") from error
