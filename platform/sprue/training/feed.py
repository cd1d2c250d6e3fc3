"""Where the training loop's batches come from: memory, or a feature table that is larger than it.

Random orders are drawn from torch's global generator, so that the loop's seed decides them.

Shapes: N samples, B samples of a batch, C channels, H rows, W columns of a map.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from sprue.data.samples import Sample
from sprue.features.tables import ROW_GROUP_BYTES, FeatureTable

COPIES = 5
"""Pools that fit into a streamed feed's memory: one that batches are drawn from, its shuffled rows, and the next one,
which while it is read is there as the table's bytes and as maps; the fifth is room for batches."""


class Feed(Protocol):
    """Stored maps of samples, a batch [B, C, H, W] of each at a time; of maps that the flow does not read, none."""

    def __len__(self) -> int:
        """How many samples there are."""
        ...

    def ordered(self, size: int) -> Iterator[list[Tensor]]:
        """Batches of all samples, in an order that is always the same."""
        ...

    def shuffled(self, size: int) -> Iterator[list[Tensor]]:
        """Batches of all samples, each sample once, in a random order."""
        ...


class MemoryFeed:
    """Samples that are held in memory."""

    def __init__(self, maps: Sequence[Tensor]) -> None:
        """Takes maps [N, C, H, W], without a copy; those that the flow does not read may be empty."""
        self.maps = list(maps)

    def __len__(self) -> int:
        """How many samples there are."""
        return max(len(map_NCHW) for map_NCHW in self.maps)

    def ordered(self, size: int) -> Iterator[list[Tensor]]:
        """See `Feed`."""
        return (_take(self.maps, rows) for rows in torch.split(torch.arange(len(self)), size))

    def shuffled(self, size: int) -> Iterator[list[Tensor]]:
        """See `Feed`."""
        return (_take(self.maps, rows) for rows in torch.split(torch.randperm(len(self)), size))


class StreamedFeed:
    """Samples that are read from a feature table while the flow is fitted, a pool at a time, within a limit of memory.

    A pool consists of chunks, runs of neighbours in the table of about a row group. Chunks come in random order, and a
    pool's samples are shuffled. The next pool is read meanwhile.
    """

    def __init__(
        self, table: FeatureTable, samples: Sequence[Sample], views: int, places: Sequence[int], limit: int
    ) -> None:
        """Cuts the samples into chunks.

        Args:
            table: The class's features.
            samples: The digests of each sample's pictures.
            views: Pictures of a sample.
            places: Which of a picture's maps the flow reads.
            limit: Bytes that the feed may hold.
        """
        self.table, self.views, self.places = table, views, tuple(places)
        sample_bytes = sample_size(table, views, places)
        pool = max(1, limit // (COPIES * sample_bytes))
        chunk = max(1, min(pool, ROW_GROUP_BYTES // table.picture_bytes))
        stored = sorted(samples, key=lambda sample: table.place(sample[0]))
        self.chunks = [stored[start : start + chunk] for start in range(0, len(stored), chunk)]
        self.chunks_a_pool = pool // chunk

    def __len__(self) -> int:
        """How many samples there are."""
        return sum(map(len, self.chunks))

    def ordered(self, size: int) -> Iterator[list[Tensor]]:
        """See `Feed`."""
        return _recut(self._pools(torch.arange(len(self.chunks))), size)

    def shuffled(self, size: int) -> Iterator[list[Tensor]]:
        """See `Feed`."""
        pools = self._pools(torch.randperm(len(self.chunks)))
        return _recut((_take(pool, torch.randperm(max(map(len, pool)))) for pool in pools), size)

    def _pools(self, order: Tensor) -> Iterator[list[Tensor]]:
        groups = torch.split(order, self.chunks_a_pool)
        with ThreadPoolExecutor(1, thread_name_prefix="feed") as reader:
            ahead = reader.submit(self._read, groups[0])
            for following in groups[1:]:
                pool = ahead.result()
                ahead = reader.submit(self._read, following)
                yield pool
            yield ahead.result()

    def _read(self, chunks: Tensor) -> list[Tensor]:
        samples = [sample for number in chunks.tolist() for sample in self.chunks[number]]
        return read_maps(self.table, samples, self.views, self.places)


def open_feed(table: FeatureTable, samples: Sequence[Sample], views: int, places: Sequence[int], limit: int) -> Feed:
    """A feed of samples that are in memory if they take no more than `limit` bytes, and streamed if they do.

    Args:
        table: The class's features.
        samples: The digests of each sample's pictures.
        views: Pictures of a sample.
        places: Which of a picture's maps the flow reads.
        limit: Bytes that the feed may hold.

    Raises:
        SprueError: If a picture is not in the table.
    """
    if len(samples) * sample_size(table, views, places) <= limit:
        return MemoryFeed(read_maps(table, samples, views, places))
    return StreamedFeed(table, samples, views, places, limit)


def sample_size(table: FeatureTable, views: int, places: Sequence[int]) -> int:
    """Bytes of a sample's maps that a flow reads."""
    return views * sum(2 * torch.Size(table.shapes[place]).numel() for place in places)


def read_maps(table: FeatureTable, samples: Sequence[Sample], views: int, places: Sequence[int]) -> list[Tensor]:
    """Samples' maps [N, C, H, W], those of their first views, then those of their second ...; see `Feed`."""
    return [torch.from_numpy(map_NCHW) for map_NCHW in table.read_samples(samples, views, places)]


def _take(maps: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
    return [map_NCHW[rows] if len(map_NCHW) else map_NCHW for map_NCHW in maps]


def _recut(pools: Iterator[list[Tensor]], size: int) -> Iterator[list[Tensor]]:
    """Batches of one size from pools of any; the last is what is left."""
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
        # A copy, so that what is left does not keep the whole pool in memory.
        rest = [map_NCHW[last:].clone() for map_NCHW in pool] if last < count else []
    if rest:
        yield rest
