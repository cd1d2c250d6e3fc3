"""The access log: who changed the keys, used a key with the scope ``admin``, reviewed, or exported reviews.

One file for each entry, never changed afterwards: ``sprue-audit/date=<day>/<time>.<id>.json`` in the store. It is
beside the audit log of champions, which is in the registry: keys are made without a registry, and a replica records
without waiting for one. Entries hold names of keys, and never a key.
"""

import json
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from upath import UPath

from sprue.errors import SprueError
from sprue.formats import ACCESS
from sprue.store import write_json

FOLDER = "sprue-audit"

Kind = Literal["key added", "key removed", "admin", "reviewed", "exported"]


@dataclass(frozen=True)
class Access:
    """An entry.

    Attributes:
        kind: What happened; ``admin`` is a request that a key with this scope allowed.
        by: Who: the name of a key, or user@host of a command.
        origin: From where: a client's address, or ``command``.
        detail: What, in words.
        model: The registered model that it is about; empty if it is about none.
        at: When, in UTC.
    """

    kind: Kind
    by: str
    origin: str
    detail: str
    model: str
    at: datetime

    def __str__(self) -> str:
        """The entry on a line."""
        who = f"by {self.by or '-'} from {self.origin}"
        return f"{self.at:%Y-%m-%d %H:%M:%S}  {self.model or '-':<24} {self.kind:<11} {self.detail}  {who}"

    def as_json(self) -> dict[str, Any]:
        """The entry as JSON takes it."""
        return asdict(self) | {"at": self.at.isoformat()}


@dataclass(frozen=True)
class AccessLog:
    """The entries in a folder or s3 URL."""

    folder: UPath

    def append(self, kind: Kind, by: str, origin: str, detail: str, model: str = "") -> None:
        """Appends an entry of what has just happened."""
        self.add(Access(kind, by, origin, detail, model, datetime.now(UTC)))

    def add(self, entry: Access) -> None:
        """Appends an entry."""
        name = f"{entry.at:%Y%m%dT%H%M%S%f}.{uuid.uuid4().hex}.json"
        write_json(self.folder / f"date={entry.at:%Y-%m-%d}" / name, ACCESS.stamped(entry.as_json()))

    def entries(self, model: str | None = None) -> Iterator[Access]:
        """The entries about a model, or all, oldest first.

        Raises:
            SprueError: If a file is damaged, or of another format.
        """
        days = self.folder.iterdir() if self.folder.is_dir() else ()
        for day in sorted((each for each in days if each.name.startswith("date=")), key=lambda each: each.name):
            for path in sorted(day.glob("*.json"), key=lambda each: each.name):
                entry = _read(path)
                if model in (None, entry.model):
                    yield entry


def _read(path: UPath) -> Access:
    try:
        values = ACCESS.current(json.loads(path.read_bytes()), path)
        return Access(**values | {"at": datetime.fromisoformat(values["at"])})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SprueError(f"{path} is no entry of the access log: {error}") from error
