"""Layouts: folder conventions that say each image's class, split, defect, sample and view.

A layout lists files without reading them.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import ClassVar

from upath import UPath

from sprue.config import LayoutName
from sprue.data.splits import TEST, TRAIN
from sprue.errors import SprueError

GOOD = "good"
"""The defect type of images without a defect."""

COPY = "a copy of the test image"
"""How the reason of a skipped copy begins."""

_CLASS_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


@dataclass(frozen=True)
class ImageRecord:
    """One image, as its path describes it.

    Attributes:
        class_name: The product class.
        split: ``train`` or ``test``; the manifest divides the training images further.
        defect_type: ``good`` or the name of the defect.
        sample_id: The sample that the image belongs to; its views share it. Unique in the dataset.
        view: Name of the view, empty where samples have one view.
        path: Path relative to the root, with forward slashes.
        mask_path: Path of the ground truth, likewise; empty if there is none.
    """

    class_name: str
    split: str
    defect_type: str
    sample_id: str
    view: str
    path: str
    mask_path: str


@dataclass(frozen=True, order=True)
class SkippedFile:
    """A file, or a sample's folder, that the manifest excludes, by its path relative to the root; and why."""

    path: str
    reason: str


class MVTecLayout:
    """The layout of MVTec AD (Bergmann et al., CVPR 2019).

    ``<class>/train/good/*``, ``<class>/test/<defect>/*`` and ``<class>/ground_truth/<defect>/<stem>_mask.png``
    (or ``<stem>.png``); ``test`` and ``ground_truth`` are optional.
    """

    of_views: ClassVar[bool] = False
    advice: ClassVar[str] = (
        "put its good images there, or set manifest.layout to mvtec-views if it holds a folder of views for each sample"
    )

    def read(self, root: UPath) -> tuple[list[ImageRecord], list[SkippedFile]]:
        """A record for each image file under a root, local or remote, and the skipped files.

        Raises:
            SprueError: If the folders do not follow the convention, or no class has good training images.
        """
        names, empty = _class_names(root), self.empty_classes(root)
        if len(empty) == len(names):
            what = "samples" if self.of_views else "images"
            raise SprueError(f"no {what} in train/good of class {', '.join(empty)} under {root}: {self.advice}")
        names = [name for name in names if name not in empty]
        return _read_classes(root, names, self.of_views)

    def empty_classes(self, root: UPath) -> dict[str, str]:
        """For each class without any file in its folder of good training images: what to do; `read` leaves it out.

        Raises:
            SprueError: If the folders do not follow the convention.
        """
        samples, what = (_visible_folders, "samples") if self.of_views else (_files, "images")
        return {
            name: f"class {name!r} has no {what} in {name}/train/{GOOD}: {self.advice}"
            for name in _class_names(root)
            if not samples(root, f"{name}/train/{GOOD}")
        }


class MVTecViewsLayout(MVTecLayout):
    """MVTec AD's layout with a folder of views instead of each image.

    ``<class>/train/good/<sample>/<view>.png``, ``<class>/test/<defect>/<sample>/<view>.png`` and
    ``<class>/ground_truth/<defect>/<sample>/<view>_mask.png`` (or ``<view>.png``); ``test`` and ``ground_truth`` are
    optional. A view's name is its file's stem, the same in all samples of a class. A class's views are sorted by name;
    give the view that sees most, such as the one from the top, the first name.

    A view that does not show its sample's defect needs no mask: if any view of a defective sample has a mask, the
    views without one are good images. A defective sample without any mask has no ground truth: its images count
    neither as good nor as defective.
    """

    of_views = True
    advice = "put a folder of views there for each, or set manifest.layout to mvtec if it holds the images themselves"


LAYOUTS: dict[LayoutName, MVTecLayout] = {"mvtec": MVTecLayout(), "mvtec-views": MVTecViewsLayout()}


def _class_names(root: UPath) -> list[str]:
    """Names of the class folders, sorted; raises SprueError if one can't be trained on."""
    if not root.is_dir():
        raise SprueError(f"the dataset {root} is not a folder: give a folder that holds <class>/train/good")
    if (root / "train" / GOOD).is_dir():
        raise SprueError(
            f"the dataset {root} seems to be a class folder itself, as it holds train/good: "
            f"give its parent, {root.parent}"
        )
    names = [name for name in _folders(root) if not name.startswith(".")]
    if not names:
        raise SprueError(f"the dataset {root} holds no class folder: put good images into {root}/<class>/train/good")
    invalid = [repr(name) for name in names if not _CLASS_NAME.fullmatch(name)]
    if invalid:
        raise SprueError(
            f"class names become URLs and model names: rename {', '.join(invalid)} under {root}, "
            "using letters, digits, '_' and '-', with a letter or digit first"
        )
    untrained = [name for name in names if not (root / name / "train" / GOOD).is_dir()]
    if untrained:
        raise SprueError(
            f"no train/good folder in class {', '.join(untrained)} under {root}: put its good images there, or move "
            "the folder out of the dataset if it is no class"
        )
    return names


def _read_classes(root: UPath, names: list[str], of_views: bool) -> tuple[list[ImageRecord], list[SkippedFile]]:
    records: list[ImageRecord] = []
    skipped: list[SkippedFile] = []
    for class_name in names:
        masks = _masks(root, class_name, of_views, skipped)
        images = _read_class(root, class_name, of_views, masks, skipped)
        used = {record.mask_path for record in images}
        skipped += [
            SkippedFile(path, "ground truth without a test image of its name")
            for of_stem in masks.values()
            for path in of_stem.values()
            if path not in used
        ]
        records += images
    return records, skipped


def _read_class(
    root: UPath, class_name: str, of_views: bool, masks: dict[str, dict[str, str]], skipped: list[SkippedFile]
) -> list[ImageRecord]:
    records = []
    defect_types = [(TEST, defect_type) for defect_type in _visible_folders(root, f"{class_name}/test")]
    for split, defect_type in [(TRAIN, GOOD), *defect_types]:
        for group in _groups(root, f"{class_name}/{split}", defect_type, of_views, skipped):
            folder = f"{class_name}/{split}/{group}"
            of_stem = masks.get(group, {}) if split == TEST else {}
            for stem, path in _by_stem(root, folder, of_views, "view", skipped):
                mask_path = of_stem.get(f"{stem}_mask") or of_stem.get(stem, "")
                sample_id, view = (folder, stem) if of_views else (path, "")
                records.append(ImageRecord(class_name, split, defect_type, sample_id, view, path, mask_path))
    skipped += [
        SkippedFile(f"{class_name}/train/{folder}", "not read: only train/good is trained on")
        for folder in _folders(root / class_name / "train")
        if folder != GOOD
    ]
    return records


def _masks(root: UPath, class_name: str, of_views: bool, skipped: list[SkippedFile]) -> dict[str, dict[str, str]]:
    """Paths of the masks, by their images' folder below ``test`` and their own stem."""
    parent = f"{class_name}/ground_truth"
    return {
        group: dict(_by_stem(root, f"{parent}/{group}", True, "mask", skipped))
        for defect_type in _visible_folders(root, parent)
        for group in _groups(root, parent, defect_type, of_views, skipped)
    }


def _groups(root: UPath, parent: str, defect_type: str, of_views: bool, skipped: list[SkippedFile]) -> list[str]:
    """The folders of one defect type that hold files, relative to ``parent``: its own, or one for each sample."""
    if not of_views:
        return [defect_type]
    groups = []
    for name, is_folder in _children(root / parent / defect_type):
        if is_folder and not name.startswith("."):
            groups.append(f"{defect_type}/{name}")
        else:
            reason = "hidden" if name.startswith(".") else "a file among the samples' folders"
            skipped.append(SkippedFile(_printable(f"{parent}/{defect_type}/{name}"), reason))
    return groups


def _by_stem(
    root: UPath, folder: str, unique: bool, what: str, skipped: list[SkippedFile]
) -> Iterator[tuple[str, str]]:
    """Stem and path of a folder's files; if stems must be unique, further files of a stem go to ``skipped``."""
    first_of: dict[str, str] = {}
    for path in _files(root, folder, skipped):
        stem = PurePosixPath(path).stem
        first = first_of.setdefault(stem, path)
        if unique and first != path:
            skipped.append(SkippedFile(path, f"{first} is already the {what} of this name"))
        else:
            yield stem, path


def _files(root: UPath, folder: str, skipped: list[SkippedFile] | None = None) -> list[str]:
    """Files of a folder, sorted; hidden files and folders in it go to ``skipped``."""
    files = []
    skipped = [] if skipped is None else skipped
    for name, is_folder in _children(root / folder):
        path = f"{folder}/{name}"
        printable = _printable(path)
        if name.startswith("."):
            skipped.append(SkippedFile(path, "hidden"))
        elif is_folder:
            skipped.append(SkippedFile(path, "a folder among the images"))
        elif path != printable:
            skipped.append(SkippedFile(printable, "its name is not UTF-8"))
        else:
            files.append(path)
    return files


def _visible_folders(root: UPath, folder: str) -> list[str]:
    return [name for name in _folders(root / folder) if not name.startswith(".")]


def _folders(parent: UPath) -> list[str]:
    return [name for name, is_folder in _children(parent) if is_folder]


def _children(folder: UPath) -> list[tuple[str, bool]]:
    """Names in a folder, sorted, and whether each is a folder; of one listing, as each question is a request to S3."""
    if not folder.is_dir():
        return []
    types = {
        entry["name"].rstrip("/").rpartition("/")[2]: entry["type"]
        for entry in folder.fs.ls(folder.path, detail=True)
        if entry["name"].strip("/") != folder.path.strip("/")  # an object store may list the folder itself
    }
    # Where a link leads to, the listing does not say.
    return [
        (name, types[name] == "directory" or (types[name] != "file" and (folder / name).is_dir()))
        for name in sorted(types)
    ]


def _printable(path: str) -> str:
    return path.encode(errors="backslashreplace").decode()
