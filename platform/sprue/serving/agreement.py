"""What replicas agree on: which version of each class all of them serve, and from which instant on.

The registry's new champion of a class becomes its candidate. Every replica loads it beside the version that it serves,
and reports it. When all replicas that live have it, they switch at one instant, which lies a little ahead so that each
knows of it by then. If one of them can't load it, the old version stays everywhere.

This is the bookkeeping alone; `sprue.serving.coordinator` reads the registry and speaks with the replicas.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from sprue.tracking.registry import RegisteredDetector

SWITCH_S = 0.5
"""How far ahead the instant of a switch lies: much longer than a message to a replica takes."""

LEASE_S = 6.0
"""A replica that has not reported for as long is not waited for."""

WAIT_S = 120.0
"""How long a replica is waited for that lives and neither has a candidate nor has failed to load it. A download from a
server that never answers has failed by then (95 s)."""


@dataclass(frozen=True)
class Term:
    """A version that is served, and the Unix time from which it is."""

    champion: RegisteredDetector
    since: float


@dataclass(frozen=True)
class Entry:
    """What is agreed about a class.

    Attributes:
        number: Of the change that has led to it; numbers grow.
        term: What is served; None if the class is not served any longer.
        candidate: What replicas are to load, so that it can be served.
        failure: Why a replica can't load the candidate; empty if none has failed.
        challenger: What is scored with on the quiet, if anything.
    """

    number: int
    term: Term | None
    candidate: RegisteredDetector | None = None
    failure: str = ""
    challenger: RegisteredDetector | None = None


Reports = Mapping[RegisteredDetector, str]
"""The candidates that a replica has loaded (an empty text) or has failed to load (the reason)."""


@dataclass
class _Follower:
    reported_at: float
    reports: Reports = field(default_factory=dict)


class Agreement:
    """The entries of all classes, by their models' names.

    Attributes:
        number: Of the last change.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        """Starts without a class; `clock` tells the Unix time."""
        self.number = 0
        self._clock = clock
        self._entries: dict[str, Entry] = {}
        self._followers: dict[str, _Follower] = {}
        self._asked: dict[RegisteredDetector, float] = {}
        self._challengers: dict[str, RegisteredDetector] = {}

    def changes(self, seen: int) -> dict[str, Entry]:
        """The entries that have changed since a number."""
        return {name: entry for name, entry in self._entries.items() if entry.number > seen}

    def adopt(self, terms: Mapping[str, Term]) -> None:
        """Takes over what a replica serves, where it is newer than what is known here: this process is new."""
        for name, term in terms.items():
            entry = self._entries.get(name)
            if entry is None or (entry.term and entry.term.since < term.since):
                self._put(name, term)

    def observe(self, champions: Iterable[RegisteredDetector], challengers: Iterable[RegisteredDetector] = ()) -> None:
        """Takes in what the registry has. A class without a version to go on with is served at once."""
        self._challengers = {each.model_name: each for each in challengers}
        found, starts = {each.model_name: each for each in champions}, self._clock() + (SWITCH_S if self.number else 0)
        for name, entry in list(self._entries.items()):
            if name not in found and entry.term:
                self._put(name, None)
        for name, champion in found.items():
            known = self._entries.get(name)
            if known is None or known.term is None:
                self._put(name, Term(champion, starts))
            elif champion == known.term.champion:
                if known.candidate:  # the registry has gone back to what is served
                    self._put(name, known.term)
            elif champion != known.candidate:
                self._put(name, known.term, champion)
        for name, entry in list(self._entries.items()):
            if entry.term and entry.challenger != self._challengers.get(name):
                self._put(name, entry.term, entry.candidate, entry.failure)
        candidates = {entry.candidate for entry in self._entries.values() if entry.candidate}
        self._asked = {each: self._asked.get(each, self._clock()) for each in candidates}

    def record(self, follower: str, reports: Reports) -> None:
        """Takes in what a replica says; all of what it has loaded and failed to load."""
        self._followers[follower] = _Follower(self._clock(), reports)

    @property
    def followers(self) -> int:
        """How many replicas live."""
        return len(self._live())

    def decide(self) -> None:
        """Agrees on the candidates that can be served."""
        live = self._live()
        for name, entry in list(self._entries.items()):
            if entry.term is None or entry.candidate is None:
                continue
            reports = [each.reports.get(entry.candidate) for each in live]
            failure = next((each for each in reports if each), "")
            ready, now = reports.count(""), self._clock()
            is_late = now > self._asked[entry.candidate] + WAIT_S
            if ready and not failure and (ready == len(live) or is_late):
                self._put(name, Term(entry.candidate, now + SWITCH_S))
            elif failure != entry.failure:
                self._put(name, entry.term, entry.candidate, failure)

    def _live(self) -> list[_Follower]:
        oldest = self._clock() - LEASE_S
        self._followers = {name: each for name, each in self._followers.items() if each.reported_at >= oldest}
        return list(self._followers.values())

    def _put(
        self, name: str, term: Term | None, candidate: RegisteredDetector | None = None, failure: str = ""
    ) -> None:
        self.number += 1
        self._entries[name] = Entry(self.number, term, candidate, failure, self._challengers.get(name))
