"""The one process that reads the registry for all replicas, and tells them what to serve: a named Ray actor.

It keeps nothing on disk. When it dies, Ray starts it again, and the replicas tell it what they serve; meanwhile they go
on with that. It ends when there have been no replicas for a while.
"""

import asyncio
import contextlib
import logging
import os
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import mlflow
import ray

from sprue.errors import SprueError
from sprue.serving.agreement import Agreement, Entry, Reports, Term
from sprue.tracking import registry
from sprue.tracking.registry import CHALLENGER, CHAMPION, RegisteredDetector

logger = logging.getLogger(__name__)

NAMESPACE, NAME = "sprue", "coordinator-"

POLL_S = 2.0
"""How long a replica's question waits for a change."""

TICK_S = 0.5
"""Seconds between two looks at who is late or gone."""

REJOIN_S = 5.0
"""How long a coordinator that replaces another waits for a replica that tells it what is served, and then for all of
them, before it agrees on anything new."""

FIRST_S = 900.0
"""How long the coordinator waits for its first replica: Ray Serve tries several times to start one, which is slow on a
busy machine."""

IDLE_S = 60.0
"""The coordinator ends after as long without a replica, once there were any."""

MLFLOW_TIMEOUT_S, MLFLOW_RETRIES = 30, 2
"""Of each of MLflow's requests. By default it tries a server that is down for 4 minutes, and one that never answers for
about 20; as long, the thread that loads a champion is lost to others. Less would be too short for a server that
fetches a large file before it sends the first byte."""


@dataclass(frozen=True)
class CoordinatorSettings:
    """Settings of the coordinator of a service's replicas.

    Attributes:
        tracking_uri: Of the tracking server whose registry is followed.
        refresh_s: Seconds between two looks into the registry.
        challengers: Whether challengers are passed on to the replicas, too.
        name: The actor's. Each start of a service has a coordinator of its own, so that one that replaces another takes
            over nothing from it.
    """

    tracking_uri: str
    refresh_s: float = 15.0
    challengers: bool = False
    name: str = field(default_factory=lambda: f"{NAME}{uuid.uuid4().hex}")


@dataclass(frozen=True)
class Update:
    """What a replica learns.

    Attributes:
        epoch: Names the coordinator's life; another one has forgotten all.
        number: Of the last change.
        entries: What has changed since the replica asked last.
        registry_error: Why the registry could not be read the last time; empty if it could.
        registry_read: Unix time of the last look that succeeded; 0 if there was none.
    """

    epoch: str
    number: int
    entries: Mapping[str, Entry]
    registry_error: str
    registry_read: float


def use_registry(tracking_uri: str) -> None:
    """Points this process, one of Ray's, to a tracking server."""
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(MLFLOW_TIMEOUT_S))
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", str(MLFLOW_RETRIES))
    mlflow.set_tracking_uri(tracking_uri)
    mlflow.set_registry_uri(tracking_uri)


def require_champions() -> list[RegisteredDetector]:
    """The registry's champions; raises SprueError if there are none."""
    return _require_any(registry.champions())


def _require_any(found: list[RegisteredDetector]) -> list[RegisteredDetector]:
    if not found:
        raise SprueError(
            "the registry has no champion to serve: run the pipeline first (`sprue demo` or `sprue run`), "
            "or assign the alias champion to a registered version"
        )
    return found


class Coordinator:
    """Speaks with the replicas; all on one event loop, but for the registry."""

    def __init__(self, refresh_s: float, replaces: bool = False, challengers: bool = False) -> None:
        """Reads the registry each `refresh_s`, and whenever it is asked to.

        Args:
            refresh_s: Seconds between two looks.
            replaces: Another coordinator has died, and replicas may know what is served.
            challengers: Whether challengers are looked for, too.
        """
        self.agreement = Agreement()
        self._epoch = uuid.uuid4().hex
        self._refresh_s, self._aliases = refresh_s, [CHAMPION, CHALLENGER] if challengers else [CHAMPION]
        self._error, self._read = "", 0.0
        self._look_wanted, self._looking = asyncio.Event(), asyncio.Lock()
        self._changed = asyncio.Condition()
        self._joined, self._decides_at = asyncio.Event(), 0.0
        if not replaces:
            self._joined.set()

    async def join(self, follower: str, terms: Mapping[str, Term]) -> Update:
        """Takes on a replica that serves `terms`, none if it has just started, and tells it all that is agreed."""
        if terms:
            self.agreement.adopt(terms)
            self._begin()
        try:
            await asyncio.wait_for(self._joined.wait(), REJOIN_S)
        except TimeoutError:  # none is left
            self._begin()
        async with self._looking:
            if not self._read:
                await self._look()
        self.agreement.record(follower, {})
        return self._update(0)

    async def follow(self, follower: str, epoch: str, seen: int, reports: Reports) -> Update | None:
        """Waits a moment for changes after the number `seen`, and tells them.

        `reports` are all of the replica's. None if the replica has to join first: this process is new.
        """
        if epoch != self._epoch:
            return None
        await self.report(follower, epoch, reports)
        deadline = time.monotonic() + POLL_S
        async with self._changed:
            while self.agreement.number <= seen and (left_s := deadline - time.monotonic()) > 0:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), left_s)
        return self._update(seen)

    async def report(self, follower: str, epoch: str, reports: Reports) -> None:
        """Takes in all of a replica's reports."""
        if epoch == self._epoch:
            self.agreement.record(follower, reports)
            await self._decide()

    async def look(self) -> None:
        """Reads the registry now: it is said to have changed."""
        self._look_wanted.set()

    async def run(self) -> None:
        """Follows the registry until there are no replicas any longer."""
        looked, ends = time.monotonic(), time.monotonic() + FIRST_S
        while time.monotonic() < ends:
            if not self._joined.is_set():
                await asyncio.sleep(TICK_S)
                continue
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._look_wanted.wait(), min(TICK_S, self._refresh_s))
            if self._look_wanted.is_set() or time.monotonic() > looked + self._refresh_s:
                self._look_wanted.clear()
                async with self._looking:
                    await self._look()
                looked = time.monotonic()
            await self._decide()
            if self.agreement.followers:
                ends = time.monotonic() + IDLE_S

    async def _look(self) -> None:
        try:
            champions, *challengers = await asyncio.to_thread(registry.with_aliases, *self._aliases)
            self._read = time.time()
            self.agreement.observe(_require_any(champions), *challengers)
            self._error = ""
        except Exception as error:  # what is served goes on
            if str(error) != self._error:
                logger.error("the present champions go on, since the registry fails: %s", error)
            self._error = str(error)

    def _begin(self) -> None:
        if not self._joined.is_set():
            self._decides_at = time.monotonic() + REJOIN_S
            self._joined.set()

    async def _decide(self) -> None:
        if time.monotonic() >= self._decides_at:
            self.agreement.decide()
        async with self._changed:
            self._changed.notify_all()

    def _update(self, seen: int) -> Update:
        return Update(self._epoch, self.agreement.number, self.agreement.changes(seen), self._error, self._read)


@ray.remote(num_cpus=0, max_restarts=-1)
class CoordinatorActor(Coordinator):
    """The coordinator as an actor; see `find_coordinator`."""

    async def __init__(self, settings: CoordinatorSettings, replaces: bool) -> None:  # type: ignore[misc]
        """Begins to follow the registry."""
        use_registry(settings.tracking_uri)
        replaces = replaces or ray.get_runtime_context().was_current_actor_reconstructed
        super().__init__(settings.refresh_s, replaces, settings.challengers)
        self._runner = asyncio.create_task(self._run_and_end())

    async def _run_and_end(self) -> None:
        try:
            await self.run()
        except Exception:  # a defect; Ray starts another one
            logger.exception("the coordinator failed")
            os._exit(1)
        ray.kill(ray.get_runtime_context().current_actor)


def find_coordinator(settings: CoordinatorSettings, replaces: bool = False) -> Any:
    """The coordinator's actor, which is started if there is none; `replaces` as for `Coordinator`."""
    options = {"name": settings.name, "namespace": NAMESPACE, "get_if_exists": True, "lifetime": "detached"}
    return CoordinatorActor.options(**options).remote(settings, replaces)  # type: ignore[attr-defined]


def stop_coordinators() -> None:
    """Ends the coordinators on this cluster, if there are any."""
    for each in ray.util.list_named_actors(all_namespaces=True):
        if each["namespace"] == NAMESPACE and each["name"].startswith(NAME):
            with contextlib.suppress(ValueError):  # it has just ended
                ray.kill(ray.get_actor(each["name"], namespace=NAMESPACE))
