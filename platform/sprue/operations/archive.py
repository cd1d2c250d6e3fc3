"""An archive of backups: one folder or s3 URL, in which equal files are kept once.

``objects/<ab>/<sha256>`` holds the bytes of files, ``backups/<time>.json`` a backup: which files it has, by their
digests. A backup is written last, so it is there whole or not at all, and what an interrupted one has copied need not
be copied again.
"""

import hashlib
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, BinaryIO

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from upath import UPath

from sprue.errors import SprueError
from sprue.formats import BACKUP
from sprue.store import read_json, write_json

CHUNK = 2**20


class File(BaseModel):
    """A file of a backup.

    Attributes:
        sha256: Of its bytes.
        size: In bytes.
        stamp: What changed in the store whenever the file did: its time of modification, or an object's tag.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    size: Annotated[int, Field(ge=0)]
    stamp: str


class Backup(BaseModel):
    """What a backup has.

    Attributes:
        at: When its database was copied, UTC, as ISO 8601.
        sprue: The version of sprue that made it.
        formats: The versions of the stored formats then.
        root: The store's folder or URL.
        has_registry: Whether the registry's database is among the files.
        files: By their paths in the store.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    at: str
    sprue: str
    formats: dict[str, int]
    root: str
    has_registry: bool
    files: Mapping[str, File]

    @field_validator("files")
    @classmethod
    def _paths_stay_below_the_store(cls, files: Mapping[str, File]) -> Mapping[str, File]:
        for name in files:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or not path.parts or "\\" in name:
                raise ValueError(f"{name!r} is no path in a store")
        return files

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files.values())


@dataclass(frozen=True)
class Archive:
    """The folder or s3 URL of some backups of a store."""

    folder: UPath

    @property
    def is_local(self) -> bool:
        """Whether it is on a disk."""
        return self.folder.protocol in ("", "file")

    def names(self) -> list[str]:
        """The backups' names, oldest first."""
        folder = self.folder / "backups"
        found = folder.glob("*.json") if folder.is_dir() else ()
        return sorted(path.name.removesuffix(".json") for path in found if not path.name.startswith("."))

    def read(self, name: str | None = None) -> Backup:
        """A backup, the newest if none is named.

        Raises:
            SprueError: If there is none, or it is damaged or a newer sprue's.
        """
        names = self.names()
        if not names:
            raise SprueError(f"there is no backup in {self.folder}; make one with `sprue backup`")
        if name is not None and name not in names:
            raise SprueError(f"{self.folder} has no backup {name!r}; it has: {', '.join(names)}")
        path = self.folder / "backups" / f"{name or names[-1]}.json"
        content = BACKUP.current(read_json(path, made_by="backup"), path)
        try:
            return Backup.model_validate(content)
        except ValidationError as error:
            first = error.errors(include_input=False)[0]
            place = ".".join(map(str, first["loc"]))
            raise SprueError(f"the backup {path} is damaged: {place}: {first['msg']}") from error

    def write(self, name: str, backup: Backup) -> None:
        """Writes a backup, all of whose files are in the archive."""
        if self.is_local:
            os.sync()  # the files are on the disk before the backup that names them
        write_json(self.folder / "backups" / f"{name}.json", BACKUP.stamped(backup.model_dump(mode="json")))

    def stored(self) -> dict[str, int]:
        """The digests and sizes of the files that the archive has."""
        folder = self.folder / "objects"
        found = folder.fs.find(folder.path, detail=True) if folder.is_dir() else {}
        return {path.rpartition("/")[2]: int(facts["size"]) for path, facts in found.items()}

    def add(self, path: UPath, stored: Mapping[str, int]) -> tuple[str, int]:
        """Copies a file into the archive, unless it is among those `stored`; digest and number of its bytes.

        The file may be replaced meanwhile: what is in the archive is the one or the other.
        """
        with path.open("rb") as source:
            digest, size = _copy(source)
        if stored.get(digest) == size:
            return digest, size
        with path.open("rb") as source:
            return self._add(source)

    def _add(self, source: BinaryIO) -> tuple[str, int]:
        if self.is_local:
            folder = Path(self.folder.path, "objects")
            folder.mkdir(parents=True, exist_ok=True)
        else:
            folder = Path(tempfile.gettempdir())
        handle, name = tempfile.mkstemp(dir=folder, prefix=".")
        try:
            with os.fdopen(handle, "wb") as copy:
                digest, size = _copy(source, copy)
            target = self._object(digest)
            if self.is_local:
                Path(target.path).parent.mkdir(exist_ok=True)
                Path(name).rename(target.path)
            else:
                target.fs.put_file(name, target.path)
        finally:
            Path(name).unlink(missing_ok=True)
        return digest, size

    def fetch(self, name: str, file: File, target: Path) -> None:
        """Copies a file of a backup out of the archive.

        Args:
            name: The file's path in the store.
            file: What the backup says of it.
            target: Where it is written.

        Raises:
            SprueError: If it is missing or damaged; the message names it.
        """
        source = self._object(file.sha256)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with source.open("rb") as read, target.open("wb") as written:
                digest, _ = _copy(read, written)
        except FileNotFoundError as error:
            raise SprueError(f"{name} is missing in the backup: there is no {source}") from error
        if digest != file.sha256:
            raise SprueError(
                f"{name} is damaged in the backup: the bytes of {source} have another SHA-256; restore another "
                "backup, or delete this file and back up again where the store is still there"
            )

    def _object(self, digest: str) -> UPath:
        return self.folder / "objects" / digest[:2] / digest


def _copy(source: BinaryIO, target: Any = None) -> tuple[str, int]:
    """Reads a stream, and writes it to another; digest and number of its bytes."""
    sha, size = hashlib.sha256(), 0
    while chunk := source.read(CHUNK):
        sha.update(chunk)
        size += len(chunk)
        if target is not None:
            target.write(chunk)
    return sha.hexdigest(), size


def in_words(size: int) -> str:
    """A number of bytes for people.

    >>> in_words(999), in_words(12_300_000), in_words(4_560_000_000)
    ('999 B', '12.3 MB', '4.56 GB')
    """
    for power, unit in ((3, "GB"), (2, "MB"), (1, "kB")):
        if size >= 1000**power:
            return f"{size / 1000**power:.3g} {unit}"
    return f"{size} B"
