"""Rate limits: how many requests a client may make in a time.

A token bucket for each client, as the time at which it is full again (the generic cell rate algorithm of ATM, ITU-T
I.371): a client is one number, and its Retry-After is exact. Libraries such as ``limits`` keep a list of times or a
counter and its timer for each client, and serve backends that nothing here needs.
"""

import heapq
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

from sprue.errors import SprueError

SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0}
PATTERN = r"^[1-9][0-9]{0,5}/(s|min|h)$"
MAX_CLIENTS = 10_000
"""Clients that are remembered; beyond that, those whose buckets are the fullest are forgotten."""


@dataclass(frozen=True)
class Rate:
    """So many requests at once, and as many again in each `seconds`."""

    requests: int
    seconds: float

    @classmethod
    def of(cls, text: str) -> "Rate":
        """Reads a rate.

        Raises:
            SprueError: If it is none.

        >>> Rate.of("20/s"), Rate.of("100/min")
        (Rate(requests=20, seconds=1.0), Rate(requests=100, seconds=60.0))
        """
        if not re.fullmatch(PATTERN, text):
            raise SprueError(f"{text!r} is no rate; write a number of requests and s, min or h, such as 20/s")
        requests, _, unit = text.partition("/")
        return cls(int(requests), SECONDS[unit])

    def __str__(self) -> str:
        """The rate in words."""
        return f"{self.requests} requests in {self.seconds:g} s"


class RateLimiter:
    """Counts the requests of a replica's clients; each replica grants its share of every rate."""

    def __init__(self, replicas: Callable[[], int] = lambda: 1, now: Callable[[], float] = time.monotonic) -> None:
        """Starts with full buckets; the number of replicas is asked for at each request."""
        self._replicas, self._now = replicas, now
        self._full_at: dict[str, float] = {}

    def wait_s(self, client: str, rate: Rate) -> float:
        """0 for a request that is within the rate, which then counts; otherwise the seconds until one is."""
        now, interval_s = self._now(), rate.seconds / rate.requests * self._replicas()
        empty = now + max(rate.seconds, interval_s)  # of the present rate, which may have been another
        full_at = min(max(self._full_at.get(client, now), now), empty) + interval_s
        wait_s = full_at - empty
        if wait_s > 1e-9:  # rounding is no request
            return wait_s
        self._full_at[client] = full_at
        if len(self._full_at) > MAX_CLIENTS:
            self._forget(now)
        return 0.0

    def _forget(self, now: float) -> None:
        emptiest = heapq.nlargest(MAX_CLIENTS // 2, self._full_at.items(), key=lambda each: each[1])
        self._full_at = {client: full_at for client, full_at in emptiest if full_at > now}
