"""Reads picture files once: digest, size, and whether they can be decoded at all."""

import hashlib
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from upath import UPath

from sprue.inference.images import UnreadableImageError, open_image


@dataclass(frozen=True)
class Inspection:
    """What was found in a picture file.

    Args:
        sha256: Hexadecimal digest of the file's bytes.
        width: Pixels per row, 0 if unknown.
        height: Rows, 0 if unknown.
        damage: Why the file cannot be used, empty if it can.
    """

    sha256: str
    width: int
    height: int
    damage: str = ""


def inspect_pictures(root: UPath, paths: Collection[str]) -> dict[str, Inspection]:
    """Reads and fully decodes files, in threads.

    Args:
        root: Folder that the paths are relative to.
        paths: Posix paths of the files.

    Returns:
        An inspection per path.
    """
    with ThreadPoolExecutor() as pool:
        return dict(zip(paths, pool.map(lambda path: _inspect(root / path), paths), strict=True))


def _inspect(path: UPath) -> Inspection:
    try:
        data = path.read_bytes()
    except (FileNotFoundError, PermissionError) as error:
        return Inspection("", 0, 0, f"cannot be read: {error.strerror or error}")
    sha256 = hashlib.sha256(data).hexdigest()
    if not data:
        return Inspection(sha256, 0, 0, "zero bytes")
    try:
        image = open_image(data, "the file")
    except UnreadableImageError as error:
        return Inspection(sha256, 0, 0, str(error))
    return Inspection(sha256, image.width, image.height)
