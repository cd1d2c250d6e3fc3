"""The store: one folder or s3 URL that all stages read from and write to, on one machine or a cluster."""

import hashlib
import io
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Self

from botocore.exceptions import BotoCoreError, ClientError
from upath import UPath
from upath.implementations.cloud import S3Path
from upath.registry import register_implementation

from sprue.errors import SprueError


class StoreError(OSError):
    """An object store does not answer, or refuses: unlike after a SprueError, another attempt may succeed."""


class StorePath(S3Path):
    """A path in an object store. It raises StoreError where the store refuses or does not answer.

    `UPath` takes what the store refuses to say for missing: a fit that is stored would be fitted again.
    """

    def is_file(self, *, follow_symlinks: bool = True) -> bool:
        """Whether there is a file."""
        with _answers(self):
            try:
                return bool(self.fs.info(self.path)["type"] == "file")
            except FileNotFoundError:
                return False

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        """Whether there is anything below."""
        with _answers(self):
            return super().is_dir()

    def exists(self, *, follow_symlinks: bool = True) -> bool:
        """Whether there is anything."""
        with _answers(self):
            return super().exists()

    def iterdir(self) -> Iterator[Self]:
        """What is in the folder."""
        with _answers(self):
            yield from super().iterdir()

    def glob(self, pattern: str, **options: Any) -> Iterator[Self]:
        """What is in the folder, or below it with ``**``."""
        with _answers(self):
            if "/" in pattern or "**" in pattern:
                yield from super().glob(pattern, **options)
            elif self.is_dir():
                yield from (path for path in self.iterdir() if fnmatchcase(path.name, pattern))

    def read_bytes(self) -> bytes:
        """The content of a file."""
        with _answers(self):
            return super().read_bytes()

    def write_bytes(self, data: bytes) -> int:
        """Replaces the content of a file, at once."""
        with _answers(self):
            return super().write_bytes(data)


register_implementation("s3", StorePath, clobber=True)


@contextmanager
def _answers(path: UPath) -> Iterator[None]:
    """Raises StoreError for what s3fs raises when it has repeated a request in vain."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (OSError, BotoCoreError) as error:
        if isinstance(error, BotoCoreError) or isinstance(error.__cause__, ClientError):
            raise StoreError(f"{path}: the object store does not answer, or refuses: {error}") from error
        raise


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
    """Writes a file atomically: an object store's put is atomic, a local file is renamed into place.

    A local file is on the disk before, so that a power cut leaves the old one or the new one.
    """
    if path.protocol not in ("", "file"):
        path.write_bytes(data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with Path(temporary.path).open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
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
    return path.read_bytes().decode()


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
    """Replaces the target by a local folder. On a file system there is nothing for a moment, but never a part of it."""
    if target.protocol not in ("", "file"):
        if target.exists():
            target.fs.rm(target.path, recursive=True)
        target.fs.put(f"{source}/", f"{target.path}/", recursive=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
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
