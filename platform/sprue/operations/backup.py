"""Backs up a store with its registry and audit log, while jobs and the service run.

The registry's database is copied first, at one moment; then the files, each of which was complete before the database
named it, and none of which is ever changed: so each file that the copy names is in the backup. What was written after
that moment may be in it, too, and does no harm.
"""

import logging
import os
import tempfile
import time
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from upath import UPath

from sprue.errors import SprueError
from sprue.formats import versions
from sprue.operations.archive import Archive, Backup, File, in_words
from sprue.tracking.locations import ARTIFACTS, DATABASE, left_behind, outside, own_database, snapshot

logger = logging.getLogger(__name__)

THREADS = 8
"""Files that are read at once: an object store answers slowly, a digest is computed without Python's lock."""
PROGRESS_S = 5.0
UNFINISHED = "runs"
"""The folder of a dataset with the checkpoints of what is not finished."""
SECRETS = "secrets.json"
"""What tells the folder of a local stack from that of a dataset: it holds databases that run, and their passwords."""


@dataclass(frozen=True)
class BackupSummary:
    """What was backed up.

    Attributes:
        name: The backup's.
        archive: Where it is.
        files: How many files it has.
        bytes: Their size.
        copied: How many of them the archive did not have.
        copied_bytes: Their size.
        has_registry: Whether the registry is in it.
    """

    name: str
    archive: str
    files: int
    bytes: int
    copied: int
    copied_bytes: int
    has_registry: bool

    def __str__(self) -> str:
        """One line."""
        registry = "" if self.has_registry else ", without the registry"
        return (
            f"backup {self.name} in {self.archive}: {self.files} files, {in_words(self.bytes)}{registry}; "
            f"{self.copied} of them new, {in_words(self.copied_bytes)}"
        )


def back_up(store: UPath, archive: Archive, with_registry: bool = True) -> BackupSummary:
    """Adds a backup of a store to an archive.

    Args:
        store: The store.
        archive: Where the backup goes; files that it has are not copied again.
        with_registry: Whether the registry is backed up with it.

    Raises:
        SprueError: If there is no store, the registry is not a file, it names files outside of the store, or the
            archive is in the store.
    """
    if not store.is_dir():
        raise SprueError(f"there is no store {store}")
    if f"{archive.folder}/".startswith(f"{str(store).rstrip('/')}/"):
        raise SprueError(f"the backup can't be in the store itself: {archive.folder} is below {store}")
    database = registry_file(store) if with_registry else None
    at = datetime.now(UTC)
    copier = _Copier(store, archive, known=archive.read().files if archive.names() else {})
    with tempfile.TemporaryDirectory() as folder:
        if database:
            copy = Path(folder, "mlflow.db")
            snapshot(database, copy)
            require_own_files(copy, store)
            copier.copy(DATABASE, UPath(copy), copy.stat().st_size, stamp=at.isoformat())
        copier.copy_all()
    name = f"{at:%Y%m%dT%H%M%SZ}"
    backup = Backup(
        at=at.isoformat(timespec="seconds"),
        sprue=version("sprue"),
        formats=versions(),
        root=str(store),
        has_registry=database is not None,
        files=dict(sorted(copier.files.items())),
    )
    archive.write(name, backup)
    copied, size = len(copier.copied), sum(copier.copied.values())
    return BackupSummary(name, str(archive.folder), len(backup.files), backup.size, copied, size, backup.has_registry)


def registry_file(store: UPath) -> Path:
    """The file of the registry's database.

    Raises:
        SprueError: If the registry is a server, or there is none.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or own_database(store)
    if not uri.startswith("sqlite:///"):
        raise SprueError(
            f"the registry is the server {uri}, whose database and files have to be backed up together, with the means "
            "of its database (pg_dump) and of its object store; back up the store alone with --without-registry"
        )
    file = Path(uri.removeprefix("sqlite:///"))
    if not file.is_file():
        raise SprueError(f"there is no registry {file}; back up the store alone with --without-registry")
    return file


def require_own_files(database: Path, store: UPath) -> None:
    """Checks that all files which a registry names are in its store.

    Raises:
        SprueError: If not; the message names a place.
    """
    if moved := left_behind(database, store):
        raise SprueError(
            f"the registry of {store} names files in {moved[0]}: the store was moved or copied; run `sprue relocate`"
        )
    if elsewhere := outside(database, store):
        raise SprueError(
            f"the registry names files outside of the store, which a backup would lack: {', '.join(elsewhere[:3])}; "
            f"delete the runs or versions that have them, or register these classes anew"
        )


class _Copier:
    """Copies the files of a store, and keeps count."""

    def __init__(self, store: UPath, archive: Archive, known: Any) -> None:
        self.files: dict[str, File] = {}
        self.copied: dict[str, int] = {}
        self._store, self._archive, self._known = store, archive, known
        self._stored = archive.stored()

    def copy(self, name: str, path: UPath, size: int, stamp: str) -> None:
        """Copies a file that is in the store under a name, unless the last backup has it."""
        last = self._known.get(name)
        is_there = last is not None and self._stored.get(last.sha256) == last.size
        if is_there and (last.size, last.stamp) == (size, stamp):
            self.files[name] = last
            return
        try:
            digest, size = self._archive.add(path, self._stored)
        except FileNotFoundError:
            # Replaced by a stage, or deleted as old decisions are. What the registry names is neither.
            if name.startswith(f"{ARTIFACTS}/"):
                raise
            logger.info("%s was deleted meanwhile", name)
            return
        self.files[name] = File(sha256=digest, size=size, stamp=stamp)
        if self._stored.get(digest) != size:
            self.copied[name] = self._stored[digest] = size

    def copy_all(self) -> None:
        """Copies all files of the store that belong into a backup."""
        listed = list(stored_files(self._store))
        total, done, logged = sum(size for _, size, _ in listed), 0, time.monotonic()

        def copy(entry: tuple[str, int, str]) -> int:
            name, size, stamp = entry
            self.copy(name, self._store / name, size, stamp)
            return size

        with ThreadPoolExecutor(THREADS) as pool:
            for number, size in enumerate(pool.map(copy, listed), 1):
                done += size
                if time.monotonic() - logged > PROGRESS_S:
                    logged = time.monotonic()
                    logger.info("%d of %d files, %s of %s", number, len(listed), in_words(done), in_words(total))


def stored_files(store: UPath) -> Iterator[tuple[str, int, str]]:
    """Path, size and stamp of the files of a store that belong into a backup."""
    root = store.path.rstrip("/")
    found = {path.removeprefix(root).lstrip("/"): facts for path, facts in store.fs.find(root, detail=True).items()}
    stacks = {folder for folder, _, file in (name.partition("/") for name in found) if file == SECRETS}
    for name, facts in sorted(found.items()):
        if facts["type"] == "file" and not _is_left_out(name, stacks):
            yield name, int(facts["size"]), _stamp(facts)


def _stamp(facts: dict[str, Any]) -> str:
    return repr(facts["mtime"]) if "mtime" in facts else str(facts["ETag"]).strip('"')


def _is_left_out(name: str, stacks: Collection[str]) -> bool:
    """Whether a file of a store is none of its results."""
    if name.startswith(f"{ARTIFACTS}/"):
        return False
    first, *others = name.split("/")
    return (
        first == "mlflow"  # the database, which is copied at one moment, and its journal and lock
        or first in stacks
        or others[:1] == [UNFINISHED]
        or any(part.startswith(".") for part in (first, *others))  # not yet complete
    )
