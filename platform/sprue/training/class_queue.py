"""The queue of classes that wait to be fitted. The worker groups of Ray Train take fits from it.

A class is one fit, or several: one for each fold of its good samples.

The queue is a Ray actor. It sees names and metrics alone, so that its process imports neither torch nor a flow.
"""

import asyncio
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ATTEMPTS = 3
"""How often in a row a fit resumes at the same epoch when one of its processes or machines has died.

Machines that are preempted often do not count as long as the fit finishes an epoch in between.
"""


@dataclass(frozen=True)
class Event:
    """Something that happened to a fit.

    Attributes:
        fit: The fit's name, `sprue.training.spec.FitSpec.name`.
        epoch: Metrics of a finished epoch; None if the fit has ended.
        failure: Why the fit failed; empty if it did not.
        lost: Whether it failed with its processes, so that another attempt may succeed.
    """

    fit: str
    epoch: dict[str, Any] | None = None
    failure: str = ""
    lost: bool = False


class ClassQueue:
    """Hands out fits to worker groups and collects their events.

    When one of the processes of a worker group dies, Ray Train restarts the group, which asks again and gets the fit
    that it had, up to `ATTEMPTS` times without a new epoch.
    """

    def __init__(
        self, fits: Sequence[str], groups: int, synchronous: bool = False, specs: Mapping[str, Any] | None = None
    ) -> None:
        """Fills the queue.

        Args:
            fits: Their names, in the order in which they are fitted.
            groups: How many worker groups there are.
            synchronous: Whether a fit waits after each epoch for `acknowledge` or `cancel`.
            specs: Ray's reference to each fit's `sprue.training.spec.FitSpec`. They are kept here alone: if each worker
                group were given all, Ray would count fits times groups of references.
        """
        self.specs = dict(specs or {})
        self.waiting = deque(fits)
        self.current: dict[int, str] = {}
        self.groups = groups
        self.workers: dict[int, int] = {}
        self.controllers: dict[int, Any] = {}
        self.attempts: Counter[str] = Counter()
        self.resumed: set[str] = set()
        self.progress: Counter[int] = Counter()
        self.errors: dict[str, str] = {}
        self.last_epochs: dict[str, int] = {}
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.synchronous = synchronous
        self.acknowledged: dict[str, asyncio.Event] = {}
        self.cancelled = False

    async def take(self, group: int, workers: int = 1) -> str | None:
        """The next fit of a worker group: the one that it was interrupted at, or a new one; None if there is none.

        A group with more workers than before has been resized, which is no failed attempt; one with fewer lost some.
        """
        if self.cancelled:
            return None
        current = self.current.get(group)
        has_grown = self.workers.get(group, workers) < workers and current not in self.errors
        self.workers[group] = workers
        if current is not None and self.attempts[current] == ATTEMPTS and not has_grown:
            reason = self.errors.get(current, "the process that fits it dies")
            await self.end(group, current, f"{reason} (tried {ATTEMPTS + 1} times)", lost=True)
        elif current is not None:
            if not has_grown:
                self.attempts[current] += 1
            self.resumed.add(current)
            self.errors.pop(current, None)
            return current
        if not self.waiting:
            return None
        self.current[group] = self.waiting.popleft()
        return self.current[group]

    async def spec(self, fit: str) -> Any:
        """Ray's reference to what a fit is."""
        return self.specs[fit]

    async def report_epoch(self, fit: str, metrics: dict[str, Any]) -> bool:
        """Reports an epoch whose checkpoint is stored. Returns whether to continue."""
        self.last_epochs[fit] = metrics["epoch"]
        self.attempts[fit] = 0
        self._advance(fit)
        acknowledged = self.acknowledged[fit] = asyncio.Event()
        await self.events.put(Event(fit, metrics))
        if self.synchronous and not self.cancelled:
            await acknowledged.wait()
        return not self.cancelled

    async def resume(self, fit: str, metrics: dict[str, Any]) -> bool:
        """Resumes after a checkpoint; reports its epoch if the dead worker had not. Returns whether to continue."""
        if fit in self.resumed and metrics["epoch"] > self.last_epochs.get(fit, 0):
            return await self.report_epoch(fit, metrics)
        self.last_epochs[fit] = metrics["epoch"]
        return not self.cancelled

    async def acknowledge(self, fit: str, epoch: int) -> None:
        """Lets a synchronous fit continue after an epoch; nothing is done if it has ended since."""
        if fit in self.acknowledged and epoch == self.last_epochs[fit]:
            self.acknowledged[fit].set()

    async def cancel(self) -> None:
        """Ends each fit after its current epoch."""
        self.cancelled = True
        for acknowledged in self.acknowledged.values():
            acknowledged.set()

    async def report_error(self, fit: str, reason: str) -> None:
        """Reports an error that another attempt may not meet; the first counts, errors of other workers follow."""
        self.errors.setdefault(fit, reason)

    async def end(self, group: int, fit: str, failure: str = "", lost: bool = False) -> None:
        """Ends a fit; where all processes of a group fail, the first report counts."""
        if self.current.get(group) == fit:
            self._advance(fit)
            del self.current[group]
            self._forget(fit)
            await self.events.put(Event(fit, failure=failure, lost=lost))

    async def open(self) -> None:
        """Opens another worker group."""
        self.groups += 1

    async def announce(self, group: int, controller: Any) -> None:
        """Remembers the actor that controls a worker group's latest run of Ray Train."""
        self.controllers[group] = controller

    async def announced(self) -> list[Any]:
        """The actors that control the latest runs of the worker groups that are not closed."""
        return list(self.controllers.values())

    async def finished(self, group: int) -> int:
        """How many epochs and fits a worker group has finished."""
        return self.progress[group]

    def _advance(self, fit: str) -> None:
        self.progress.update(group for group, current in self.current.items() if current == fit)

    async def close(self, group: int, reason: str) -> None:
        """Closes a worker group; the fit that it leaves fails, and after the last group all that still wait."""
        self.groups -= 1
        self.controllers.pop(group, None)
        unfinished = [self.current.pop(group)] if group in self.current else []
        if not self.groups:
            unfinished += self.waiting
            self.waiting.clear()
        for fit in unfinished:
            self._forget(fit)
            await self.events.put(Event(fit, failure=reason, lost=True))

    async def next_event(self) -> Event:
        """Waits for the next event."""
        return await self.events.get()

    def _forget(self, fit: str) -> None:
        """Drops what is no longer needed of a fit that has ended."""
        self.specs.pop(fit, None)
        self.acknowledged.pop(fit, None)
