"""Batches come from memory or from a table that is larger than it, each sample once.

Shapes: N samples, B samples of a batch.
"""

import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from upath import UPath

from sprue.errors import SprueError
from sprue.features.tables import FeatureTable, write_part
from sprue.training.dataloader import InMemoryDataLoader, StreamingDataLoader, build_dataloader, read_maps, sample_size


def write_table(folder, samples, views=1, parts=4):
    """A table whose every map holds its image's number; the samples' digests."""
    names = [f"{sample}-{view}" for sample in range(samples) for view in range(views)]
    for part in np.array_split(np.arange(len(names)), parts):
        numbers = part.astype(np.float16)[:, None, None, None]
        maps = [np.broadcast_to(numbers, (len(part), 2, side, side)) for side in (4, 2)]
        write_part(folder, [names[number] for number in part], maps)
    return FeatureTable(folder), [tuple(names[start : start + views]) for start in range(0, len(names), views)]


def numbers_of(batches, index=0):
    return [batch[index][:, 0, 0, 0].int().tolist() for batch in batches]


def flat(numbers):
    return [number for batch in numbers for number in batch]


@pytest.mark.parametrize("limit", [1, 700, 3000, 10**6])
@pytest.mark.parametrize("size", [1, 7, 50])
def test_a_streaming_data_loader_gives_each_sample_once_in_batches_of_one_size(tmp_path, limit, size):
    table, samples = write_table(UPath(tmp_path), 37)
    dataloader = StreamingDataLoader(table, samples[:36], 1, (0, 1), limit)
    assert len(dataloader) == 36
    for batches in (dataloader.ordered(size), dataloader.shuffled(size)):
        batches = list(batches)
        assert [len(batch[0]) for batch in batches] == [size] * (36 // size) + [36 % size] * (36 % size > 0)
        assert numbers_of(batches, 0) == numbers_of(batches, 1)
        assert sorted(flat(numbers_of(batches))) == list(range(36))
    assert flat(numbers_of(dataloader.ordered(5))) == flat(numbers_of(dataloader.ordered(7)))


def test_the_seed_decides_the_order_and_samples_of_distant_parts_meet(tmp_path):
    table, samples = write_table(UPath(tmp_path), 40)
    # Half of the samples fit into a pool, each in a chunk of its own.
    dataloader = StreamingDataLoader(table, samples, 1, (0, 1), 4 * 20 * sample_size(table, 1, (0, 1)))
    orders = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        orders.append(numbers_of(dataloader.shuffled(4)))
    assert orders[0] == orders[1] != orders[2]
    assert all(batch != sorted(batch) for batch in orders[0][:3])


def test_views_stay_together_and_maps_that_are_not_read_are_empty(tmp_path):
    table, samples = write_table(UPath(tmp_path), 9, views=3)
    for dataloader in (
        StreamingDataLoader(table, samples, 3, (1,), 200),
        InMemoryDataLoader(read_maps(table, samples, 3, (1,))),
    ):
        batches = list(dataloader.shuffled(4))
        assert [len(batch) for batch in batches] == [6, 6, 6]
        assert all(len(batch[index]) == 0 for batch in batches for index in (0, 2, 4))
        first, second, third = (numbers_of(batches, index) for index in (1, 3, 5))
        assert sorted(flat(first)) == list(range(0, 27, 3))
        assert second == [[number + 1 for number in batch] for batch in first]
        assert third == [[number + 2 for number in batch] for batch in first]


def test_what_fits_is_held_in_memory_and_what_does_not_is_streamed(tmp_path):
    table, samples = write_table(UPath(tmp_path), 10)
    size = 10 * sample_size(table, 1, (0,))
    assert isinstance(build_dataloader(table, samples, 1, (0,), size), InMemoryDataLoader)
    assert isinstance(build_dataloader(table, samples, 1, (0,), size - 1), StreamingDataLoader)
    with pytest.raises(SprueError, match="has no features of image lost"):
        build_dataloader(table, [("lost",)], 1, (0,), size)
    with pytest.raises(SprueError, match="has no features of image lost"):
        build_dataloader(table, [("lost",)], 1, (0,), 0)


def test_a_failure_to_read_ends_the_iteration(tmp_path):
    table, samples = write_table(UPath(tmp_path), 20)
    dataloader = StreamingDataLoader(table, samples, 1, (0, 1), 700)
    batches = dataloader.ordered(4)
    next(batches)
    for part in tmp_path.glob("*.parquet"):
        part.unlink()
    with pytest.raises(SprueError, match=r"No such file or directory|is not a feature table"):
        list(batches)


def test_training_on_four_times_the_memory_stays_within_it(tmp_path):
    # In a process of its own, whose largest size is what the fit made it.
    script = """
        import resource, sys, numpy as np, torch
        from upath import UPath
        from defectflow import build_flow
        from sprue.config import FitSettings
        from sprue.features.tables import FeatureTable, write_part
        from sprue.training.dataloader import InMemoryDataLoader, StreamingDataLoader, build_dataloader, sample_size
        from sprue.training.loop import train

        LIMIT, shape = 64 * 2**20, (64, 32, 32)
        count = 4 * LIMIT // (2 * 64 * 32 * 32)
        folder = UPath(sys.argv[1])
        names = [str(number) for number in range(count)]
        for start in range(0, count, 64):
            maps = np.random.default_rng(start).normal(size=(min(64, count - start), *shape)).astype(np.float16)
            write_part(folder, names[start : start + 64], [maps])

        def fit(training):
            flow = build_flow("patchflow", channels=(64,), adapted=8, bottleneck=4, neighbourhood=1)
            few = InMemoryDataLoader([torch.zeros(4, *shape, dtype=torch.float16)])
            epochs = []
            settings = FitSettings(epochs=2, batch_size=4)
            train(flow, training, few, settings, torch.device("cpu"), lambda epoch, _: epochs.append(epoch.epoch))
            return epochs

        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10

        table, samples = FeatureTable(folder), [(name,) for name in names]
        fit(InMemoryDataLoader([torch.randn(64, *shape).half()]))
        before = peak()
        dataloader = build_dataloader(table, samples, 1, (0,), LIMIT)
        assert isinstance(dataloader, StreamingDataLoader), type(dataloader)
        assert fit(dataloader) == [1, 2]
        print(count * sample_size(table, 1, (0,)) / LIMIT, (peak() - before) / LIMIT)
    """
    # Memory that is freed goes back at once, so that what is counted is what is held.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    features, grown = map(float, done.stdout.split())
    assert features == 4
    assert grown < 1
