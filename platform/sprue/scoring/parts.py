"""Parts: Parquet files of scores, named by the detector and the files that they cover.

A part appears whole or not at all, so a run that was interrupted goes on with the parts that are missing. Samples are
divided by their own names: a file that is added, removed or changed concerns the part that it is in, and no other.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import fastparquet
import pandas as pd
from upath import UPath

from sprue.formats import SCORES
from sprue.scoring.samples import Sample
from sprue.store import KeptBytes, write_bytes

PART_SAMPLES = 256
"""Samples of a part, on average: few to score again after an interruption, many for a file."""

LARGEST_PART = 4 * PART_SAMPLES

METADATA_KEY = "sprue.scores"

READERS = 16
"""Parts that are opened at once: most of the time goes into waiting for an object store."""

DAMAGE = (fastparquet.util.ParquetException, OSError, ValueError, KeyError, TypeError)
"""What reading a damaged part raises."""


@dataclass(frozen=True)
class Part:
    """Samples whose scores are written together.

    Attributes:
        name: Of its file.
        samples: In the order of their names.
    """

    name: str
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class PartSummary:
    """What a part's metadata say of its rows.

    Attributes:
        samples: The number of rows.
        anomalous: The number of anomalous samples.
        errors: Why samples could not be scored, by their names.
        heatmaps: Whether it was made with heat maps.
        final: Whether scoring the same files again would give the same; not so where reading a file failed.
    """

    samples: int
    anomalous: int
    errors: dict[str, str] = field(default_factory=dict)
    heatmaps: bool = False
    final: bool = True


def divide(samples: Sequence[Sample], detector: str) -> list[Part]:
    """Divides samples into parts, at names that a hash chooses.

    Args:
        samples: In the order of their names.
        detector: The detector's digest.
    """
    return [Part(_part_name(part, detector), tuple(part)) for part in _cut(samples)]


def _cut(samples: Sequence[Sample]) -> Iterator[list[Sample]]:
    part: list[Sample] = []
    for sample in samples:
        part.append(sample)
        number = int(hashlib.sha256(sample.name.encode()).hexdigest()[:8], 16)
        if number % PART_SAMPLES == 0 or len(part) == LARGEST_PART:
            yield part
            part = []
    if part:
        yield part


def _part_name(samples: Sequence[Sample], detector: str) -> str:
    covers = json.dumps([detector, [[each.name, each.paths, each.states] for each in samples]])
    return f"part-{hashlib.sha256(covers.encode()).hexdigest()[:16]}.parquet"


def write_part(path: UPath, frame: pd.DataFrame, summary: PartSummary) -> None:
    """Writes a part; a table [samples] whose columns `sprue.scoring.rows` describes."""
    buffer = KeptBytes()
    texts = [name for name in frame if pd.api.types.is_string_dtype(frame[name])]
    fastparquet.write(
        "part",
        frame,
        compression="LZ4",
        write_index=False,
        object_encoding=dict.fromkeys(texts, "utf8"),
        custom_metadata={METADATA_KEY: json.dumps(SCORES.stamped(asdict(summary)))},
        open_with=lambda *_: buffer,
    )
    write_bytes(path, buffer.getvalue())


def stored_parts(folder: UPath) -> list[UPath]:
    """The parts in a folder; none if it does not exist."""
    return sorted(folder.glob("part-*.parquet"), key=str) if folder.is_dir() else []


def summaries(paths: Sequence[UPath], heatmaps: bool) -> dict[str, PartSummary]:
    """The summaries of those parts that are stored and need not be made again, by their names.

    A part is made again if it is damaged or not final, or lacks heat maps that are asked for.
    """
    stored = {path.name for folder in {path.parent for path in paths} for path in stored_parts(folder)}
    present = [path for path in paths if path.name in stored]
    with ThreadPoolExecutor(READERS) as pool:
        found = zip(present, pool.map(_summary, present), strict=True)
    return {
        path.name: summary
        for path, summary in found
        if summary and summary.final and (summary.heatmaps or not heatmaps)
    }


def _summary(path: UPath) -> PartSummary | None:
    try:
        return PartSummary(**SCORES.current(json.loads(_open(path).key_value_metadata[METADATA_KEY]), path))
    except DAMAGE:
        return None


def read_names(path: UPath) -> list[str]:
    """The names of a part's samples; none if it is damaged."""
    try:
        return list(_open(path).to_pandas(columns=["sample"])["sample"])
    except DAMAGE:
        return []


def _open(path: UPath) -> Any:
    return fastparquet.ParquetFile(path.path, verify=True, fs=path.fs)
