"""A batch forms while the previous one is processed."""

import asyncio
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from sprue.serving.batching import Batcher


def test_tasks_that_arrive_meanwhile_are_one_batch_of_at_most_its_size() -> None:
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

    # What is cancelled costs no place in a batch.
    assert asyncio.run(run()) == [(0, 1), (10, 4), (30, 4), (40, 4), (50, 4), (60, 2), (70, 2)]
    assert batches == [[0], [1, 3, 4, 5], [6, 7]]


def test_tasks_whose_callers_have_all_gone_are_not_run() -> None:
    free, batches = threading.Event(), []

    def work(tasks: Sequence[int]) -> list[int]:
        batches.append(list(tasks))
        free.wait(10)
        return list(tasks)

    async def run() -> None:
        batcher = Batcher[int, int](work, max_size=4)
        first = asyncio.create_task(batcher(0))
        while not batches:
            await asyncio.sleep(0.001)
        gone = [asyncio.create_task(batcher(task)) for task in range(1, 8)]
        await asyncio.sleep(0.01)
        for each in gone:
            each.cancel()
        free.set()
        await first
        await batcher(8)

    asyncio.run(run())
    assert batches == [[0], [8]]


def test_the_pace_is_that_of_the_last_batches() -> None:
    pauses = iter([0.8, 0.05, 0.05, 0.05])

    def work(tasks: Sequence[int]) -> list[int]:
        time.sleep(next(pauses))
        return list(tasks)

    async def run() -> tuple[float, float, float]:
        batcher = Batcher[int, int](work, max_size=4)
        none = batcher.seconds_per_task
        await asyncio.gather(batcher(1), batcher(2))
        first = batcher.seconds_per_task
        for _ in range(3):
            await asyncio.gather(batcher(1), batcher(2))
        return none, first, batcher.seconds_per_task

    none, first, last = asyncio.run(run())
    assert none == 0
    assert first >= 0.4  # two tasks took 0.8 s
    assert 0.025 <= last < first


def test_a_failing_batch_does_not_stop_the_next() -> None:
    def work(tasks: Sequence[int]) -> list[float]:
        return [1 / task for task in tasks]

    async def run() -> None:
        batcher = Batcher[int, float](work, max_size=4)
        with pytest.raises(ZeroDivisionError):
            await batcher(0)
        assert batcher.has_failed
        assert await batcher(2) == (0.5, 1)
        assert not batcher.has_failed

    asyncio.run(run())


def test_threads_that_wait_for_a_store_hold_up_no_batch() -> None:
    store = threading.Event()

    async def run() -> None:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(1))
        reader = asyncio.create_task(asyncio.to_thread(store.wait, 60))
        await asyncio.sleep(0.01)
        try:
            batcher = Batcher[int, int](list, max_size=4)
            assert await asyncio.wait_for(batcher(1), 10) == (1, 1)
        finally:
            store.set()
        assert await reader

    asyncio.run(run())
