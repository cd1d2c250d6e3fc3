"""Extraction on Ray Data: decode, run the backbone, write the tables; what is already stored is left alone.

Shapes: B pictures, S side of the input, C channels, H rows, W columns of a map.
"""

import hashlib
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import ray
from numpy.typing import NDArray
from ray.data.block import Block, BlockAccessor
from ray.data.datasource import Datasink
from upath import UPath

from sprue.errors import SprueError
from sprue.features.tables import FeatureTable, write_part
from sprue.inference.engines import EngineName, build_engine
from sprue.inference.images import model_input, open_image
from sprue.inference.spec import FeatureSpec
from sprue.store import write_json

logger = logging.getLogger(__name__)

BATCH = 16
"""Pictures a backbone call: enough for full speed on a CPU, and small beside a GPU's memory."""

PART_ROWS = 256
"""Pictures a part holds at least, where there are as many."""

SIDE_CPUS = 0.5
"""Cores that a task for decoding or writing books: a share, so that both go on beside an engine on two cores. That it
differs from what an engine books also keeps Ray Data from running the decoding inside the engine's actor, in turn."""

Batch = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Extraction:
    """What an extraction did: pictures that were already stored, pictures extracted, and the seconds it took."""

    stored: int
    extracted: int
    seconds: float


@dataclass(frozen=True)
class EnginePlacement:
    """One engine on every accelerator, or where there is none on every machine."""

    workers: int
    num_cpus: int
    num_gpus: int
    threads: int


def place_engines() -> EnginePlacement:
    """Fits engines to the cluster that Ray is connected to.

    On CPUs an engine uses all cores of its machine but books one less, so that decoding and writing, which
    take a small share of the time, are scheduled beside it. On one core nothing else could be, so it books none.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    if gpus:
        return EnginePlacement(workers=gpus, num_cpus=1, num_gpus=1, threads=1)
    cores = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
    if not cores:
        raise SprueError("the Ray cluster offers no CPU; start a node with at least one")
    return EnginePlacement(workers=len(cores), num_cpus=min(cores) - 1, num_gpus=0, threads=min(cores))


class _Decoder:
    """Reads and decodes pictures in a Ray task."""

    def __init__(self, root: UPath, side: int) -> None:
        self.root, self.side = root, side

    def __call__(self, batch: Batch) -> Batch:
        images = [self._decode(path, digest) for path, digest in zip(batch["path"], batch["sha256"], strict=True)]
        return {"class_name": batch["class_name"], "sha256": batch["sha256"], "image": np.stack(images)}

    def _decode(self, path: str, digest: str) -> NDArray[np.uint8]:
        try:
            data = (self.root / path).read_bytes()
        except OSError as error:
            raise SprueError(f"{self.root / path} can't be read: {error}") from error
        if hashlib.sha256(data).hexdigest() != digest:
            raise SprueError(
                f"{self.root / path} has changed since the manifest was written; run the manifest stage again"
            )
        return model_input(open_image(data, path), self.side)


class _EngineWorker:
    """Holds one engine in a Ray actor."""

    def __init__(self, spec: FeatureSpec, engine: EngineName, threads: int) -> None:
        self.engine = build_engine(spec, engine, threads)

    def __call__(self, batch: Batch) -> Batch:
        maps = self.engine(batch.pop("image"))
        return batch | {f"map_{index}": map_BCHW for index, map_BCHW in enumerate(maps)}


class FeatureTableSink(Datasink[None]):
    """Writes rows of a Ray dataset to their classes' feature tables."""

    def __init__(self, folder: UPath) -> None:
        """Writes below `folder`, which is named by the feature spec's fingerprint."""
        self.folder = folder

    @property
    def min_rows_per_write(self) -> int:
        """Ray Data bundles blocks up to this many rows into a write."""
        return PART_ROWS

    def write(self, blocks: Iterable[Block], ctx: object) -> None:
        """Writes one part for each class in the blocks."""
        batches = [BlockAccessor.for_block(block).to_numpy() for block in blocks]
        names = sorted((name for name in batches[0] if name.startswith("map_")), key=lambda name: int(name[4:]))
        columns = {
            name: np.concatenate([batch[name] for batch in batches]) for name in ["class_name", "sha256", *names]
        }
        for class_name in np.unique(columns["class_name"]):
            rows = columns["class_name"] == class_name
            write_part(
                self.folder / class_name, columns["sha256"][rows].tolist(), [columns[name][rows] for name in names]
            )


def extract(
    spec: FeatureSpec, pictures: pd.DataFrame, root: UPath, features: UPath, engine: EngineName = "auto"
) -> Extraction:
    """Extracts the maps of all pictures that are not stored yet, on the cluster that Ray is connected to.

    Args:
        spec: A resolved feature spec.
        pictures: The manifest's rows (class_name, path and sha256 are read).
        root: The dataset's folder or URL, as every node sees it.
        features: Folder of all features; the tables go to ``<fingerprint>/<class>``.
        engine: See `sprue.inference.engines.build_engine`.

    Raises:
        SprueError: If a picture is missing or has changed, or the backbone can't be loaded.
    """
    started = time.perf_counter()
    folder = features / spec.fingerprint
    write_json(folder / "spec.json", spec.to_mapping())
    unique = pictures[["class_name", "sha256", "path"]].drop_duplicates(["class_name", "sha256"])
    tables = {name: FeatureTable(folder / name) for name in unique["class_name"].unique()}
    missing = unique[
        [digest not in tables[name] for name, digest in zip(unique["class_name"], unique["sha256"], strict=True)]
    ]
    stored = len(unique) - len(missing)
    logger.info("%d pictures: %d stored already, %d to extract", len(unique), stored, len(missing))
    if len(missing):
        _run(spec, missing, root, folder, engine)
    return Extraction(stored, len(missing), time.perf_counter() - started)


def _run(spec: FeatureSpec, missing: pd.DataFrame, root: UPath, folder: UPath, engine: EngineName) -> None:
    placement = place_engines()
    ray.data.DataContext.get_current().raise_original_map_exception = True
    dataset = ray.data.from_items(missing.to_dict("records"), override_num_blocks=-(-len(missing) // BATCH))
    try:
        dataset.map_batches(_Decoder(root, spec.input_size), batch_size=None, num_cpus=SIDE_CPUS).map_batches(
            _EngineWorker,
            fn_constructor_args=(spec, engine, placement.threads),
            batch_size=BATCH,
            compute=ray.data.ActorPoolStrategy(size=placement.workers),
            num_cpus=placement.num_cpus,
            num_gpus=placement.num_gpus,
        ).write_datasink(FeatureTableSink(folder), ray_remote_args={"num_cpus": SIDE_CPUS})
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, SprueError | OSError):
            # Ray adds lines about trying again.
            raise SprueError(str(cause).splitlines()[0]) from error
        raise
