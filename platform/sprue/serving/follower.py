"""A replica's part in what `sprue.serving.coordinator` brings about: it learns what to load and when to serve it."""

import asyncio
import logging
import time
import uuid
from typing import Any

from ray.exceptions import RayActorError

from sprue.errors import SprueError
from sprue.serving.champions import Champions
from sprue.serving.coordinator import POLL_S, CoordinatorSettings, Update, find_coordinator
from sprue.serving.shadow import Shadow

logger = logging.getLogger(__name__)

ANSWER_S = POLL_S + 10.0
"""Time for the coordinator to answer."""

START_S = 120.0
"""Time for it to start and to read the registry."""

RETRY_S = 0.5
REMEMBER_S = 15.0
"""Seconds between two notes of which classes were used last."""


class Follower:
    """Keeps a replica's champions to what is agreed.

    Attributes:
        error: Why the registry, or the coordinator, could not be read the last time; empty if it could.
    """

    def __init__(self, settings: CoordinatorSettings, models: Champions, shadow: Shadow | None = None) -> None:
        """Follows with `models` and perhaps a `shadow`, once it is started."""
        self.error = ""
        self._settings, self._models, self._shadow = settings, models, shadow
        self._name = uuid.uuid4().hex
        self._actor: Any = None
        self._epoch, self._seen = "", 0
        self._registry_read = 0.0
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def registry_age_s(self) -> float:
        """Seconds since the registry was read."""
        return time.time() - self._registry_read

    async def start(self, allow_empty: bool) -> None:
        """Loads what is agreed, and goes on to follow it.

        Raises:
            SprueError: If the registry can't be read, or has no champions and may not be empty; and as
                `sprue.serving.champions.Champions.start`.
        """
        try:
            update = await self._join(replaces=False)
        except RayActorError:  # it has died since it was found
            update = await self._join(replaces=True)
        if not update.entries and not (allow_empty and update.registry_read):
            raise SprueError(update.registry_error)
        self._models.begin(update.entries)
        self._tasks = [asyncio.create_task(each()) for each in (self._follow, self._report, self._remember)]
        await self._models.start()

    async def look(self) -> None:
        """Makes the coordinator look into the registry now."""
        actor = self._actor or await self._find(replaces=True)
        await asyncio.wait_for(actor.look.remote(), ANSWER_S)

    async def _follow(self) -> None:
        while True:
            try:
                update = await self._ask()
                self._models.apply(update.entries)
            except Exception as error:  # what is served goes on
                reason = (
                    f"the replicas' coordinator does not answer: {(str(error) or type(error).__name__).splitlines()[0]}"
                )
                if reason != self.error:
                    logger.error("the present champions go on: %s", reason)
                self.error = reason
                self._actor, self._epoch = None, ""
                await asyncio.sleep(RETRY_S)

    async def _ask(self) -> Update:
        if self._epoch:
            asked = self._actor.follow.remote(self._name, self._epoch, self._seen, self._models.reports)
            update = await asyncio.wait_for(asked, ANSWER_S)
            if update is not None:
                return self._take(update)
        return await self._join(replaces=True)

    async def _join(self, replaces: bool) -> Update:
        self._actor = await self._find(replaces)
        return self._take(await asyncio.wait_for(self._actor.join.remote(self._name, self._models.terms), START_S))

    async def _find(self, replaces: bool) -> Any:
        return await asyncio.to_thread(find_coordinator, self._settings, replaces)

    def _take(self, update: Update) -> Update:
        self._epoch, self._seen = update.epoch, update.number
        if self._shadow:
            self._shadow.apply(update.entries)
        self.error, self._registry_read = update.registry_error, update.registry_read
        return update

    async def _report(self) -> None:
        """Tells at once what has been loaded; `_follow` repeats it where that fails."""
        while True:
            await self._models.reported.wait()
            self._models.reported.clear()
            if self._epoch:
                self._actor.report.remote(self._name, self._epoch, self._models.reports)

    async def _remember(self) -> None:
        while True:
            await asyncio.sleep(REMEMBER_S)
            await self._models.remember_recent()
