"""What Ray Serve's proxy refuses by itself: no replica, and little of the proxy, spends time on it.

To pass a request on takes the proxy and a replica some milliseconds each, also if the replica refuses it. So where many
clients come at once, the replicas would refuse rather than score.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from statistics import fmean

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sprue.serving.errors import BUSY, error_response
from sprue.serving.turns import MAX_RETRY_AFTER_S, Turns

FIRST, FEWEST = 32, 16
"""How many are passed on at first, a replica's places; and at least, a batch."""

PROBE_S = 0.2
"""How often one more is passed on than the replicas are known to take."""

ARRIVAL_S = 0.05
"""How long a body is waited for before its request is passed on, so that those of a burst are counted."""

RECENT = 32
"""Answers whose pace is that of scoring."""


class Shedding:
    """Bounds how many requests to score, whose bodies have arrived, are on their way to replicas and not answered yet.

    The bound follows the replicas: a request that they refuse shows how many are too many, and so does each that is not
    scored in time. Every now and then one more than the bound is passed on: it grows where they take more, and requests
    that hang do not keep all others out.
    """

    def __init__(self, app: ASGIApp, now: Callable[[], float] = time.monotonic) -> None:
        self._app, self._now = app, now
        self._probe_at = 0.0
        self._turns, self._pace = Turns(), Pace()
        self.on_way, self.most = 0, FIRST

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http" or not scope["path"].endswith("/score"):
            await self._app(scope, receive, send)
            return
        request, is_probe = _Request(self, receive, send), self._is_time_to_probe()
        has_place = is_probe or self.on_way < self.most
        if has_place and await request.arrives():
            has_place = is_probe or self.on_way < self.most  # others of a burst may have taken it meanwhile
            if has_place:
                request.begin()
        if not has_place:
            await self._refuse(scope, receive, send)
            return
        try:
            await self._app(scope, request.receive, request.send)
        finally:
            request.end()

    def _is_time_to_probe(self) -> bool:
        """Whether a request is passed on though there is no place, to find out whether the replicas take more."""
        if self.on_way < self.most or self._now() < self._probe_at:
            return False
        self._probe_at = self._now() + PROBE_S
        self.most += 1
        return True

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        retry_s = self._turns.retry_s(self._now(), self.on_way, self._pace.seconds)
        message = f"{self.on_way} requests are waiting to be scored; try again in {retry_s} s"
        headers = {"Retry-After": str(retry_s)}
        await error_response(HTTPStatus.SERVICE_UNAVAILABLE, BUSY, message, headers)(scope, receive, send)

    def begin(self) -> int:
        """A request is on its way; returns how many were before it."""
        self.on_way += 1
        return self.on_way - 1

    def end(self, status: int) -> None:
        """A request is on its way no longer; its status is 0 if its client has left."""
        self.on_way -= 1
        if status == HTTPStatus.OK:
            self._pace.answered(self._now())
        elif status in (0, HTTPStatus.GATEWAY_TIMEOUT):
            self.most = max(FEWEST, self.most - 1)
        if not self.on_way:
            self._pace.pause()

    def refused(self, ahead: int) -> None:
        """A replica had no place for a request, with so many ahead of it."""
        self.most = max(FEWEST, min(self.most, ahead))


class _Request:
    """A request that is passed on."""

    def __init__(self, owner: Shedding, receive: Receive, send: Send) -> None:
        self._owner, self._receive, self._send = owner, receive, send
        self._arrived: deque[Message] = deque()
        self._ahead: int | None = None
        self._has_ended = False
        self._status = 0

    async def arrives(self) -> bool:
        """Reads what comes of the body within a moment; whether that is all of it."""
        with suppress(TimeoutError):
            async with asyncio.timeout(ARRIVAL_S):
                while not self._arrived or self._arrived[-1].get("more_body"):
                    self._arrived.append(await self._receive())
        return bool(self._arrived) and _ends_body(self._arrived[-1])

    async def receive(self) -> Message:
        """Counts it when its body is complete; Ray's proxy may read on when it has given a request up."""
        message = self._arrived.popleft() if self._arrived else await self._receive()
        if _ends_body(message) and not self._has_ended:
            self.begin()
        return message

    def begin(self) -> None:
        """Takes a place, once."""
        if self._ahead is None:
            self._ahead = self._owner.begin()

    async def send(self, message: Message) -> None:
        """Learns from the answer, and ends before it is sent: a client that does not read it keeps no place."""
        if message["type"] == "http.response.start":
            self._status = message["status"]
        elif self._status == HTTPStatus.SERVICE_UNAVAILABLE and f'"code":"{BUSY}"'.encode() in message.get("body", b""):
            self._owner.refused(self._owner.on_way if self._ahead is None else self._ahead)
        self.end()
        await self._send(message)

    def end(self) -> None:
        """Gives its place back, once."""
        if self._ahead is not None and not self._has_ended:
            self._owner.end(self._status)
        self._has_ended = True


def _ends_body(message: Message) -> bool:
    return message["type"] == "http.request" and not message.get("more_body")


class Pace:
    """How long the replicas take for an answer while others wait; longer than any Retry-After, they did not work.

    >>> pace = Pace()
    >>> for at in (10.0, 10.5, 100.0):
    ...     pace.answered(at)
    >>> pace.seconds
    0.5
    """

    def __init__(self) -> None:
        self._last: float | None = None
        self._gaps: deque[float] = deque(maxlen=RECENT)

    @property
    def seconds(self) -> float:
        """Of late; 0 while unknown."""
        return fmean(self._gaps) if self._gaps else 0.0

    def answered(self, now: float) -> None:
        """An answer is made."""
        if self._last is not None and now - self._last < MAX_RETRY_AFTER_S:
            self._gaps.append(now - self._last)
        self._last = now

    def pause(self) -> None:
        """Nothing waits: the time until the next answer is not the replicas'."""
        self._last = None
