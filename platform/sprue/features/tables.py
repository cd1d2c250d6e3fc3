"""Feature tables: the backbone's maps of a class's pictures, in Parquet parts addressed by content.

A row is a picture: its digest and each map as raw float16 bytes, for fastparquet would widen a float16 column to
float32. Shapes stand in the parts' metadata. A class's table grows by parts; a part is never rewritten.

Shapes: N pictures, C channels, H rows, W columns of a map.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import fastparquet
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from upath import UPath

from sprue.errors import SprueError
from sprue.store import KeptBytes, write_bytes

ROW_GROUP_BYTES = 16 * 2**20
"""Uncompressed size of a row group: small enough to stream and to shuffle by, large enough to read at full speed."""

METADATA_KEY = "sprue.features"


def write_part(folder: UPath, digests: Sequence[str], maps: Sequence[NDArray[np.float16]]) -> UPath:
    """Writes one part of a table.

    Args:
        folder: The class's folder.
        digests: SHA-256 of each picture.
        maps: For each tap and scale, the pictures' maps [N, C, H, W].

    Returns:
        The part, named by the pictures that are in it.
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
        # Statistics would put the largest map of every group into the footer.
        stats=False,
        object_encoding={"sha256": "utf8"} | {f"map_{index}": "bytes" for index in range(len(maps))},
        custom_metadata={METADATA_KEY: json.dumps({"shapes": shapes, "dtype": "float16"})},
        open_with=lambda *_: buffer,
    )
    path = folder / f"part-{hashlib.sha256(''.join(digests).encode()).hexdigest()[:16]}.parquet"
    write_bytes(path, buffer.getvalue())
    return path


@dataclass(frozen=True)
class _Part:
    """A part, opened."""

    path: UPath

    @property
    def file(self) -> Any:
        try:
            return fastparquet.ParquetFile(self.path.path, verify=True, fs=self.path.fs)
        except (fastparquet.util.ParquetException, OSError, ValueError) as error:
            raise SprueError(
                f"{self.path} is not a feature table; delete it and run the features stage again"
            ) from error


class FeatureTable:
    """The stored maps of one class, found by picture digest."""

    def __init__(self, folder: UPath) -> None:
        """Reads the digests of all parts; a folder that does not exist is an empty table.

        Raises:
            SprueError: If a part can't be read.
        """
        self.folder = folder
        self.shapes: list[tuple[int, int, int]] = []
        self._rows: dict[str, tuple[UPath, int]] = {}
        for path in sorted(folder.glob("part-*.parquet"), key=str) if folder.is_dir() else []:
            file = _Part(path).file
            self.shapes = [tuple(shape) for shape in json.loads(file.key_value_metadata[METADATA_KEY])["shapes"]]
            for row, digest in enumerate(file.to_pandas(columns=["sha256"])["sha256"]):
                self._rows.setdefault(digest, (path, row))

    def __contains__(self, digest: str) -> bool:
        """Whether a picture's maps are stored."""
        return digest in self._rows

    def __len__(self) -> int:
        """How many pictures' maps are stored."""
        return len(self._rows)

    @property
    def picture_bytes(self) -> int:
        """Size of all maps of a picture."""
        return sum(2 * int(np.prod(shape)) for shape in self.shapes)

    def place(self, digest: str) -> tuple[str, int]:
        """Where a picture's maps are stored: the part and the row; pictures whose places are close are read together.

        Raises:
            SprueError: If the picture is not in the table.
        """
        path, row = self._row(digest)
        return str(path), row

    def _row(self, digest: str) -> tuple[UPath, int]:
        try:
            return self._rows[digest]
        except KeyError:
            raise SprueError(
                f"{self.folder} has no features of picture {digest[:16]}; run the features stage again"
            ) from None

    def read(self, digests: Sequence[str], places: Sequence[int] | None = None) -> list[NDArray[np.float16]]:
        """The maps of some pictures in the order asked for, [N, C, H, W] for each tap and scale.

        Args:
            digests: The pictures'.
            places: Which maps are read, all if None; of the others there are no rows.

        Raises:
            SprueError: If a picture is not in the table.
        """
        wanted: dict[UPath, dict[int, list[int]]] = {}
        for position, digest in enumerate(digests):
            path, row = self._row(digest)
            wanted.setdefault(path, {}).setdefault(row, []).append(position)
        places = range(len(self.shapes)) if places is None else places
        maps = [
            np.empty((len(digests) if place in places else 0, *shape), np.float16)
            for place, shape in enumerate(self.shapes)
        ]
        for path, rows in wanted.items():
            for row, values in self._walk(path, set(rows), places):
                for place, value in zip(places, values, strict=True):
                    maps[place][rows[row]] = np.frombuffer(value, np.float16).reshape(self.shapes[place])
        return maps

    def read_samples(
        self, samples: Sequence[Sequence[str]], views: int, places: Sequence[int] | None = None
    ) -> list[NDArray[np.float16]]:
        """The maps of samples as a flow reads them: those of their first views, then those of their second ...

        Args:
            samples: Digests of each sample's pictures, in the views' order.
            views: How many each has.
            places: As in `read`.

        Raises:
            SprueError: As `read`.
        """
        maps = self.read([digest for sample in samples for digest in sample], places)
        return [map_NCHW[view::views] for view in range(views) for map_NCHW in maps]

    def _walk(self, path: UPath, rows: set[int], places: Sequence[int]) -> Iterator[tuple[int, tuple[bytes, ...]]]:
        """The wanted rows of a part; row groups with none of them are not read."""
        file = _Part(path).file
        columns = [f"map_{place}" for place in places]
        start = 0
        for group in range(len(file.row_groups)):
            count = file.row_groups[group].num_rows
            if not rows.isdisjoint(range(start, start + count)):
                try:
                    frame = file[group].to_pandas(columns=columns)
                except OSError as error:
                    raise SprueError(f"{path} can't be read: {error}") from error
                for offset, values in enumerate(frame.itertuples(index=False, name=None)):
                    if start + offset in rows:
                        yield start + offset, values
            start += count
