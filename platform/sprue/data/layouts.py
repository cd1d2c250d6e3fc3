"""Layouts: what a dataset's folder convention says about each picture.

A layout lists files and reads none of them; digests, damage and splits are the manifest's.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Protocol

from upath import UPath

from sprue.data.splits import TEST, TRAIN
from sprue.errors import SprueError

GOOD = "good"

# Class names become URLs, names of registered models and folders.
_CLASS_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


@dataclass(frozen=True)
class PictureRecord:
    """What a layout knows of one picture.

    Args:
        class_name: The product class.
        split: ``train`` or ``test``; the manifest divides the former further.
        defect_type: ``good`` or the name of the defect.
        sample_id: The part that the picture shows; views of one part share it. Unique in the dataset.
        view: Name of the view, empty where samples have one view.
        path: Path relative to the root, with forward slashes.
        mask_path: Path of the ground truth relative to the root, empty if there is none.
    """

    class_name: str
    split: str
    defect_type: str
    sample_id: str
    view: str
    path: str
    mask_path: str


@dataclass(frozen=True, order=True)
class LeftOut:
    """A file that takes no part, and why.

    Args:
        path: Path relative to the root, with forward slashes.
        reason: Ready to be printed behind the path.
    """

    path: str
    reason: str


class Layout(Protocol):
    """Reads one folder convention."""

    def read(self, root: UPath) -> tuple[list[PictureRecord], list[LeftOut]]:
        """Lists the pictures under ``root``.

        Args:
            root: Folder of the dataset, local or remote.

        Returns:
            One record per picture file, and the files that are none of the dataset's pictures.

        Raises:
            SprueError: The folders do not follow the convention.
        """
        ...


class MVTecLayout:
    """The layout of MVTec AD (Bergmann et al., CVPR 2019).

    ``<class>/train/good/*``, ``<class>/test/<defect>/*`` and ``<class>/ground_truth/<defect>/<stem>_mask.png``
    (or ``<stem>.png``); ``test`` and ``ground_truth`` are optional.
    """

    def read(self, root: UPath) -> tuple[list[PictureRecord], list[LeftOut]]:
        """Lists the pictures under ``root``; see `Layout.read`."""
        names = _class_names(root)
        empty = [name for name in names if not _files(root, f"{name}/train/{GOOD}", [])]
        if empty:
            raise SprueError(
                f"No pictures in train/good of class {', '.join(empty)} under {root}: put its good pictures there, or "
                "set manifest.layout to mvtec-views if it holds a folder of views for each sample."
            )
        return _read_classes(root, names, of_views=False)


class MVTecViewsLayout:
    """MVTec AD's layout with a folder of views in the place of each picture.

    ``<class>/train/good/<sample>/<view>.png``, ``<class>/test/<defect>/<sample>/<view>.png`` and
    ``<class>/ground_truth/<defect>/<sample>/<view>_mask.png`` (or ``<view>.png``); ``test`` and ``ground_truth`` are
    optional. A view is called by its file's stem, the same in all samples of a class, and a class's views are in the
    order of their names: where one view sees most, as the one from the top does, give it the first name.

    Not every view shows a sample's defect, and one that does not needs no mask: where a defective sample has a mask
    for any of its views, a view without one shows no defect, and is a good picture. A defective sample without any
    mask has no ground truth, and none of its pictures counts as good or as defective.
    """

    def read(self, root: UPath) -> tuple[list[PictureRecord], list[LeftOut]]:
        """Lists the pictures under ``root``; see `Layout.read`."""
        names = _class_names(root)
        empty = [name for name in names if not _visible_folders(root, f"{name}/train/{GOOD}")]
        if empty:
            raise SprueError(
                f"No samples in train/good of class {', '.join(empty)} under {root}: put a folder of views there for "
                "each, or set manifest.layout to mvtec if it holds the pictures themselves."
            )
        return _read_classes(root, names, of_views=True)


LAYOUTS: dict[str, Layout] = {"mvtec": MVTecLayout(), "mvtec-views": MVTecViewsLayout()}


def _class_names(root: UPath) -> list[str]:
    """Names of the class folders, sorted; raises SprueError unless all of them can be trained on."""
    if not root.is_dir():
        raise SprueError(f"The dataset {root} is not a folder: give a folder that holds <class>/train/good.")
    if (root / "train" / GOOD).is_dir():
        raise SprueError(
            f"The dataset {root} seems to be a class folder itself, as it holds train/good: "
            f"give its parent, {root.parent}."
        )
    names = [name for name in _folders(root) if not name.startswith(".")]
    if not names:
        raise SprueError(f"The dataset {root} holds no class folder: put good pictures into {root}/<class>/train/good.")
    invalid = [repr(name) for name in names if not _CLASS_NAME.fullmatch(name)]
    if invalid:
        raise SprueError(
            f"Class names become URLs and model names: rename {', '.join(invalid)} under {root}, "
            "using letters, digits, '_', '.' and '-', with a letter or digit first."
        )
    untrained = [name for name in names if not (root / name / "train" / GOOD).is_dir()]
    if untrained:
        raise SprueError(
            f"No train/good folder in class {', '.join(untrained)} under {root}: put its good pictures there, or move "
            "the folder out of the dataset if it is no class."
        )
    return names


def _read_classes(root: UPath, names: list[str], of_views: bool) -> tuple[list[PictureRecord], list[LeftOut]]:
    records: list[PictureRecord] = []
    left_out: list[LeftOut] = []
    for class_name in names:
        masks = _masks(root, class_name, of_views, left_out)
        pictures = _read_class(root, class_name, of_views, masks, left_out)
        used = {record.mask_path for record in pictures}
        left_out += [
            LeftOut(path, "ground truth without a test picture of its name")
            for of_stem in masks.values()
            for path in of_stem.values()
            if path not in used
        ]
        records += pictures
    return records, left_out


def _read_class(
    root: UPath, class_name: str, of_views: bool, masks: dict[str, dict[str, str]], left_out: list[LeftOut]
) -> list[PictureRecord]:
    records = []
    for split, defect_type in [(TRAIN, GOOD)] + [
        (TEST, defect) for defect in _visible_folders(root, f"{class_name}/test")
    ]:
        for group in _groups(root, f"{class_name}/{split}", defect_type, of_views, left_out):
            folder = f"{class_name}/{split}/{group}"
            for stem, path in _by_stem(root, folder, of_views, "view", left_out):
                mask_path = _mask_of(path, masks.get(group, {})) if split == TEST else ""
                sample_id, view = (folder, stem) if of_views else (path, "")
                records.append(PictureRecord(class_name, split, defect_type, sample_id, view, path, mask_path))
    left_out += [
        LeftOut(f"{class_name}/train/{folder}", "not read: only train/good is trained on")
        for folder in _folders(root / class_name / "train")
        if folder != GOOD
    ]
    return records


def _masks(root: UPath, class_name: str, of_views: bool, left_out: list[LeftOut]) -> dict[str, dict[str, str]]:
    """Path of each mask by the folder of its picture below ``test``, and its own stem."""
    parent = f"{class_name}/ground_truth"
    return {
        group: dict(_by_stem(root, f"{parent}/{group}", True, "mask", left_out))
        for defect_type in _visible_folders(root, parent)
        for group in _groups(root, parent, defect_type, of_views, left_out)
    }


def _groups(root: UPath, parent: str, defect_type: str, of_views: bool, left_out: list[LeftOut]) -> list[str]:
    """The folders of one defect type that hold files, relative to ``parent``: itself, or one for each sample."""
    if not of_views:
        return [defect_type]
    groups = []
    for child in _children(root / parent / defect_type):
        if child.is_dir() and not child.name.startswith("."):
            groups.append(f"{defect_type}/{child.name}")
        else:
            reason = "hidden" if child.name.startswith(".") else "a file among the samples' folders"
            left_out.append(LeftOut(_printable(f"{parent}/{defect_type}/{child.name}"), reason))
    return groups


def _by_stem(root: UPath, folder: str, unique: bool, what: str, left_out: list[LeftOut]) -> Iterator[tuple[str, str]]:
    """Stem and path of a folder's files; where stems are to be unique, the second of one goes to ``left_out``."""
    first_of: dict[str, str] = {}
    for path in _files(root, folder, left_out):
        first = first_of.setdefault(_stem(path), path)
        if unique and first != path:
            left_out.append(LeftOut(path, f"{first} is the {what} of this name already"))
        else:
            yield _stem(path), path


def _mask_of(path: str, mask_of_stem: dict[str, str]) -> str:
    stem = _stem(path)
    return mask_of_stem.get(f"{stem}_mask") or mask_of_stem.get(stem, "")


def _files(root: UPath, folder: str, left_out: list[LeftOut]) -> list[str]:
    """Files of a folder, sorted; hidden files and folders in it go to ``left_out``."""
    files = []
    for child in _children(root / folder):
        path = f"{folder}/{child.name}"
        printable = _printable(path)
        if child.name.startswith("."):
            left_out.append(LeftOut(path, "hidden"))
        elif child.is_dir():
            left_out.append(LeftOut(path, "a folder among the pictures"))
        elif path != printable:
            left_out.append(LeftOut(printable, "its name is not UTF-8"))
        else:
            files.append(path)
    return files


def _visible_folders(root: UPath, folder: str) -> list[str]:
    return [name for name in _folders(root / folder) if not name.startswith(".")]


def _folders(parent: UPath) -> list[str]:
    return [child.name for child in _children(parent) if child.is_dir()]


def _children(folder: UPath) -> list[UPath]:
    return sorted(folder.iterdir(), key=lambda child: child.name) if folder.is_dir() else []


def _printable(path: str) -> str:
    return path.encode(errors="backslashreplace").decode()


def _stem(path: str) -> str:
    return PurePosixPath(path).stem
