"""Where a store's own tracking database says that its files are: absolute URIs, which stay behind when a store moves.

MLflow writes the location of an experiment into the database, and that of each run and each model below it. A model's
file ``MLmodel`` names the backbone's weights in the same way. MLflow has no command that changes them.
"""

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import unquote, urlparse

from upath import UPath

from sprue.errors import SprueError
from sprue.store import location, write_bytes
from sprue.tracking.names import LOCK

DATABASE = "mlflow/mlflow.db"
"""The database's path in a store that has its own."""
ARTIFACTS = "mlflow/artifacts"
"""The folder of the files."""
COLUMNS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
"""The columns of MLflow's tables that hold locations."""

BUSY_S = 30.0
"""How long another process may keep the database locked."""


def own_database(store: UPath) -> str:
    """The SQLite database of a local store.

    Raises:
        SprueError: If the store is remote: an object store can't hold a database.
    """
    if store.protocol not in ("", "file"):
        raise SprueError(f"the store {store} can't hold the tracking database; set MLFLOW_TRACKING_URI to a server")
    return f"sqlite:///{store / DATABASE}"


@contextmanager
def _opened(database: Path) -> Iterator[sqlite3.Connection]:
    if not database.is_file():
        raise SprueError(f"there is no tracking database {database}")
    with closing(sqlite3.connect(database, timeout=BUSY_S)) as connection:
        try:
            yield connection
        except sqlite3.DatabaseError as error:
            raise SprueError(f"the tracking database {database} can't be used: {error}") from error


def snapshot(database: Path, target: Path, patience_s: float = 60.0) -> None:
    """Copies a database as it is at one moment, while others read and write it.

    The moment is one at which no alias is being changed: the change of an alias and its entry in the audit log are
    both in the copy, or neither is.

    Raises:
        SprueError: If a lock of an alias stays: the message names it.
    """
    deadline = time.monotonic() + patience_s
    while True:
        with _opened(database) as source, closing(sqlite3.connect(target)) as copy:
            source.backup(copy)
            held = copy.execute(
                "SELECT name, description FROM registered_models WHERE name LIKE ? || '%'", (LOCK,)
            ).fetchall()
        if not held:
            return
        if time.monotonic() > deadline:
            name, owner = held[0]
            raise SprueError(
                f"the aliases of {name.removeprefix(LOCK)} are locked: {owner}. If that process is dead, delete the "
                f"registered model {name}"
            )
        time.sleep(0.1)


def locations(database: Path) -> set[str]:
    """All locations that a database names, except references to logged models."""
    with _opened(database) as connection:
        found = {
            row[0]
            for table, column in COLUMNS
            for row in connection.execute(f"SELECT DISTINCT {column} FROM {table} WHERE {column} IS NOT NULL")
        }
    return {each for each in found if not each.startswith("models:/")}


def left_behind(database: Path, store: UPath) -> list[str]:
    """Locations of experiments outside of a store that would be in it, if the store had been moved; sorted."""
    with _opened(database) as connection:
        if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'experiments'").fetchone():
            return []  # MLflow has not made its tables yet
        found = [row[0] or "" for row in connection.execute("SELECT DISTINCT artifact_location FROM experiments")]
    return sorted(place for place in found if not _is_below(place, store) and place.endswith(f"/{ARTIFACTS}"))


def outside(database: Path, store: UPath) -> list[str]:
    """Locations outside of a store at which there are files; sorted. MLflow names some at which it keeps none."""
    elsewhere = [place for place in sorted(locations(database)) if not _is_below(place, store)]
    return [place for place in elsewhere if _has_files(place)]


def roots(store: UPath) -> tuple[str, ...]:
    """A store as locations name it: its URI; for one on a disk, also its path."""
    uri = store.as_uri().rstrip("/")
    return (uri, store.path.rstrip("/")) if store.protocol in ("", "file") else (uri,)


def relocate(database: Path, old: UPath, new: UPath) -> int:
    """Makes a database name the files of a store where they are now, in one transaction.

    Args:
        database: The database; nobody else may use it.
        old: Where the store was.
        new: Where it is.

    Returns:
        How many locations were changed.
    """
    changed = 0
    with _opened(database) as connection, connection:
        for before, after in zip(roots(old), roots(new), strict=False):
            for table, column in COLUMNS:
                changed += connection.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) "
                    f"WHERE {column} = ? OR substr({column}, 1, ?) = ? || '/'",
                    (after, len(before) + 1, before, len(before) + 1, before),
                ).rowcount
    return changed


def relocate_models(artifacts: Path, old: UPath, new: UPath) -> int:
    """Does the same to the models' files, which name the backbone's weights; returns how many were changed.

    Args:
        artifacts: The folder of the files, where it is at present.
        old: Where the store was.
        new: Where it will be.
    """
    before, after = (f"{roots(store)[0]}/{ARTIFACTS}/".encode() for store in (old, new))
    changed = 0
    for file in artifacts.rglob("MLmodel"):
        data = file.read_bytes()
        if before in data:
            write_bytes(UPath(file), data.replace(before, after))
            changed += 1
    return changed


def adopt(database: Path, store: UPath) -> int:
    """Relocates what a store that was moved or copied has left behind; returns how many locations were changed."""
    changed = 0
    for place in left_behind(database, store):
        old = location(unquote(place.removeprefix("file://")).removesuffix(f"/{ARTIFACTS}"))
        if store.protocol in ("", "file"):
            relocate_models(Path((store / ARTIFACTS).path), old, store)
        changed += relocate(database, old, store)
    return changed


def _is_below(place: str, store: UPath) -> bool:
    return any(f"{place}/".startswith(f"{root}/") for root in roots(store))


def _has_files(place: str) -> bool:
    """Whether anything is at a local location; others are not looked at."""
    parsed = urlparse(place)
    if parsed.scheme not in ("", "file"):
        return True
    path = Path(unquote(parsed.path))
    return path.is_file() or (path.is_dir() and any(each.is_file() for each in path.rglob("*")))
