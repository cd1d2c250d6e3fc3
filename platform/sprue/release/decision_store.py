"""What the service decided, kept: a row for each decision in Parquet, and some of the images as they came.

``rows/date=<day>/<part>.parquet`` holds the rows of a day (UTC), partitioned as pandas, DuckDB and Spark read it;
``images/date=<day>/hour=<hour>/<sha256>`` the images' bytes. Days are deleted as a whole, and images by their age:
nobody counts which rows of its hour an image belongs to.
"""

import contextlib
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, date, datetime, timedelta
from itertools import accumulate
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from sprue.errors import SprueError
from sprue.formats import DECISIONS
from sprue.store import write_bytes

FOLDER = "sprue-decisions"
"""Of the store; a dataset can't have this name."""

FORMAT_KEY = b"sprue.decisions"

Kept = Literal["alarm", "near", "sample", ""]
"""Why a sample's images are kept: it was anomalous, nearly so, or one of a fixed fraction; empty if they are not."""

RECENT_DAYS = 7
"""Days with decisions that `DecisionStore.newest` looks through."""

_DAY = re.compile(r"date=(\d{4}-\d\d-\d\d)")

_TYPES: dict[str, pa.DataType] = {
    "at": pa.timestamp("us", tz="UTC"),
    "files": pa.list_(pa.string()),
    "images": pa.list_(pa.string()),
    "version": pa.int64(),
    "batch": pa.int32(),
    "is_anomalous": pa.bool_(),
} | dict.fromkeys(("score", "p_value", "alpha", "threshold", "latency_s"), pa.float64())


class ImageGone(SprueError):
    """An image was deleted for its age, or for lack of space."""


@dataclass(frozen=True)
class Decision:
    """A sample that was scored, and what was decided.

    Attributes:
        request_id: The answer's ``X-Request-Id``. Clients may give their own, so it need not be unique.
        at: When it was answered, UTC.
        station: The request's ``X-Station``; empty without one.
        dataset: The dataset.
        class_name: The product class in it.
        version: Of the registered model ``<dataset>.<class_name>``.
        files: ``<name>:<sha256>`` of the version's files, sorted.
        engine: What ran the backbone.
        score: The anomaly score.
        p_value: The conformal p-value.
        alpha: The calibration's false-alarm rate.
        threshold: The score above which a sample is anomalous.
        is_anomalous: The decision.
        latency_s: Seconds from the request's headers to its answer.
        batch: Samples that were scored together.
        images: SHA-256 of the images' bytes as they came, in the views' order.
        kept: Why the images are kept.
    """

    request_id: str
    at: datetime
    station: str
    dataset: str
    class_name: str
    version: int
    files: tuple[str, ...]
    engine: str
    score: float
    p_value: float
    alpha: float
    threshold: float
    is_anomalous: bool
    latency_s: float
    batch: int
    images: tuple[str, ...]
    kept: Kept = ""

    @property
    def model_name(self) -> str:
        """The registered model's name."""
        return f"{self.dataset}.{self.class_name}"

    @property
    def key(self) -> str:
        """Identifies the decision, which its `request_id` need not do."""
        parts = (self.request_id, self.at.isoformat(), *self.images)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]

    def as_json(self) -> dict[str, Any]:
        """The row as JSON takes it."""
        return asdict(self) | {"at": self.at.isoformat()}


SCHEMA = pa.schema(
    [(field.name, _TYPES.get(field.name, pa.string())) for field in fields(Decision)],
    metadata={FORMAT_KEY: json.dumps(DECISIONS.stamped({})).encode()},
)


def rows_of(decisions: Sequence[Decision]) -> pa.Table:
    """Decisions as rows."""
    return pa.Table.from_pylist([vars(each) for each in decisions], SCHEMA)


def image_digests(images: Iterable[bytes]) -> tuple[str, ...]:
    """SHA-256 of each image's bytes."""
    return tuple(hashlib.sha256(image).hexdigest() for image in images)


@dataclass(frozen=True)
class DecisionStore:
    """The folder or s3 URL in which decisions are kept."""

    folder: UPath

    def write_part(self, day: date, name: str, rows: pa.Table) -> None:
        """Writes rows of a day as one part, which is there whole or not at all; replaces one of the same name."""
        buffer = io.BytesIO()
        pq.write_table(rows, buffer, compression="zstd")
        write_bytes(self._rows(day) / f"{name}.parquet", buffer.getvalue())

    def write_image(self, at: datetime, digest: str, data: bytes) -> None:
        """Writes an image of a decision that was made at a time, unless that hour has it."""
        path = self._images(at) / digest
        if not path.exists():
            write_bytes(path, data)

    def read_images(self, decision: Decision) -> list[bytes]:
        """The bytes of a decision's images.

        Raises:
            SprueError: If they were not kept, are no longer there, or are not those that were scored.
        """
        if not decision.kept:
            raise SprueError(
                f"the images of {decision.request_id} were not kept: those of alarms, of samples near the threshold "
                "and of a fraction of the others are"
            )
        return [self.read_image(decision.at, digest) for digest in decision.images]

    def read_image(self, at: datetime, digest: str) -> bytes:
        """The bytes of an image of a decision that was made at a time.

        Raises:
            ImageGone: If it was not kept, or is no longer there.
            SprueError: If it is not the one that was scored.
        """
        path = self._images(at) / digest
        if not path.is_file():
            raise ImageGone(f"{path} is gone: images are deleted after some days, sooner where space is short")
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != digest:
            raise SprueError(f"{path} is not the image that was scored: its SHA-256 is another")
        return data

    def find(self, request_id: str) -> list[Decision]:
        """The decisions of a request identifier on the last day that has any, oldest first.

        Raises:
            SprueError: If there is none.
        """
        for _, folder in reversed(_days(self.folder / "rows")):
            found = _decisions(folder, [("request_id", "=", request_id)])
            if found:
                return found
        raise SprueError(f"{self.folder} has no decision {request_id!r}; a service writes its rows within seconds")

    def newest(
        self, model_name: str, limit: int, kept: Collection[Kept] = (), first: date = date.min
    ) -> Iterator[Decision]:
        """The decisions about a class, newest first, of the last days that have any, from the first on.

        With `kept`, all of those; without it, the last `limit` of each day, since all of them may not fit into memory.
        """
        dataset, _, class_name = model_name.partition(".")
        filters: list[tuple[str, str, Any]] = [("dataset", "=", dataset), ("class_name", "=", class_name)]
        filters += [("kept", "in", set(kept))] if kept else []
        recent = _days(self.folder / "rows")[: -RECENT_DAYS - 1 : -1]
        for folder in (folder for day, folder in recent if day >= first):
            parts = [SCHEMA.empty_table()]
            for part in folder.glob("*.parquet"):
                rows = _rows_of(part, filters).sort_by([("at", "descending")])
                parts.append(rows if kept else rows.slice(0, limit).combine_chunks())
            rows = pa.concat_tables(parts).sort_by([("at", "descending")])
            for batch in (rows if kept else rows.slice(0, limit)).to_batches(max_chunksize=limit):
                yield from map(_decision, batch.to_pylist())

    def days(self) -> list[date]:
        """The days that have decisions, oldest first."""
        return [day for day, _ in _days(self.folder / "rows")]

    def of_version(self, day: date, model_name: str, version: int, columns: Sequence[str]) -> list[dict[str, Any]]:
        """Some columns of a day's decisions of a model's version, in no order."""
        dataset, _, class_name = model_name.partition(".")
        filters = [("dataset", "=", dataset), ("class_name", "=", class_name), ("version", "=", version)]
        parts = self._rows(day).glob("*.parquet")
        return [row for part in parts for row in _rows_of(part, filters).select(columns).to_pylist()]

    def count_alarms(self, first: date) -> dict[tuple[str, int], tuple[int, int]]:
        """Samples and alarms of each model's versions since a day, by model name and version."""
        counts: Counter[tuple[str, int]] = Counter()
        alarms: Counter[tuple[str, int]] = Counter()
        by = ["dataset", "class_name", "version"]
        for day, folder in _days(self.folder / "rows"):
            for part in folder.glob("*.parquet") if day >= first else ():
                grouped = _rows_of(part).group_by(by).aggregate([("is_anomalous", "count"), ("is_anomalous", "sum")])
                for row in grouped.to_pylist():
                    key = (f"{row['dataset']}.{row['class_name']}", row["version"])
                    counts[key] += row["is_anomalous_count"]
                    alarms[key] += row["is_anomalous_sum"]
        return {key: (count, alarms[key]) for key, count in counts.items()}

    def get(self, at: datetime, key: str) -> Decision:
        """The decision that was made at a time and that a key identifies.

        Raises:
            SprueError: If there is none.
        """
        for decision in _decisions(self._rows(at.date()), [("at", "=", at)]):
            if decision.key == key:
                return decision
        raise SprueError(f"{self.folder} has no decision {key} of {at}")

    def delete_old(self, today: date, keep_days: int, image_bytes: int) -> list[str]:
        """Deletes days that are more than `keep_days` old, and the oldest images that exceed `image_bytes`.

        Returns the folders and files that it deleted.
        """
        first = today - timedelta(days=keep_days)
        days = [folder.path for kind in ("rows", "images") for day, folder in _days(self.folder / kind) if day < first]
        for folder in days:
            with contextlib.suppress(FileNotFoundError):  # another replica deletes it, too
                self.folder.fs.rm(folder, recursive=True)
        images = self._beyond(image_bytes)
        with contextlib.suppress(FileNotFoundError):  # there is none, or another replica is ahead
            self.folder.fs.rm(images)
        return days + images

    def _beyond(self, image_bytes: int) -> list[str]:
        """The oldest images, without which the others have at most a size."""
        listed = self.folder.fs.find((self.folder / "images").path, detail=True)
        # An object store may list the folder itself, where all in it was deleted.
        found = {file: facts for file, facts in listed.items() if facts["type"] == "file"}
        newest_first = sorted(found, key=lambda file: (file.rpartition("/")[0], _written(found[file])), reverse=True)
        totals = accumulate(found[file]["size"] for file in newest_first)
        return [file for file, total in zip(newest_first, totals, strict=True) if total > image_bytes][::-1]

    def _rows(self, day: date) -> UPath:
        return self.folder / "rows" / f"date={day}"

    def image_path(self, at: datetime, digest: str) -> UPath:
        """Where an image of a decision that was made at a time is, if it was kept."""
        return self._images(at) / digest

    def _images(self, at: datetime) -> UPath:
        return self.folder / "images" / f"date={at:%Y-%m-%d}" / f"hour={at:%H}"


def _written(facts: Mapping[str, Any]) -> float:
    """When a file of a disk or an object store was written."""
    return facts["mtime"] if "mtime" in facts else facts["LastModified"].timestamp()


def _days(folder: UPath) -> list[tuple[date, UPath]]:
    """The days of a folder, oldest first."""
    found = [(_DAY.fullmatch(path.name), path) for path in (folder.iterdir() if folder.is_dir() else ())]
    return sorted((date.fromisoformat(match[1]), path) for match, path in found if match)


def _decisions(folder: UPath, filters: list[tuple[str, str, Any]]) -> list[Decision]:
    """The decisions of a day's folder that satisfy all filters, oldest first."""
    rows = [row for part in folder.glob("*.parquet") for row in _rows_of(part, filters).to_pylist()]
    return sorted((_decision(row) for row in rows), key=lambda each: each.at)


def _rows_of(part: UPath, filters: list[tuple[str, str, Any]] | None = None) -> pa.Table:
    """The rows of a part that satisfy all filters. It is read at once: the newest is replaced as it grows."""
    try:
        table = pq.read_table(io.BytesIO(part.read_bytes()), filters=filters)
        DECISIONS.current(json.loads(table.schema.metadata[FORMAT_KEY]), part)
    except (pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise SprueError(f"{part} is no part of the decisions: {error}") from error
    return table


def _decision(row: dict[str, Any]) -> Decision:
    lists = {name: tuple(row[name]) for name in ("files", "images")}
    return Decision(**row | lists | {"at": row["at"].astimezone(UTC)})
