"""The store: one folder or s3 URL that all stages read from and write to, on one machine or a cluster."""

import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError
from upath import UPath
from upath.implementations.cloud import S3Path
from upath.registry import register_implementation

from sprue.errors import SprueError


class StoreError(SprueError, OSError):
    """An object store does not answer, or refuses."""


class StorePath(S3Path):
    """A path in an object store that does not take what the store refuses to say for missing, as `UPath` does.

    Else a fit that is stored would be fitted again while the store is overloaded.
    """

    def is_file(self, *, follow_symlinks: bool = True) -> bool:
        """Whether there is a file; raises StoreError if that can't be known."""
        with _answer(self):
            return bool(self.fs.info(self.path)["type"] == "file")
        return False

    def glob(self, pattern: str, **options: Any) -> Iterator["StorePath"]:
        """What is in the folder, or below it with ``**``; raises StoreError if that can't be known."""
        if "/" in pattern or "**" in pattern:
            yield from super().glob(pattern, **options)
            return
        names: list[str] = []
        with _answer(self):
            names = self.fs.ls(self.path, detail=False)
        for name in (each.rstrip("/").rpartition("/")[2] for each in names):
            if fnmatchcase(name, pattern):
                yield self / name


register_implementation("s3", StorePath, clobber=True)


@contextmanager
def _answer(path: UPath) -> Iterator[None]:
    """Goes on after the block if there is nothing at a path."""
    try:
        yield
    except FileNotFoundError:
        return
    except (OSError, BotoCoreError, ClientError) as error:
        raise StoreError(f"{path}: the object store does not say what is there: {error}") from error


def location(text: str) -> UPath:
    """A local path (made absolute) or an s3 URL.

    Raises:
        SprueError: If the URL has another scheme.

    >>> location("s3://plant/store").joinpath("features").as_posix()
    's3://plant/store/features'
    """
    scheme, separator, _ = text.partition("://")
    if not separator:
        return UPath(os.path.abspath(os.path.expanduser(text)))  # noqa: PTH100, PTH111 - text may not be a local path
    if scheme != "s3":
        raise SprueError(f"store: {text} is neither a path nor an s3 URL")
    # Several processes write to the store, so a listing may be out of date as soon as it is made.
    return UPath(text, use_listings_cache=False)


class KeptBytes(io.BytesIO):
    """A buffer that stays readable after its writer (fastparquet) has closed it."""

    def close(self) -> None:
        """Keeps the content."""


def write_bytes(path: UPath, data: bytes) -> None:
    """Writes a file atomically: an object store's put is atomic, a local file is renamed into place."""
    if path.protocol not in ("", "file"):
        path.write_bytes(data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(data)
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: UPath, value: Any) -> None:
    """Writes JSON with sorted keys, so that equal values give equal files."""
    write_bytes(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def read_text(path: UPath, made_by: str) -> str:
    """Reads a text file.

    Args:
        path: The file.
        made_by: The stage that writes it, for the message.

    Raises:
        SprueError: If it is missing.
    """
    if not path.is_file():
        raise SprueError(f"there is no {path}; run the {made_by} stage first")
    return path.read_text(encoding="utf-8")


def read_json(path: UPath, made_by: str) -> Any:
    """Reads a JSON file; see `read_text`.

    Raises:
        SprueError: If it is missing or damaged.
    """
    text = read_text(path, made_by)
    try:
        return json.loads(text)
    except ValueError as error:
        raise SprueError(f"{path} is damaged ({error}); delete it and run the {made_by} stage again") from error


def replace_folder(source: Path, target: UPath) -> None:
    """Replaces the target by a local folder: at once on a file system, file by file in an object store."""
    if target.protocol not in ("", "file"):
        if target.exists():
            target.fs.rm(target.path, recursive=True)
        target.fs.put(f"{source}/", f"{target.path}/", recursive=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.copytree(source, staged.path)
    shutil.rmtree(target.path, ignore_errors=True)
    staged.rename(target)


def remove_folder(path: UPath) -> None:
    """Deletes a folder with everything in it, if it exists."""
    if path.exists():
        path.fs.rm(path.path, recursive=True)


@contextmanager
def local_copy(path: UPath) -> Iterator[Path]:
    """A folder of the store as a local folder, for libraries that read no URLs."""
    if path.protocol in ("", "file"):
        yield Path(path.path)
        return
    with tempfile.TemporaryDirectory() as folder:
        path.fs.get(f"{path.path}/", f"{folder}/", recursive=True)
        yield Path(folder)


def digest(path: UPath) -> str:
    """SHA-256 of a file, or of a folder's file names and contents.

    Raises:
        SprueError: If there is nothing at the path.
    """
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    if not path.is_dir():
        raise SprueError(f"there is nothing at {path}")
    sha = hashlib.sha256()
    for file in sorted((file for file in path.rglob("*") if file.is_file()), key=str):
        sha.update(f"{file.relative_to(path).as_posix()} {digest(file)}\n".encode())
    return sha.hexdigest()
