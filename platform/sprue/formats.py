"""The stored formats: what each is called, its version, and how older versions are read.

A file that sprue writes for itself says its version in the field ``format`` of its JSON, or of the JSON in a Parquet
file's metadata. A change of what is written raises the version here and adds a migration, unless the file is one that
a stage makes again at little cost: then an older file is refused with the advice to make it again. Examples of each
version are in ``tests/sprue/formats``; every later version of sprue must read them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sprue.errors import SprueError

FIELD = "format"

Migration = Callable[[dict[str, Any]], dict[str, Any]]
"""Makes the content of a version into that of the next one."""


@dataclass(frozen=True)
class Format:
    """A stored format.

    Attributes:
        name: What messages call it.
        version: What is written now, from 1.
        remedy: What to do with a file that is older than any migration.
        migrations: By the version that each starts from.
    """

    name: str
    version: int
    remedy: str
    migrations: Mapping[int, Migration] = field(default_factory=dict)

    def stamped(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """The content with its version.

        >>> Format("plan", 1, "run the search stage again").stamped({"fits": []})
        {'format': 1, 'fits': []}
        """
        return {FIELD: self.version, **content}

    def current(self, content: Any, where: object) -> dict[str, Any]:
        """The content of a file as the current version has it, without the version.

        Args:
            content: What the file holds.
            where: The file, for messages.

        Raises:
            SprueError: If it has no version, or one that is newer or too old.
        """
        version = content.get(FIELD) if isinstance(content, dict) else None
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise SprueError(f"{where} is no {self.name}, or damaged: it says no version of its format; {self.remedy}")
        if version > self.version:
            raise SprueError(
                f"{where} was written by a newer sprue: {self.name} of format {version}, and this one reads up to "
                f"{self.version}; update sprue"
            )
        migrated = {name: value for name, value in content.items() if name != FIELD}
        for step in range(version, self.version):
            if step not in self.migrations:
                raise SprueError(
                    f"{where} was written by an older sprue: {self.name} of format {version}, and this one reads "
                    f"{self.version}; {self.remedy}"
                )
            migrated = self.migrations[step](migrated)
        return migrated


def _again(stage: str) -> str:
    return f"run the {stage} stage again"


_RESTORE = "restore it from a backup"

MANIFEST = Format("manifest", 1, _again("manifest"))
FEATURE_SPEC = Format("feature spec", 1, _again("features"))
FEATURES = Format("feature table", 1, "delete it and run the features stage again")
PLAN = Format("plan", 1, _again("search"))
SEARCH = Format("record of a search", 1, "delete its folder and run the search stage again")
CHECKPOINT = Format("checkpoint", 1, "delete its folder")
FIT = Format("record of a fit", 1, "delete its folder and run the fit stage again")
DETECTOR = Format("detector", 1, "register the class anew")
LINEAGE = Format("record of a version", 1, "register the class anew")
AUDIT = Format("entry of the audit log", 1, _RESTORE)
ACCESS = Format("entry of the access log", 1, _RESTORE)
SCORES = Format("table of scores", 1, "delete it and score again")
DECISIONS = Format("table of decisions", 1, _RESTORE)
REVIEW = Format("review", 1, _RESTORE)
KEYS = Format("file of keys", 1, "make its keys anew")
BACKUP = Format("backup", 1, "restore it with the version of sprue that made it")

FORMATS = (
    MANIFEST,
    FEATURE_SPEC,
    FEATURES,
    PLAN,
    SEARCH,
    CHECKPOINT,
    FIT,
    DETECTOR,
    LINEAGE,
    AUDIT,
    ACCESS,
    SCORES,
    DECISIONS,
    REVIEW,
    KEYS,
    BACKUP,
)
"""All of them."""


def versions() -> dict[str, int]:
    """The current version of each format, by its name."""
    return {each.name: each.version for each in FORMATS}
