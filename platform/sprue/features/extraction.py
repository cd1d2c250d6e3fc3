"""Extraction on Ray Data: decode images, run the backbone, write the tables; stored images are not extracted again.

Shapes: B images, S side of the input, C channels, H rows, W columns of a map.
"""

import hashlib
import logging
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import ray
from botocore.exceptions import BotoCoreError
from numpy.typing import NDArray
from ray.data.block import Block, BlockAccessor
from ray.data.datasource import Datasink
from upath import UPath

from sprue.errors import SprueError
from sprue.features.counter import ImageCounter
from sprue.features.spec_file import write_spec
from sprue.features.tables import FeatureTable, write_part
from sprue.inference.engines import EngineName, build_engine
from sprue.inference.images import model_input, open_image
from sprue.inference.priority import in_background, lower_priority
from sprue.inference.spec import FeatureSpec

logger = logging.getLogger(__name__)

BATCH = 16
"""Images of a backbone call: enough for full speed on a CPU, and small compared with a GPU's memory."""

PART_ROWS = 256
"""Images of a part, at least, if there are as many."""

IO_CPUS = 0.25
"""Cores that a decoding or writing task reserves: a fraction, so that both run beside an engine on two cores. Since an
engine reserves another number, Ray Data does not fuse the decoding into the engine's actor, where it would block it."""

PROGRESS_SECONDS = 10.0
"""Time between two lines of progress."""

Batch = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Extraction:
    """How many images were already stored, how many were extracted, and how long it took."""

    stored: int
    extracted: int
    seconds: float


@dataclass(frozen=True)
class EnginePlacement:
    """The number of engines, the cores and GPUs that each reserves, and the threads that each runs."""

    workers: int
    num_cpus: float
    num_gpus: int
    threads: int


def engine_placement() -> EnginePlacement:
    """One engine for each GPU of the cluster that Ray is connected to, or for each machine if there are no GPUs.

    On CPUs an engine uses all cores of its machine but leaves some unreserved, so that decoding and writing, which take
    a small fraction of the time, are scheduled beside it. It reserves more than half, so that the engines of two jobs
    never hold a machine together and wait for their decoders. On a machine with one core it reserves none.

    Raises:
        SprueError: If the cluster has no CPU.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    if gpus:
        return EnginePlacement(workers=gpus, num_cpus=1, num_gpus=1, threads=1)
    cores = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
    if not cores:
        raise SprueError("the Ray cluster has no CPU; start a node with at least one")
    reserved = min(cores) - 3 * IO_CPUS if min(cores) > 1 else 0
    return EnginePlacement(workers=len(cores), num_cpus=reserved, num_gpus=0, threads=min(cores))


def _decode(batch: Batch, root: UPath, side: int) -> Batch:
    """Reads and decodes images in a Ray task."""
    images = []
    for path, digest in zip(batch["path"], batch["sha256"], strict=True):
        try:
            data = (root / path).read_bytes()
        except OSError as error:
            raise SprueError(f"{root / path} can't be read: {error}") from error
        if hashlib.sha256(data).hexdigest() != digest:
            raise SprueError(f"{root / path} has changed since the manifest was written; run the manifest stage again")
        images.append(model_input(open_image(data, path), side))
    return {"class_name": batch["class_name"], "sha256": batch["sha256"], "image": np.stack(images)}


class _EngineWorker:
    """Runs one engine in a Ray actor."""

    def __init__(self, spec: FeatureSpec, engine: EngineName, threads: int, counter: Any) -> None:
        lower_priority()
        self.engine, self.counter = build_engine(spec, engine, threads), counter

    def __call__(self, batch: Batch) -> Batch:
        maps = self.engine(batch.pop("image"))
        self.counter.add.remote(list(zip(batch["class_name"], batch["sha256"], strict=True)))
        return batch | {f"map_{index}": map_BCHW for index, map_BCHW in enumerate(maps)}


class FeatureTableSink(Datasink[None]):
    """Writes rows of a Ray dataset to their classes' feature tables."""

    def __init__(self, folder: UPath) -> None:
        """Writes below `folder`, whose name is the feature spec's fingerprint."""
        self.folder = folder

    @property
    def min_rows_per_write(self) -> int:
        """Ray Data bundles blocks into one write until they have this many rows."""
        return PART_ROWS

    def write(self, blocks: Iterable[Block], ctx: object) -> None:
        """Writes a part for each class in the blocks."""
        batches = [BlockAccessor.for_block(block).to_numpy() for block in blocks]
        names = sorted((name for name in batches[0] if name.startswith("map_")), key=lambda name: int(name[4:]))
        classes, digests, *maps = (
            np.concatenate([batch[name] for batch in batches]) for name in ["class_name", "sha256", *names]
        )
        for class_name in np.unique(classes):
            rows = classes == class_name
            write_part(self.folder / class_name, digests[rows].tolist(), [map_NCHW[rows] for map_NCHW in maps])


def extract(
    spec: FeatureSpec, images: pd.DataFrame, root: UPath, features: UPath, engine: EngineName = "auto"
) -> Extraction:
    """Extracts the maps of all images that are not stored yet, on the cluster that Ray is connected to.

    Images are the manifest's rows; every node must be able to read their root. The tables are in
    ``<features>/<fingerprint>/<class>``. Logs the number of images about every ten seconds.

    Raises:
        SprueError: If an image is missing or has changed, or the backbone can't be loaded.
    """
    started = time.perf_counter()
    folder = features / spec.fingerprint
    write_spec(folder, spec)
    unique = images[["class_name", "sha256", "path"]].drop_duplicates(["class_name", "sha256"])
    tables = {name: FeatureTable(folder / name) for name in unique["class_name"].unique()}
    missing = unique[
        [digest not in tables[name] for name, digest in zip(unique["class_name"], unique["sha256"], strict=True)]
    ]
    stored = len(unique) - len(missing)
    logger.info("%d images: %d already stored, %d to extract", len(unique), stored, len(missing))
    if len(missing):
        with _progress(len(missing)) as counter:
            _run(spec, missing, root, folder, engine, counter)
    return Extraction(stored, len(missing), time.perf_counter() - started)


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    """Gives the actor of an `ImageCounter`; logs its count every `PROGRESS_SECONDS`, and the total at the end."""
    counter = ray.remote(num_cpus=0)(ImageCounter).remote()
    started, ended = time.perf_counter(), threading.Event()

    def log(images: int) -> None:
        logger.info("%d of %d images, %.1f images/s", images, total, images / (time.perf_counter() - started))

    def log_until_ended() -> None:
        while not ended.wait(PROGRESS_SECONDS):
            with suppress(ray.exceptions.RayError):
                log(ray.get(counter.count.remote(), timeout=PROGRESS_SECONDS))

    thread = threading.Thread(target=log_until_ended, daemon=True)
    thread.start()
    try:
        yield counter
    finally:
        ended.set()
        thread.join()
    log(total)


@contextmanager
def on_ray_data() -> Iterator[None]:
    """What runs inside on Ray Data is quiet but for warnings, and fails as a user's mistake where that is the cause.

    Raises:
        SprueError: If a task or an actor fails with a SprueError or OSError, or can't use an object store; the message
            is one line.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.raise_original_map_exception = True
    # It would warn that they are disabled.
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    for handler in logging.getLogger("ray.data").handlers:
        if handler.name == "console":  # its log files stay complete
            handler.setLevel(logging.WARNING)
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, SprueError | OSError | BotoCoreError):
            # Ray appends lines about retries.
            raise SprueError(str(cause).splitlines()[0]) from error
        raise


def _run(
    spec: FeatureSpec, missing: pd.DataFrame, root: UPath, folder: UPath, engine: EngineName, counter: Any
) -> None:
    placement = engine_placement()
    dataset = ray.data.from_items(missing.to_dict("records"), override_num_blocks=-(-len(missing) // BATCH))
    with on_ray_data():
        decoded = dataset.map_batches(
            in_background(_decode), fn_args=(root, spec.input_size), batch_size=None, num_cpus=IO_CPUS
        )
        decoded.map_batches(
            _EngineWorker,
            fn_constructor_args=(spec, engine, placement.threads, counter),
            batch_size=BATCH,
            compute=ray.data.ActorPoolStrategy(size=placement.workers),
            num_cpus=placement.num_cpus,
            num_gpus=placement.num_gpus,
        ).write_datasink(FeatureTableSink(folder), ray_remote_args={"num_cpus": IO_CPUS})
