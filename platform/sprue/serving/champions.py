"""Which champions a replica serves: those that replicas have agreed on, which it loads when they are asked for.

Everything here runs on one event loop, but for the loading itself, which has threads of its own: a request waits for
its own class alone. What has to be downloaded has other threads than what has not: while the tracking server is down,
the classes on the disk are served.

A version that is agreed on is served from its instant on, by the clock: each request looks whether it has passed, so
that a replica that is busy does not come late.
"""

import asyncio
import hashlib
import json
import logging
import math
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

import mlflow
from upath import UPath

from sprue.errors import SprueError
from sprue.inference.cache import cache_folder
from sprue.serving.agreement import Entry, Term
from sprue.serving.errors import ApiError
from sprue.serving.loading import Loader, require_complete
from sprue.serving.model_cache import ModelCache, ServedModel
from sprue.store import write_json
from sprue.tracking.names import AmbiguousClassError, UnknownClassError, resolve_name
from sprue.tracking.registry import RegisteredDetector

logger = logging.getLogger(__name__)

LOADERS = 4
"""Champions that are downloaded and loaded at once: most of the time they wait. As many are loaded from the disk."""
NEW_LOADERS = 2
"""Those among them that no request waits for."""
WARM_UP_S = 3.0
"""How long champions are loaded at the start, before there are requests; a few are all loaded by then."""
FIRST_LOAD_S = 60.0
"""How long one of them is waited for: its backbone may have to be converted, and those before it may fail."""
FIRST_RETRY_S, LAST_RETRY_S = 15.0, 900.0
"""Pause after a champion has failed to load; it doubles up to the second with each further failure."""


@dataclass(frozen=True)
class CacheSettings:
    """Settings of the loaded champions.

    Attributes:
        max_bytes: Memory of the flows that are loaded, in each replica.
        pinned: Names of classes that are loaded at the start and stay, whatever they take.
    """

    max_bytes: int = 2 * 2**30
    pinned: tuple[str, ...] = ()


@dataclass(frozen=True)
class Failure:
    """Why a champion can't be loaded, when it is tried again (in `time.monotonic`), and how long that pause is."""

    reason: str
    retry_at: float
    pause_s: float


class Champions:
    """The champions of all classes; as many are loaded as fit into memory."""

    def __init__(self, settings: CacheSettings, threads: int) -> None:
        """Starts empty; engines run `threads` CPU threads."""
        self._settings = settings
        self.loader = Loader(threads)
        """Loads champions, and whatever else shares their engines."""
        self._downloaders = ThreadPoolExecutor(LOADERS, "download")
        self.loaders = ThreadPoolExecutor(LOADERS, "load")
        self._cache = ModelCache(settings.max_bytes)
        self._prepared = ModelCache(settings.max_bytes)  # candidates, until they are served
        self._served: dict[str, Term] = {}  # by the models' names
        self._planned: dict[str, Term] = {}  # what is served next, from its instant on
        self._newest: dict[str, RegisteredDetector] = {}  # the registry's; the same, unless they fail to load
        self._ready: set[RegisteredDetector] = set()  # candidates that can be served
        self._refused: dict[str, str] = {}  # why candidates are not served
        self._failures: dict[RegisteredDetector, Failure] = {}
        self._loading: dict[RegisteredDetector, asyncio.Task[ServedModel | Failure]] = {}
        self._new: dict[RegisteredDetector, asyncio.Task[None]] = {}  # on their way to be loaded
        self._new_loaders = asyncio.Semaphore(NEW_LOADERS)
        self._recent: dict[str, None] = {}  # names of models, the most recently used last
        self._written: list[str] = []
        self.reported = asyncio.Event()
        """Set when a candidate has been loaded or has failed to load."""

    def begin(self, entries: Mapping[str, Entry]) -> None:
        """Takes what is agreed at the start; nothing is loaded yet."""
        self._take(entries)
        self._switch(now=math.inf)

    async def start(self) -> None:
        """Loads what is pinned and what was used last, for a few seconds.

        Raises:
            SprueError: If none can be loaded, or a pinned class is unknown.
        """
        pinned = [resolve_name(name, list(self._served)) for name in self._settings.pinned]
        self._cache = ModelCache(self._settings.max_bytes, pinned)
        self._prepared = ModelCache(self._settings.max_bytes, pinned)
        for name in pinned:
            await self._load_served(name, is_used=True)
        if self._cache.bytes > self._settings.max_bytes:
            logger.warning("pinned classes take more than the memory for all: others are loaded for each request")
        recent = [name for name in await asyncio.to_thread(_read_recent) if name in self._served]
        self._recent = dict.fromkeys(reversed(recent))
        await self._warm_up(name for name in dict.fromkeys([*recent, *self._served]) if name not in pinned)
        if self._served and not self.available:
            raise SprueError(f"no champion can be loaded: {'; '.join(list(self.failures.values())[:5])}")

    async def _warm_up(self, names: Iterable[str]) -> None:
        """Loads champions until there is no memory or no time left."""
        end = time.monotonic() + FIRST_LOAD_S
        for name in names:
            if time.monotonic() > end:
                return
            if name not in self._served or self._served[name].champion in self._failures:
                continue
            found = await self._load_served(name, is_used=False)
            if isinstance(found, ServedModel):
                end = min(end, time.monotonic() + WARM_UP_S)
                if name not in self._cache:  # there is no room for it
                    return

    async def _load_served(self, name: str, is_used: bool) -> ServedModel | Failure | None:
        """Loads a class's champion; None if the class has been taken away meanwhile."""
        return await self._load(self._served[name].champion, is_used) if name in self._served else None

    def apply(self, entries: Mapping[str, Entry]) -> None:
        """Takes what has changed of what is agreed, and begins to load what is new; to be called every few seconds.

        A new version is served from its instant on; a replica that has not loaded it by then goes on with the old one
        until it has.
        """
        self._take(entries)
        for name, champion in self._newest.items():
            failure = self._failures.get(champion)
            served = self._served.get(name)
            is_new = champion not in self._ready and (served is None or served.champion != champion)
            if (failure.retry_at <= time.monotonic() if failure else is_new) and champion not in self._new:
                self._new[champion] = asyncio.create_task(self._load_new(champion))
        self._switch()

    def _take(self, entries: Mapping[str, Entry]) -> None:
        for name, entry in entries.items():
            self._refused.pop(name, None)
            if entry.term is None:
                for each in (self._served, self._planned, self._newest):
                    each.pop(name, None)
                self._cache.drop(name)
                self._prepared.drop(name)
                continue
            self._planned[name] = entry.term
            self._newest[name] = entry.candidate or entry.term.champion
            if entry.failure:
                self._refused[name] = entry.failure
            if name not in self._served:
                self._check(entry.term.champion)
        self._forget_failures()

    def _switch(self, now: float | None = None) -> None:
        """Serves what is planned and due, by the clock."""
        now = time.time() if now is None else now
        due = [name for name, term in self._planned.items() if term.since <= now]
        for name in due:
            champion, served = self._planned[name].champion, self._served.get(name)
            if served is None or served.champion != champion:
                if served and champion not in self._ready:
                    continue  # the old one goes on until it is
                self._replace_loaded(name, champion)
            self._served[name] = self._planned.pop(name)
        if due:
            self._forget_failures()

    def _replace_loaded(self, name: str, champion: RegisteredDetector) -> None:
        prepared = self._prepared.use(name)
        self._prepared.drop(name)
        self._ready.discard(champion)
        if prepared and prepared.champion == champion:
            self._cache.put(prepared, is_used=False)
        else:  # there was no room to keep it
            self._cache.drop(name)

    async def _load_new(self, champion: RegisteredDetector) -> None:
        """Loads a champion that nobody has asked for, unless it is replaced before its turn."""
        try:
            async with self._new_loaders:
                if self._newest.get(champion.model_name) == champion:
                    await self._load(champion, is_used=False)
        finally:
            del self._new[champion]

    def find(self, name: str) -> RegisteredDetector:
        """The champion of a class, by its model's name or, where that is unambiguous, by the class's.

        Raises:
            ApiError: 404 for an unknown name, 409 for an ambiguous one.
        """
        self._switch()
        # A new class is known before the instant at which it is served.
        if term := self._served.get(name) or self._planned.get(name):
            return term.champion
        known = self._planned | self._served
        try:
            return known[resolve_name(name, list(known))].champion
        except UnknownClassError as error:
            raise ApiError(HTTPStatus.NOT_FOUND, "unknown_class", str(error)) from error
        except AmbiguousClassError as error:
            raise ApiError(HTTPStatus.CONFLICT, "ambiguous_class", str(error)) from error

    async def load(self, champion: RegisteredDetector) -> ServedModel:
        """The loaded champion of a class: the given one, or that which has replaced it since.

        A request that is cancelled does not end the loading, for which others may wait.

        Raises:
            ApiError: 503 if it can't be loaded, or could not a moment ago.
        """
        name = champion.model_name
        self._recent.pop(name, None)
        self._recent[name] = None
        while True:
            champion = self._current(champion)
            if (served := self._cache.use(name)) is not None:
                return served
            failure = self._failures.get(champion)
            waits = failure is not None and failure.retry_at > time.monotonic()
            found = failure if failure and waits else await self._load(champion, is_used=True)
            if self._current(champion) != champion:
                continue  # replaced while it was loaded
            if isinstance(found, ServedModel):
                return found
            message = f"class {name!r} is unavailable: {found.reason}"
            retry = {"Retry-After": str(max(1, math.ceil(found.retry_at - time.monotonic())))}
            raise ApiError(HTTPStatus.SERVICE_UNAVAILABLE, "class_unavailable", message, retry)

    def is_loaded(self, champion: RegisteredDetector) -> bool:
        """Whether a class can be scored at once."""
        return champion.model_name in self._cache

    def _current(self, champion: RegisteredDetector) -> RegisteredDetector:
        """What is served in the place of a champion now."""
        self._switch()
        term = self._served.get(champion.model_name)
        return term.champion if term else champion

    @property
    def available(self) -> list[RegisteredDetector]:
        """The champions that can be scored with, as far as is known; most need not be loaded."""
        self._switch()
        return [term.champion for term in self._served.values() if term.champion not in self._failures]

    def since(self, champion: RegisteredDetector) -> float:
        """The Unix time from which a champion that is available is served."""
        return self._served[champion.model_name].since

    @property
    def terms(self) -> dict[str, Term]:
        """What is agreed, as far as is known here."""
        return self._served | self._planned

    @property
    def reports(self) -> dict[RegisteredDetector, str]:
        """The candidates that have been loaded, with an empty text, or have failed to load, with the reason."""
        terms = self.terms
        candidates = [each for name, each in self._newest.items() if terms[name].champion != each]
        failed = {each: self._failures[each].reason for each in candidates if each in self._failures}
        return {each: "" for each in candidates if each in self._ready} | failed

    @property
    def failures(self) -> dict[str, str]:
        """Why a champion is not served here, by its model's name; replicas name each other's candidates that fail."""
        now = time.time()
        late = {
            name: f"{term.champion} is served by other replicas, and is not loaded here yet"
            for name, term in self._planned.items()
            if term.since <= now and name in self._served
        }
        own = {champion.model_name: failure.reason for champion, failure in self._failures.items()}
        return self._refused | late | own

    @property
    def loaded(self) -> int:
        """Number of champions that are loaded."""
        return len(self._cache)

    @property
    def bytes(self) -> int:
        """Memory of the flows that are loaded."""
        return self._cache.bytes

    @property
    def engines(self) -> int:
        """Number of engines, which champions share."""
        return len(self.loader.engines)

    async def _load(self, champion: RegisteredDetector, is_used: bool) -> ServedModel | Failure:
        """Loads a champion, or joins those who wait for it already."""
        if champion not in self._loading:
            self._loading[champion] = asyncio.create_task(self._load_once(champion, is_used))
        return await asyncio.shield(self._loading[champion])

    async def _load_once(self, champion: RegisteredDetector, is_used: bool) -> ServedModel | Failure:
        try:
            threads = self.loaders if self.loader.is_local(champion) else self._downloaders
            served = await asyncio.get_running_loop().run_in_executor(threads, self.loader, champion)
        except Exception as error:  # one class's failure must not stop the others
            return self._fail(champion, error)
        finally:
            del self._loading[champion]
        self._failures.pop(champion, None)
        name, term = champion.model_name, self._served.get(champion.model_name)
        if term and term.champion == champion:
            self._cache.put(served, is_used)
        elif champion in (self._newest.get(name), self._planned[name].champion if name in self._planned else None):
            self._prepared.put(served, is_used=True)
            self._ready.add(champion)
            self.reported.set()
            self._switch()
        return served

    def _forget_failures(self) -> None:
        """Forgets failed and loaded candidates that nobody asks for any longer."""
        terms = [*self._served.values(), *self._planned.values()]
        present = {*self._newest.values(), *(term.champion for term in terms)}
        self._failures = {champion: each for champion, each in self._failures.items() if champion in present}
        self._ready &= present

    def _check(self, champion: RegisteredDetector) -> None:
        """Reports a champion that can't be loaded as its tags are, without an attempt."""
        try:
            require_complete(champion)
        except SprueError as error:
            self._fail(champion, error)

    def _fail(self, champion: RegisteredDetector, error: Exception) -> Failure:
        before, reason = self._failures.get(champion), f"{champion}: {error}"
        if before is None or before.reason != reason:
            logger.error("champion not loaded: %s", reason, exc_info=None if isinstance(error, SprueError) else error)
        pause_s = min(2 * before.pause_s, LAST_RETRY_S) if before else FIRST_RETRY_S
        self._failures[champion] = Failure(reason, time.monotonic() + pause_s, pause_s)
        self._ready.discard(champion)
        self.reported.set()
        return self._failures[champion]

    async def remember_recent(self) -> None:
        """Writes for the next start which classes were used last."""
        names = list(self._recent)[::-1]
        if names == self._written:
            return
        try:
            await asyncio.to_thread(write_json, UPath(_recent_file()), names)
            self._written = names
        except OSError as error:
            logger.warning("the next start won't know which classes were used last: %s", error)


def _recent_file() -> Path:
    """The file of the classes that a service of this registry has used; replicas on a node share it."""
    registry_key = hashlib.sha256(mlflow.get_registry_uri().encode()).hexdigest()[:16]
    return cache_folder() / "recent" / f"{registry_key}.json"


def _read_recent() -> list[str]:
    """Names of models, the most recently used first; they are only a hint."""
    try:
        found = json.loads(_recent_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []
