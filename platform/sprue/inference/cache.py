"""The user's cache folder, which processes share: what is converted or downloaded once.

Entries are folders that appear complete or not at all. Downloads are removed, those first whose last use is longest
ago, when they take more than `limit` bytes.
"""

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from sprue.errors import SprueError

DOWNLOADS = ("models", "weights")
"""Folders of what can be downloaded again."""
GRACE_S = 60.0
"""What was used so recently is not removed: another process may be reading it."""
UNFINISHED_S = 3600.0
"""Age at which an unfinished download is taken for one whose process has died."""


def cache_folder() -> Path:
    """The folder of converted backbones and of downloads: ``$SPRUE_CACHE``, by default ``~/.cache/sprue``."""
    return Path(os.environ.get("SPRUE_CACHE") or Path.home() / ".cache" / "sprue")


def limit() -> int:
    """Bytes that downloads may take on the disk: ``$SPRUE_CACHE_GB`` GiB, by default 20.

    Raises:
        SprueError: If the variable is not a number above 0.
    """
    given = os.environ.get("SPRUE_CACHE_GB") or "20"
    try:
        gigabytes = float(given)
    except ValueError:
        gigabytes = 0.0
    if not 0 < gigabytes < float("inf"):
        raise SprueError(f"SPRUE_CACHE_GB={given} is not a number of GiB above 0")
    return int(gigabytes * 2**30)


def cached(name: str, fill: Callable[[Path], None], is_sound: Callable[[Path], bool]) -> Path:
    """A folder of the cache; it is filled anew where it is missing or not sound.

    Args:
        name: Its path in the cache folder: one of `DOWNLOADS`, and a name.
        fill: Writes an empty folder's files; what it raises is raised.
        is_sound: Whether a folder has the files that it should have.
    """
    folder = cache_folder() / name
    if _is_usable(folder, is_sound):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".", dir=folder.parent))
    try:
        fill(temporary)
        os.utime(temporary)  # it may have taken long
        with FileLock(cache_folder() / "lock"):
            if not _is_usable(folder, is_sound):  # another process may have filled it meanwhile
                _remove(folder)
                temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    evict(limit())
    return folder


def _is_usable(folder: Path, is_sound: Callable[[Path], bool]) -> bool:
    """Whether an entry is there and sound; it counts as used now."""
    try:
        os.utime(folder)
        return is_sound(folder)
    except FileNotFoundError:
        return False


def keep(temporary: Path, folder: Path) -> None:
    """Renames a finished folder to its name in the cache, unless another process has made the same one meanwhile.

    Raises:
        OSError: If it can't be renamed for another reason.
    """
    try:
        temporary.rename(folder)
    except OSError:
        if not folder.exists():
            raise
        shutil.rmtree(temporary)


def evict(max_bytes: int) -> None:
    """Removes downloads, the least recently used first, until they take at most `max_bytes`."""
    now = time.time()
    folders = [folder for kind in DOWNLOADS for folder in (cache_folder() / kind).glob("*")]
    entries = sorted((_last_use(folder), _size(folder), folder) for folder in folders)
    total = sum(size for _, size, _ in entries)
    for used, size, folder in entries:
        grace_s = UNFINISHED_S if folder.name.startswith(".") else GRACE_S
        # Used meanwhile by another process, or removed by it, the time is another.
        if total > max_bytes and now - used > grace_s and used == _last_use(folder):
            with contextlib.suppress(OSError):
                _remove(folder)
                total -= size


def _remove(folder: Path) -> None:
    """Removes an entry, if it is there, at once: nobody sees half of it."""
    doomed = Path(tempfile.mkdtemp(prefix=".", dir=folder.parent))
    try:
        with contextlib.suppress(FileNotFoundError):
            folder.rename(doomed / folder.name)
    finally:
        shutil.rmtree(doomed, ignore_errors=True)


def _last_use(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except OSError:
        return 0.0


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except OSError:  # another process removes it
            continue
    return total
