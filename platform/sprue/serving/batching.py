"""Dynamic batching: requests that arrive while a batch is processed form the next batch."""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")

RECENT = 0.2
"""Weight of the last batch in the moving average of a task's time."""


class Batcher(Generic[Task, Result]):
    """Runs a function, one call at a time in a thread, on all tasks that have arrived since its last call.

    `ray.serve.batch` closes a batch a fixed time after its first request, even while the previous batch is processed:
    a single request waits in vain, and under load batches of one or two queue up. Here a batch is closed when the
    function is free, so that a single request does not wait and batches grow with the load.

    >>> async def double_three() -> list[tuple[int, int]]:
    ...     batcher = Batcher[int, int](lambda tasks: [2 * task for task in tasks], max_size=16)
    ...     return await asyncio.gather(*(batcher(task) for task in range(3)))
    >>> asyncio.run(double_three())
    [(0, 3), (2, 3), (4, 3)]
    """

    def __init__(self, function: Callable[[Sequence[Task]], Sequence[Result]], max_size: int) -> None:
        """Starts on the running event loop; the function returns as many results as it gets tasks, in their order."""
        self._function, self._max_size = function, max_size
        self.seconds_per_task = 0.0
        """A moving average over the last batches; 0 before the first."""
        self.has_failed = False
        """Whether the last batch has."""
        # Not asyncio's own pool, whose few threads may all wait for a store.
        self._thread = ThreadPoolExecutor(1, "score")
        self._queue: asyncio.Queue[tuple[Task, asyncio.Future[tuple[Result, int]]]] = asyncio.Queue()
        self._worker = asyncio.create_task(self._work())

    async def __call__(self, task: Task) -> tuple[Result, int]:
        """The result of a task, and the size of its batch; raises what the function raised for the batch.

        A task whose caller is cancelled (its client has gone, or its deadline has passed) before its batch begins is
        dropped.
        """
        future = asyncio.get_running_loop().create_future()
        self._queue.put_nowait((task, future))
        return await future

    async def _work(self) -> None:
        while True:
            batch: list[tuple[Task, asyncio.Future[tuple[Result, int]]]] = []
            while not batch or (len(batch) < self._max_size and not self._queue.empty()):
                task, future = await self._queue.get()
                if not future.cancelled():
                    batch.append((task, future))
            await self._run(batch)

    async def _run(self, batch: Sequence[tuple[Task, "asyncio.Future[tuple[Result, int]]"]]) -> None:
        started = time.perf_counter()
        try:
            tasks = [task for task, _ in batch]
            results = await asyncio.get_running_loop().run_in_executor(self._thread, self._function, tasks)
        except Exception as error:
            self.has_failed = True
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
            return
        self.has_failed = False
        seconds = (time.perf_counter() - started) / len(batch)
        self.seconds_per_task += (seconds - self.seconds_per_task) * (RECENT if self.seconds_per_task else 1.0)
        for result, (_, future) in zip(results, batch, strict=True):
            # A client that has disconnected meanwhile has cancelled its future.
            if not future.done():
                future.set_result((result, len(batch)))
