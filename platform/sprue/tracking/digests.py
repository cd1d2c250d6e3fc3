"""Digests of a version's files, as tags of the version: what is loaded is what was registered.

The registry's database and its files are often kept apart, and files can be copied, damaged or altered there.
"""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from sprue.errors import SprueError

DIGEST_TAG = "sprue.sha256."
"""Begins the tags; the file's name follows."""


def digest_tags(folder: Path) -> dict[str, str]:
    """The tags of a saved detector: SHA-256 of each of its files."""
    return {f"{DIGEST_TAG}{path.name}": _digest(path) for path in sorted(folder.iterdir())}


def combined_digest(tags: Mapping[str, str]) -> str:
    """One SHA-256 for the digests of all files that a version's tags hold.

    >>> combined_digest({"sprue.sha256.detector.json": "ab"}) == combined_digest({"sprue.sha256.detector.json": "ac"})
    False
    """
    files = sorted(item for item in tags.items() if item[0].startswith(DIGEST_TAG))
    return hashlib.sha256("\n".join(" ".join(item) for item in files).encode()).hexdigest()


def file_digests(tags: Mapping[str, str]) -> tuple[str, ...]:
    """``<name>:<sha256>`` of each file whose digest a version's tags hold, sorted.

    >>> file_digests({"sprue.sha256.flow.safetensors": "ab12", "sprue.class": "brick"})
    ('flow.safetensors:ab12',)
    """
    return tuple(
        sorted(
            f"{name.removeprefix(DIGEST_TAG)}:{value}" for name, value in tags.items() if name.startswith(DIGEST_TAG)
        )
    )


def digest_of(files: Iterable[str]) -> str:
    """The combined digest of files that `file_digests` names.

    >>> tags = {"sprue.sha256.flow.safetensors": "ab12", "sprue.sha256.detector.json": "cd"}
    >>> digest_of(file_digests(tags)) == combined_digest(tags)
    True
    """
    pairs = (each.rpartition(":") for each in files)
    return combined_digest({f"{DIGEST_TAG}{name}": digest for name, _, digest in pairs})


def altered_files(folder: Path, tags: Mapping[str, str]) -> list[str]:
    """Names of files that are missing, altered or not among those whose digests a version's tags hold."""
    registered = {name.removeprefix(DIGEST_TAG): value for name, value in tags.items() if name.startswith(DIGEST_TAG)}
    found = {path.name: _digest(path) for path in folder.iterdir()}
    return sorted(name for name in registered | found if registered.get(name) != found.get(name))


def require_tags(tags: Mapping[str, str], version: object) -> None:
    """Checks that a version's tags, which messages call `version`, have digests.

    Raises:
        SprueError: If they have none.
    """
    if not any(name.startswith(DIGEST_TAG) for name in tags):
        raise SprueError(f"{version} has no digests of its files, so they can't be trusted: register it anew")


def require_digests(folder: Path, tags: Mapping[str, str], version: object) -> None:
    """Checks that a folder holds the files that were registered, and no others.

    Args:
        folder: The downloaded files.
        tags: The version's.
        version: What it is called in messages.

    Raises:
        SprueError: If the version has no digests, or a file is missing, altered or not one of them.
    """
    require_tags(tags, version)
    if altered := altered_files(folder, tags):
        raise SprueError(f"the files of {version} are not those that were registered: {', '.join(altered)}")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
