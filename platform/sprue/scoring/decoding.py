"""Reads and decodes the images of samples in Ray tasks. Of a batch of samples, each is a row.

A row's record is JSON: ``part``, ``name``, ``paths``, ``sha256`` (of each image that was read, else empty), ``error``
(empty where all images were read) and ``final``; see `sprue.scoring.parts.PartSummary`.

Shapes: N samples, V views, S side of the backbone's input.
"""

import hashlib
import json
from typing import Any

import numpy as np
from numpy.typing import NDArray
from upath import UPath

from sprue.errors import SprueError
from sprue.inference.images import model_input, open_image

Batch = dict[str, NDArray[Any]]
Record = dict[str, Any]


def decode(batch: Batch, root: UPath, views: tuple[str, ...], side: int) -> Batch:
    """Decodes the samples of a row's ``batch``: JSON, a list of part, name and paths of each.

    Returns:
        A row for each sample: its ``record``, and its ``images`` [N, V, S, S, 3], black where one can't be read.
    """
    records: list[Record] = []
    images_NVSS3 = []
    for part, name, paths in json.loads(str(batch["batch"][0])):
        record: Record = {"part": part, "name": name, "paths": paths, "sha256": [], "error": "", "final": True}
        images_NVSS3.append(np.stack([_decode(root, record, *each, side) for each in zip(paths, views, strict=True)]))
        records.append(record)
    return {"record": as_column(records), "images": np.stack(images_NVSS3)}


def _decode(root: UPath, record: Record, path: str, view: str, side: int) -> NDArray[np.uint8]:
    """An image; if it can't be read, the record says why."""
    digest, image = "", np.zeros((side, side, 3), np.uint8)
    try:
        if not path:
            raise SprueError(f"there is no image of view {view}")
        data = read_file(root, path)
        digest = hashlib.sha256(data).hexdigest()
        image = model_input(open_image(data, path), side)
    except (SprueError, OSError) as error:
        note_error(record, error, path)
    record["sha256"].append(digest)
    return image


def read_file(root: UPath, path: str) -> bytes:
    """The content of a file below a root, whatever characters its name has; raises OSError if it can't be read."""
    return root.fs.cat_file(f"{root.path.rstrip('/')}/{path}")


def note_error(record: Record, error: SprueError | OSError, path: str) -> None:
    """Says in a record why its sample can't be scored. A file that can't be read may be readable the next time."""
    if isinstance(error, OSError):
        record["final"] = False
        error = SprueError(f"{path} can't be read: {error.strerror or error}")
    record["error"] = "; ".join(filter(None, [record["error"], str(error)]))


def as_column(records: list[Record]) -> NDArray[Any]:
    """Records as a column of a batch."""
    return np.array([json.dumps(record) for record in records])


def from_column(column: NDArray[Any]) -> list[Record]:
    """The records of a batch's column."""
    return [json.loads(str(text)) for text in column]
