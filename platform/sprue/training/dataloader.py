"""Data loaders of stored features: from memory, or streamed from a feature table that is larger than it.

Random orders come from torch's global generator, so that the loop's seed decides them.

Shapes: N samples, B samples of a batch, C channels, H rows, W columns of a map.
"""

import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sprue.data.samples import Sample
from sprue.features.tables import ROW_GROUP_BYTES, FeatureTable

COPIES = 5
"""Pools that fit into a streaming data loader's memory: the current one, its shuffled rows, the next one as the table's
bytes and as maps, and room for batches."""


class DataLoader(Protocol):
    """Batches of samples' stored maps, [B, C, H, W] each; a map that the flow does not read is empty."""

    def __len__(self) -> int:
        """How many samples there are."""
        ...

    def ordered(self, size: int) -> Iterator[list[Tensor]]:
        """Batches of all samples, in an order that is always the same."""
        ...

    def shuffled(self, size: int) -> Iterator[list[Tensor]]:
        """Batches of all samples, each sample once, in a random order."""
        ...


class InMemoryDataLoader:
    """Samples in memory."""

    def __init__(self, maps: Sequence[Tensor]) -> None:
        """Takes maps [N, C, H, W], without a copy; those that the flow does not read may be empty."""
        self.maps = list(maps)

    @classmethod
    def of(cls, maps: Sequence[NDArray[np.float16]]) -> "InMemoryDataLoader":
        """A data loader of numpy's maps, without a copy."""
        with warnings.catch_warnings():
            # Ray's shared memory is read-only, and nothing writes to it.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return cls([torch.from_numpy(map_NCHW) for map_NCHW in maps])

    def __len__(self) -> int:
        """How many samples there are."""
        return max(len(map_NCHW) for map_NCHW in self.maps)

    def ordered(self, size: int) -> Iterator[list[Tensor]]:
        """See `DataLoader`."""
        return (_take(self.maps, rows) for rows in torch.split(torch.arange(len(self)), size))

    def shuffled(self, size: int) -> Iterator[list[Tensor]]:
        """See `DataLoader`."""
        return (_take(self.maps, rows) for rows in torch.split(torch.randperm(len(self)), size))


class StreamingDataLoader:
    """Samples that are read from a feature table during the fit, a pool at a time, within a limit of memory.

    A pool consists of chunks; a chunk is about one row group of the table. Chunks come in random order, and the samples
    of a pool are shuffled. A thread reads the next pool ahead.
    """

    def __init__(
        self, table: FeatureTable, samples: Sequence[Sample], views: int, indices: Sequence[int], limit: int
    ) -> None:
        """Cuts the samples into chunks.

        Args:
            table: The class's features.
            samples: The digests of each sample's images.
            views: Images of a sample.
            indices: Indices of the maps that the flow reads.
            limit: Bytes that the data loader may hold.
        """
        self.table, self.views, self.indices = table, views, tuple(indices)
        sample_bytes = sample_size(table, views, indices)
        pool = max(1, limit // (COPIES * sample_bytes))
        chunk = max(1, min(pool, ROW_GROUP_BYTES // table.image_bytes))
        stored = sorted(samples, key=lambda sample: table.location(sample[0]))
        self.chunks = [stored[start : start + chunk] for start in range(0, len(stored), chunk)]
        self.chunks_a_pool = pool // chunk

    def __len__(self) -> int:
        """How many samples there are."""
        return sum(map(len, self.chunks))

    def ordered(self, size: int) -> Iterator[list[Tensor]]:
        """See `DataLoader`."""
        return _recut(self._pools(torch.arange(len(self.chunks))), size)

    def shuffled(self, size: int) -> Iterator[list[Tensor]]:
        """See `DataLoader`."""
        pools = self._pools(torch.randperm(len(self.chunks)))
        return _recut((_take(pool, torch.randperm(max(map(len, pool)))) for pool in pools), size)

    def _pools(self, order: Tensor) -> Iterator[list[Tensor]]:
        groups = torch.split(order, self.chunks_a_pool)
        with ThreadPoolExecutor(1, thread_name_prefix="dataloader") as reader:
            ahead = reader.submit(self._read, groups[0])
            for following in groups[1:]:
                pool = ahead.result()
                ahead = reader.submit(self._read, following)
                yield pool
            yield ahead.result()

    def _read(self, chunks: Tensor) -> list[Tensor]:
        samples = [sample for number in chunks.tolist() for sample in self.chunks[number]]
        return read_maps(self.table, samples, self.views, self.indices)


def build_dataloader(
    table: FeatureTable, samples: Sequence[Sample], views: int, indices: Sequence[int], limit: int
) -> DataLoader:
    """An in-memory data loader if the samples take at most `limit` bytes, else a streaming one.

    Args:
        table: The class's features.
        samples: The digests of each sample's images.
        views: Images of a sample.
        indices: Indices of the maps that the flow reads.
        limit: Bytes that the data loader may hold.

    Raises:
        SprueError: If an image is not in the table.
    """
    if len(samples) * sample_size(table, views, indices) <= limit:
        return InMemoryDataLoader(read_maps(table, samples, views, indices))
    return StreamingDataLoader(table, samples, views, indices, limit)


def sample_size(table: FeatureTable, views: int, indices: Sequence[int]) -> int:
    """Bytes of a sample's maps that a flow reads."""
    return views * sum(2 * torch.Size(table.shapes[index]).numel() for index in indices)


def read_maps(table: FeatureTable, samples: Sequence[Sample], views: int, indices: Sequence[int]) -> list[Tensor]:
    """Samples' maps [N, C, H, W], those of their first views, then those of their second ...; see `DataLoader`."""
    return [torch.from_numpy(map_NCHW) for map_NCHW in table.read_samples(samples, views, indices)]


def _take(maps: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
    return [map_NCHW[rows] if len(map_NCHW) else map_NCHW for map_NCHW in maps]


def _recut(pools: Iterator[list[Tensor]], size: int) -> Iterator[list[Tensor]]:
    """Batches of one size from pools of any size; the last may be smaller."""
    rest: list[Tensor] = []
    for pool in pools:
        count = max(map(len, pool))
        start = 0
        if rest:
            start = min(count, size - max(map(len, rest)))
            rest = [torch.cat([old, new[:start]]) for old, new in zip(rest, pool, strict=True)]
            if max(map(len, rest)) < size:
                continue
            yield rest
        last = start + (count - start) // size * size
        for first in range(start, last, size):
            yield [map_NCHW[first : first + size] for map_NCHW in pool]
        # A copy, so that the rest does not keep the whole pool in memory.
        rest = [map_NCHW[last:].clone() for map_NCHW in pool] if last < count else []
    if rest:
        yield rest
