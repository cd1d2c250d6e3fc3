"""Requests that come in while the engine is busy are worked on together when it is free."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


class Batcher(Generic[Task, Result]):
    """Runs a function, one call at a time in a thread, on all tasks that have come in since its last call.

    `ray.serve.batch` closes a batch a fixed time after its first request, even while the batch before is worked on:
    a lone request waits for nothing, and under load batches of one or two stand in line. Here a batch is closed when
    its turn comes, so that a lone request does not wait and batches grow with the load.

    >>> async def double_three() -> list[tuple[int, int]]:
    ...     batcher = Batcher[int, int](lambda tasks: [2 * task for task in tasks], max_size=16)
    ...     return await asyncio.gather(*(batcher(task) for task in range(3)))
    >>> asyncio.run(double_three())
    [(0, 3), (2, 3), (4, 3)]
    """

    def __init__(self, function: Callable[[Sequence[Task]], Sequence[Result]], max_size: int) -> None:
        """Starts the batcher on the running event loop.

        Args:
            function: Takes tasks and returns as many results, in their order.
            max_size: The largest batch.
        """
        self._function = function
        self._max_size = max_size
        self._queue: asyncio.Queue[tuple[Task, asyncio.Future[tuple[Result, int]]]] = asyncio.Queue()
        self._worker = asyncio.create_task(self._work())

    async def __call__(self, task: Task) -> tuple[Result, int]:
        """The result of a task, and the size of the batch that it was in.

        Raises:
            Exception: What the function raised on that batch.
        """
        future = asyncio.get_running_loop().create_future()
        self._queue.put_nowait((task, future))
        return await future

    async def _work(self) -> None:
        while True:
            batch = [await self._queue.get()]
            while len(batch) < self._max_size and not self._queue.empty():
                batch.append(self._queue.get_nowait())
            await self._run([(task, future) for task, future in batch if not future.cancelled()])

    async def _run(self, batch: Sequence[tuple[Task, "asyncio.Future[tuple[Result, int]]"]]) -> None:
        if not batch:
            return
        try:
            results = await asyncio.to_thread(self._function, [task for task, _ in batch])
        except Exception as error:
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
            return
        for result, (_, future) in zip(results, batch, strict=True):
            # A client that went away in the meantime has cancelled its future.
            if not future.done():
                future.set_result((result, len(batch)))
