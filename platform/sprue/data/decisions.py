"""What a user has decided of single images: ``manifest.keep`` and ``manifest.drop``."""

from collections.abc import Sequence

from sprue.config import ManifestSettings
from sprue.data.layouts import ImageRecord, SkippedFile
from sprue.errors import SprueError


def without_dropped(
    records: Sequence[ImageRecord], settings: ManifestSettings
) -> tuple[list[ImageRecord], list[SkippedFile]]:
    """The images that stay, and those of ``manifest.drop``.

    Raises:
        SprueError: If a path in either list is that of no image.
    """
    paths = {record.path for record in records}
    problems = [
        f"manifest.{name}: {path!r} is no image of the dataset; give paths relative to its folder, such as {min(paths)}"
        for name, listed in (("keep", settings.keep), ("drop", settings.drop))
        for path in listed
        if path not in paths
    ]
    if problems:
        raise SprueError("\n".join(problems))
    dropped = frozenset(settings.drop)
    return (
        [record for record in records if record.path not in dropped],
        [SkippedFile(path, "dropped by manifest.drop") for path in sorted(dropped)],
    )
