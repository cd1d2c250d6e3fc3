"""Restores a backup to a new folder, and checks what it has restored."""

import logging
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import mlflow
from upath import UPath

from sprue.errors import SprueError
from sprue.formats import versions
from sprue.operations.archive import Archive, Backup, in_words
from sprue.operations.backup import PROGRESS_S, THREADS
from sprue.release import audit_log
from sprue.store import location
from sprue.tracking.backbones import fetch_backbone
from sprue.tracking.locations import ARTIFACTS, DATABASE, own_database, relocate, relocate_models
from sprue.tracking.registry import champions, load_detector, model_names

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RestoreSummary:
    """What was restored and found sound.

    Attributes:
        store: The new store.
        at: When the backup was made.
        files: How many files it has.
        bytes: Their size.
        models: Registered models; None without a registry.
        champions: Those that were loaded.
        audit_entries: Entries of the audit log.
    """

    store: str
    at: str
    files: int
    bytes: int
    models: int | None
    champions: list[str]
    audit_entries: int | None

    def __str__(self) -> str:
        """A table."""
        rows = [
            ("store", self.store),
            ("as of", self.at),
            ("files", f"{self.files}, {in_words(self.bytes)}, all digests right"),
        ]
        if self.models is None:
            rows.append(("registry", "not in the backup"))
        else:
            rows.append(("registry", f"{self.models} models, {self.audit_entries} entries in the audit log"))
            rows.append(("champions", f"{len(self.champions)} loaded: {', '.join(self.champions) or 'none'}"))
        return "\n".join(f"{heading:<10} {words}" for heading, words in rows)


def restore(archive: Archive, target: UPath, name: str | None = None) -> RestoreSummary:
    """Restores a backup, the newest if none is named, to a folder that is there whole or not at all.

    MLflow is pointed to the new store's own database, if the backup has one.

    Raises:
        SprueError: If the target is a URL or not empty, there is too little space, a file of the backup is missing or
            damaged, a newer sprue made it, or what was restored can't be used.
    """
    backup = archive.read(name)
    _require_readable(backup, archive)
    if target.protocol not in ("", "file"):
        raise SprueError(
            f"a backup is restored to a folder, and {target} is a URL; copy the restored store there with your object "
            "store's own tools"
        )
    folder = Path(target.path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SprueError(f"{folder} is not empty: a backup is restored to a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(folder.parent).free) < backup.size:
        raise SprueError(f"{folder.parent} has {in_words(free)} free, and the backup needs {in_words(backup.size)}")
    staged = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        _fetch(archive, backup, staged)
        if backup.has_registry:
            root = location(backup.root)
            relocate(staged / DATABASE, root, target)
            relocate_models(staged / ARTIFACTS, root, target)
        if folder.exists():
            folder.rmdir()
        staged.rename(folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return _checked(backup, target)


def _require_readable(backup: Backup, archive: Archive) -> None:
    current = versions()
    newer = [name for name, version in backup.formats.items() if version > current.get(name, 0)]
    if newer:
        raise SprueError(
            f"the backup in {archive.folder} was made by sprue {backup.sprue}, which writes newer formats of: "
            f"{', '.join(newer)}; update sprue"
        )


def _fetch(archive: Archive, backup: Backup, folder: Path) -> None:
    """Copies all files of a backup into a folder; each digest is checked."""
    folder.mkdir()
    done, logged = 0, time.monotonic()

    def fetch(name: str) -> int:
        archive.fetch(name, backup.files[name], folder / name)
        return backup.files[name].size

    with ThreadPoolExecutor(THREADS) as pool:
        try:
            for number, size in enumerate(pool.map(fetch, backup.files), 1):
                done += size
                if time.monotonic() - logged > PROGRESS_S:
                    logged = time.monotonic()
                    logger.info(
                        "%d of %d files, %s of %s", number, len(backup.files), in_words(done), in_words(backup.size)
                    )
        except SprueError:
            pool.shutdown(cancel_futures=True)
            raise


def _checked(backup: Backup, store: UPath) -> RestoreSummary:
    """Reads the registry, loads all champions and reads the audit log."""
    size, files = backup.size, len(backup.files)
    if not backup.has_registry:
        return RestoreSummary(str(store), backup.at, files, size, None, [], None)
    uri = own_database(store)
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    found = champions()
    for champion in found:
        fetch_backbone(load_detector(champion).spec.weights_digest)
    entries = audit_log.entries()
    return RestoreSummary(
        str(store), backup.at, files, size, len(model_names()), [str(champion) for champion in found], len(entries)
    )
