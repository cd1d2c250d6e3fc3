"""The samples of a folder or s3 URL: its images, listed without reading them.

Where a class's samples have one image, every image below the folder is a sample. Where they have several, every folder
below it that holds images is one, with a file ``<view>.*`` for each view, as in `sprue.data.layouts.MVTecViewsLayout`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from PIL import Image
from upath import UPath

from sprue.data.layouts import SkippedFile
from sprue.errors import SprueError
from sprue.inference.images import FORMATS

SUFFIXES = frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS)
"""Suffixes of image files, in lower case; files with others are skipped."""


@dataclass(frozen=True)
class Sample:
    """A sample that has not been read.

    Attributes:
        name: The path of its image, or of its folder where samples have several; relative to the root.
        paths: A path for each view, likewise; empty for a view that is missing.
        states: The state of each file, which changes with its content: an object's ETag, or a file's size and time.
    """

    name: str
    paths: tuple[str, ...]
    states: tuple[str, ...]


def list_samples(root: UPath, views: tuple[str, ...]) -> tuple[list[Sample], list[SkippedFile]]:
    """The samples below a folder or s3 URL, sorted by name, and the skipped files.

    Args:
        root: The folder, local or remote.
        views: The views of a sample, as `sprue.inference.detector.Detector` has them.

    Raises:
        SprueError: If it is not a folder, or holds no samples.
    """
    if not root.is_dir():
        raise SprueError(f"{root} is not a folder: give one that holds the images to score")
    skipped: list[SkippedFile] = []
    states = dict(_images(root, skipped))
    if len(views) == 1:
        samples = [Sample(path, (path,), (state,)) for path, state in sorted(states.items())]
    else:
        samples = list(_with_views(states, views, skipped))
    if not samples:
        found = f"; skipped: {skipped[0].path} ({skipped[0].reason})" if skipped else ""
        advice = f"with a file for each view in it: {', '.join(views)}" if len(views) > 1 else "of a known suffix"
        what = "a sample's folder" if len(views) > 1 else "an image"
        raise SprueError(f"{root} holds nothing to score: put {what} there, {advice}{found}")
    return samples, sorted(skipped)


def _images(root: UPath, skipped: list[SkippedFile]) -> Iterator[tuple[str, str]]:
    """Path and state of each image file; a remote folder takes one listing."""
    for full_path, info in root.fs.find(root.path, detail=True).items():
        path = full_path.removeprefix(f"{root.path.rstrip('/')}/")
        reason = _objection(path)
        if reason is None and info.get("islink"):
            info = _target(root, full_path)
            reason = "a link to a folder" if info["type"] == "directory" else None
        if reason is None:
            yield path, str(info.get("ETag") or f"{info['size']} {info.get('mtime')}")
        else:
            skipped.append(SkippedFile(path.encode(errors="backslashreplace").decode(), reason))


def _objection(path: str) -> str | None:
    """Why a file is skipped; None if it is an image."""
    segments = path.split("/")
    # Names of objects may be any text, and heat maps are named by them.
    if not {"", ".", ".."}.isdisjoint(segments):
        return "its name is not a path"
    if any(segment.startswith(".") for segment in segments):
        return "hidden"
    if PurePosixPath(path).suffix.lower() not in SUFFIXES:
        return "its suffix is not an image's"
    return None if path == path.encode(errors="replace").decode() else "its name is not UTF-8"


def _target(root: UPath, link: str) -> Mapping[str, Any]:
    """What a link leads to; a broken one is a file that can't be read."""
    try:
        return root.fs.info(link)
    except OSError:
        return {"type": "file", "size": 0}


def _with_views(states: dict[str, str], views: tuple[str, ...], skipped: list[SkippedFile]) -> Iterator[Sample]:
    folders: dict[str, dict[str, str]] = {}
    for path in sorted(states):
        parent, stem = str(PurePosixPath(path).parent), PurePosixPath(path).stem
        of_stem = folders.setdefault(parent, {})
        if parent == ".":
            skipped.append(SkippedFile(path, "not in a sample's folder"))
        elif stem not in views:
            skipped.append(SkippedFile(path, "not a view of the class"))
        elif of_stem.setdefault(stem, path) != path:
            skipped.append(SkippedFile(path, f"{of_stem[stem]} is already the view of this name"))
    for name, of_stem in sorted(folders.items()):
        if name != ".":
            paths = tuple(of_stem.get(view, "") for view in views)
            yield Sample(name, paths, tuple(states.get(path, "") for path in paths))
