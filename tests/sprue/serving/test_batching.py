"""Batches form while the one before is worked on."""

import asyncio
import threading
from collections.abc import Sequence

import pytest

from sprue.serving.batching import Batcher


def test_tasks_that_come_in_meanwhile_are_one_batch_of_at_most_its_size() -> None:
    free, batches = threading.Event(), []

    def work(tasks: Sequence[int]) -> list[int]:
        batches.append(list(tasks))
        free.wait(10)
        return [10 * task for task in tasks]

    async def run() -> list[tuple[int, int]]:
        batcher = Batcher[int, int](work, max_size=4)
        first = asyncio.create_task(batcher(0))
        while not batches:
            await asyncio.sleep(0.001)
        others = [asyncio.create_task(batcher(task)) for task in range(1, 8)]
        await asyncio.sleep(0.01)
        others[1].cancel()
        others.pop(1)
        free.set()
        return [await first, *[await other for other in others]]

    assert asyncio.run(run()) == [(0, 1), (10, 3), (30, 3), (40, 3), (50, 3), (60, 3), (70, 3)]
    assert batches == [[0], [1, 3, 4], [5, 6, 7]]


def test_a_failing_batch_fails_alone() -> None:
    def work(tasks: Sequence[int]) -> list[float]:
        return [1 / task for task in tasks]

    async def run() -> None:
        batcher = Batcher[int, float](work, max_size=4)
        with pytest.raises(ZeroDivisionError):
            await batcher(0)
        assert await batcher(2) == (0.5, 1)

    asyncio.run(run())
