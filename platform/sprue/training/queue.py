"""The queue of the classes that wait to be fitted, which the runs of Ray Train take them from.

An actor of Ray. It is told names and figures alone, so that its process need not import what a fit is made of.
"""

import asyncio
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

ATTEMPTS = 3
"""How often a fit goes on from its last checkpoint after one of its processes or machines has died."""


@dataclass(frozen=True)
class News:
    """What is heard of a class.

    Attributes:
        class_name: The product class.
        epoch: The figures of an epoch that it has finished; none if its fit has ended.
        failure: Why it can't be fitted; empty if it can, or is.
        lost: Whether it failed with its processes, so that another attempt may end in another way.
    """

    class_name: str
    epoch: dict[str, Any] | None = None
    failure: str = ""
    lost: bool = False


class FitQueue:
    """Gives each slot one class after the other, and passes on what becomes of them.

    A slot is a run of Ray Train. When one of its processes dies, Ray Train starts it anew, and it asks again: it gets
    the class that it had, `ATTEMPTS` times.
    """

    def __init__(self, class_names: Sequence[str], slots: int, lockstep: bool = False) -> None:
        """Makes a queue.

        Args:
            class_names: The classes in the order in which they are to be fitted.
            slots: How many slots there are.
            lockstep: Whether a fit goes on after an epoch only when `heard` or `cancel` is called.
        """
        self.waiting = deque(class_names)
        self.held: dict[int, str] = {}
        self.slots = slots
        self.attempts: Counter[str] = Counter()
        self.reasons: dict[str, str] = {}
        self.last_epochs: dict[str, int] = {}
        self.told: asyncio.Queue[News] = asyncio.Queue()
        self.lockstep = lockstep
        self.go_ons: dict[str, asyncio.Event] = {}
        self.cancelled = False

    async def take(self, slot: int) -> str | None:
        """The class that a slot fits next: the one at which it was interrupted, or another; None if there is none."""
        if self.cancelled:
            return None
        held = self.held.get(slot)
        if held is not None and self.attempts[held] == ATTEMPTS:
            reason = self.reasons.get(held, "the process that fits it dies")
            await self.end(slot, held, f"{reason} (tried {ATTEMPTS + 1} times)", lost=True)
        elif held is not None:
            self.attempts[held] += 1
            self.reasons.pop(held, None)
            return held
        if not self.waiting:
            return None
        self.held[slot] = self.waiting.popleft()
        return self.held[slot]

    async def epoch(self, class_name: str, figures: dict[str, Any]) -> bool:
        """An epoch is finished, and its checkpoint is stored. Says whether the fit is to go on."""
        self.last_epochs[class_name] = figures["epoch"]
        go_on = self.go_ons[class_name] = asyncio.Event()
        await self.told.put(News(class_name, figures))
        if self.lockstep and not self.cancelled:
            await go_on.wait()
        return not self.cancelled

    async def resume(self, class_name: str, figures: dict[str, Any]) -> bool:
        """A fit goes on after an epoch, which is told of if the process that stored it died before it could.

        Says whether the fit is to go on.
        """
        if self.attempts[class_name] and figures["epoch"] > self.last_epochs.get(class_name, 0):
            return await self.epoch(class_name, figures)
        self.last_epochs[class_name] = figures["epoch"]
        return not self.cancelled

    async def heard(self, class_name: str, epoch: int) -> None:
        """What was told of a class's epoch is dealt with."""
        if epoch == self.last_epochs[class_name]:
            self.go_ons[class_name].set()

    async def cancel(self) -> None:
        """Nobody waits for the fits any more: each ends after its epoch."""
        self.cancelled = True
        for go_on in self.go_ons.values():
            go_on.set()

    async def stumble(self, class_name: str, reason: str) -> None:
        """A fit was broken off by an error that another attempt may not meet; other workers' errors follow from it."""
        self.reasons.setdefault(class_name, reason)

    async def end(self, slot: int, class_name: str, failure: str = "", lost: bool = False) -> None:
        """A fit has ended; of a slot's processes that all failed, the first to say so is heard."""
        if self.held.get(slot) == class_name:
            del self.held[slot]
            await self.told.put(News(class_name, failure=failure, lost=lost))

    async def close(self, slot: int, reason: str) -> None:
        """A slot has ended. Where it leaves a class, or the last slot leaves some in the queue, these have failed."""
        self.slots -= 1
        left = [self.held.pop(slot)] if slot in self.held else []
        if not self.slots:
            left += self.waiting
            self.waiting.clear()
        for class_name in left:
            await self.told.put(News(class_name, failure=reason, lost=True))

    async def news(self) -> News:
        """What is heard next, in its order."""
        return await self.told.get()
