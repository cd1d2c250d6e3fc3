"""The queue of classes that wait to be fitted. The worker groups of Ray Train take classes from it.

The queue is a Ray actor. It sees names and metrics alone, so that its process imports neither torch nor a flow.
"""

import asyncio
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

ATTEMPTS = 3
"""How often a fit resumes after its last checkpoint when one of its processes or machines has died."""


@dataclass(frozen=True)
class Event:
    """Something that happened to a class.

    Attributes:
        class_name: The product class.
        epoch: Metrics of a finished epoch; None if the fit has ended.
        failure: Why the fit failed; empty if it did not.
        lost: Whether it failed with its processes, so that another attempt may succeed.
    """

    class_name: str
    epoch: dict[str, Any] | None = None
    failure: str = ""
    lost: bool = False


class ClassQueue:
    """Hands out classes to worker groups and collects the events of their fits.

    A worker group is one run of Ray Train. When one of its processes dies, Ray Train restarts the group, which asks
    again and gets the class that it had, up to `ATTEMPTS` times.
    """

    def __init__(self, class_names: Sequence[str], groups: int, synchronous: bool = False) -> None:
        """Fills the queue.

        Args:
            class_names: The classes in the order in which they are fitted.
            groups: How many worker groups there are.
            synchronous: Whether a fit waits after each epoch for `acknowledge` or `cancel`.
        """
        self.waiting = deque(class_names)
        self.current: dict[int, str] = {}
        self.groups = groups
        self.attempts: Counter[str] = Counter()
        self.errors: dict[str, str] = {}
        self.last_epochs: dict[str, int] = {}
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.synchronous = synchronous
        self.acknowledged: dict[str, asyncio.Event] = {}
        self.cancelled = False

    async def take(self, group: int) -> str | None:
        """The next class of a worker group: the one that it was interrupted at, or a new one; None if there is none."""
        if self.cancelled:
            return None
        current = self.current.get(group)
        if current is not None and self.attempts[current] == ATTEMPTS:
            reason = self.errors.get(current, "the process that fits it dies")
            await self.end(group, current, f"{reason} (tried {ATTEMPTS + 1} times)", lost=True)
        elif current is not None:
            self.attempts[current] += 1
            self.errors.pop(current, None)
            return current
        if not self.waiting:
            return None
        self.current[group] = self.waiting.popleft()
        return self.current[group]

    async def report_epoch(self, class_name: str, metrics: dict[str, Any]) -> bool:
        """Reports an epoch whose checkpoint is stored. Returns whether to continue."""
        self.last_epochs[class_name] = metrics["epoch"]
        acknowledged = self.acknowledged[class_name] = asyncio.Event()
        await self.events.put(Event(class_name, metrics))
        if self.synchronous and not self.cancelled:
            await acknowledged.wait()
        return not self.cancelled

    async def resume(self, class_name: str, metrics: dict[str, Any]) -> bool:
        """Resumes after a checkpoint; reports its epoch if the dead worker had not. Returns whether to continue."""
        if self.attempts[class_name] and metrics["epoch"] > self.last_epochs.get(class_name, 0):
            return await self.report_epoch(class_name, metrics)
        self.last_epochs[class_name] = metrics["epoch"]
        return not self.cancelled

    async def acknowledge(self, class_name: str, epoch: int) -> None:
        """Lets a synchronous fit continue after an epoch."""
        if epoch == self.last_epochs[class_name]:
            self.acknowledged[class_name].set()

    async def cancel(self) -> None:
        """Ends each fit after its current epoch."""
        self.cancelled = True
        for acknowledged in self.acknowledged.values():
            acknowledged.set()

    async def report_error(self, class_name: str, reason: str) -> None:
        """Reports an error that another attempt may not meet; the first counts, errors of other workers follow."""
        self.errors.setdefault(class_name, reason)

    async def end(self, group: int, class_name: str, failure: str = "", lost: bool = False) -> None:
        """Ends a fit; where all processes of a group fail, the first report counts."""
        if self.current.get(group) == class_name:
            del self.current[group]
            await self.events.put(Event(class_name, failure=failure, lost=lost))

    async def close(self, group: int, reason: str) -> None:
        """Closes a worker group; the class that it leaves fails, and after the last group all that still wait."""
        self.groups -= 1
        unfinished = [self.current.pop(group)] if group in self.current else []
        if not self.groups:
            unfinished += self.waiting
            self.waiting.clear()
        for class_name in unfinished:
            await self.events.put(Event(class_name, failure=reason, lost=True))

    async def next_event(self) -> Event:
        """Waits for the next event."""
        return await self.events.get()
