"""Feature tables: the backbone's maps of a class's images, in Parquet parts.

A row is an image: its digest and each map as raw float16 bytes, because fastparquet would store a float16 column as
float32. The maps' shapes are in the parts' metadata. A table grows by parts; a part is never rewritten.

Shapes: N images, C channels, H rows, W columns of a map.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import fastparquet
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from upath import UPath

from sprue.errors import SprueError
from sprue.formats import FEATURES
from sprue.store import KeptBytes, write_bytes

ROW_GROUP_BYTES = 16 * 2**20
"""Uncompressed size of a row group: small enough to stream and to shuffle by, large enough to read at full speed."""

AT_ONCE = 256
"""Samples whose maps are in memory at once, where they are read in turn."""

METADATA_KEY = "sprue.features"


def write_part(folder: UPath, digests: Sequence[str], maps: Sequence[NDArray[np.float16]]) -> UPath:
    """Writes one part of a class's table: the images' SHA-256 and their maps [N, C, H, W] for each tap and scale.

    Returns the part's path, whose name depends on its images.
    """
    shapes = [list(map_NCHW.shape[1:]) for map_NCHW in maps]
    frame = pd.DataFrame({"sha256": list(digests)})
    for index, map_NCHW in enumerate(maps):
        rows = np.ascontiguousarray(map_NCHW, dtype=np.float16)
        frame[f"map_{index}"] = pd.Series([row.tobytes() for row in rows], dtype=object)
    row_bytes = sum(2 * int(np.prod(shape)) for shape in shapes)
    buffer = KeptBytes()
    fastparquet.write(
        "part",
        frame,
        compression="LZ4",
        row_group_offsets=max(1, ROW_GROUP_BYTES // row_bytes),
        has_nulls=False,
        write_index=False,
        # Statistics would write the largest map of each row group into the footer.
        stats=False,
        object_encoding={"sha256": "utf8"} | {f"map_{index}": "bytes" for index in range(len(maps))},
        custom_metadata={METADATA_KEY: json.dumps(FEATURES.stamped({"shapes": shapes, "dtype": "float16"}))},
        open_with=lambda *_: buffer,
    )
    path = folder / f"part-{hashlib.sha256(''.join(digests).encode()).hexdigest()[:16]}.parquet"
    write_bytes(path, buffer.getvalue())
    return path


def _open_part(path: UPath) -> Any:
    """The part as a `fastparquet.ParquetFile`."""
    try:
        return fastparquet.ParquetFile(path.path, verify=True, fs=path.fs)
    except (fastparquet.util.ParquetException, OSError, ValueError) as error:
        raise SprueError(f"{path} is not a feature table; delete it and run the features stage again") from error


class FeatureTable:
    """The stored maps of one class, by image digest."""

    def __init__(self, folder: UPath) -> None:
        """Reads the digests of all parts; a folder that does not exist is an empty table.

        Raises:
            SprueError: If a part can't be read.
        """
        self.folder = folder
        self.shapes: list[tuple[int, int, int]] = []
        self._rows: dict[str, tuple[str, int]] = {}
        for path in sorted(folder.glob("part-*.parquet"), key=str) if folder.is_dir() else []:
            file = _open_part(path)
            about = FEATURES.current(json.loads(file.key_value_metadata[METADATA_KEY]), path)
            self.shapes = [tuple(shape) for shape in about["shapes"]]
            for row, digest in enumerate(file.to_pandas(columns=["sha256"])["sha256"]):
                self._rows.setdefault(digest, (path.name, row))

    def __contains__(self, digest: str) -> bool:
        """Whether an image's maps are stored."""
        return digest in self._rows

    def __len__(self) -> int:
        """Number of images whose maps are stored."""
        return len(self._rows)

    @property
    def image_bytes(self) -> int:
        """Size of all maps of an image."""
        return sum(2 * int(np.prod(shape)) for shape in self.shapes)

    def location(self, digest: str) -> tuple[str, int]:
        """The part's name and the row of an image's maps; images at close locations are fast to read together.

        Raises:
            SprueError: If the image is not in the table.
        """
        if digest not in self._rows:
            raise SprueError(f"{self.folder} has no features of image {digest[:16]}; run the features stage again")
        return self._rows[digest]

    def read(self, digests: Sequence[str], indices: Sequence[int] | None = None) -> list[NDArray[np.float16]]:
        """The maps of images, in the digests' order, [N, C, H, W] for each tap and scale.

        Args:
            digests: Digests of the images; one may occur several times.
            indices: Indices of the maps to read, all if None; the other maps have no rows, [0, C, H, W].

        Raises:
            SprueError: If an image is not in the table.
        """
        wanted: dict[str, dict[int, list[int]]] = {}
        for position, digest in enumerate(digests):
            part, row = self.location(digest)
            wanted.setdefault(part, {}).setdefault(row, []).append(position)
        indices = range(len(self.shapes)) if indices is None else indices
        maps = [
            np.empty((len(digests) if index in indices else 0, *shape), np.float16)
            for index, shape in enumerate(self.shapes)
        ]
        for part, rows in wanted.items():
            for row, values in _walk(self.folder / part, set(rows), indices):
                for index, value in zip(indices, values, strict=True):
                    maps[index][rows[row]] = np.frombuffer(value, np.float16).reshape(self.shapes[index])
        return maps

    def read_samples(
        self, samples: Sequence[Sequence[str]], views: int, indices: Sequence[int] | None = None
    ) -> list[NDArray[np.float16]]:
        """The maps of samples as a flow reads them: all maps of the first view, then those of the second ...

        A sample is the digests of its images, in the views' order; see `read` for `indices` and errors.
        """
        maps = self.read([digest for sample in samples for digest in sample], indices)
        return [map_NCHW[view::views] for view in range(views) for map_NCHW in maps]

    def read_in_turn(
        self, samples: Sequence[Sequence[str]], views: int, indices: Sequence[int] | None = None
    ) -> Iterator[list[NDArray[np.float16]]]:
        """The maps of all samples, `AT_ONCE` samples at a time; without samples, empty maps once.

        See `read_samples`.
        """
        for start in range(0, max(1, len(samples)), AT_ONCE):
            yield self.read_samples(samples[start : start + AT_ONCE], views, indices)


def _walk(path: UPath, rows: set[int], indices: Sequence[int]) -> Iterator[tuple[int, tuple[bytes, ...]]]:
    """The chosen rows of a part; only row groups that hold any are read."""
    file, start = _open_part(path), 0
    for group, metadata in enumerate(file.row_groups):
        if not rows.isdisjoint(range(start, start + metadata.num_rows)):
            try:
                frame = file[group].to_pandas(columns=[f"map_{index}" for index in indices])
            except OSError as error:
                raise SprueError(f"{path} can't be read: {error}") from error
            for row, values in enumerate(frame.itertuples(index=False, name=None), start):
                if row in rows:
                    yield row, values
        start += metadata.num_rows
