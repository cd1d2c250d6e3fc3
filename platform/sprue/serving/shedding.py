"""What Ray Serve's proxy refuses by itself: no replica, and little of the proxy, spends time on it.

To pass a request on takes the proxy and a replica some milliseconds each, also if the replica refuses it. So where many
clients come at once, the replicas would refuse rather than score.
"""

import time
from collections import deque
from collections.abc import Callable
from http import HTTPStatus
from statistics import fmean

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sprue.serving.errors import BUSY, error_response
from sprue.serving.turns import MAX_RETRY_AFTER_S, Turns

FIRST, FEWEST = 32, 16
"""How many are passed on at first, a replica's places; and at least, a batch."""

PROBE_S = 0.2
"""Until one more is passed on than the replicas are known to take."""

RECENT = 64
"""Answers whose pace is that of scoring."""


class Shedding:
    """Bounds how many requests to score, whose bodies have arrived, are on their way to replicas and not answered yet.

    The bound follows the replicas: one that they refuse shows how many are too many, and every now and then one more
    than the bound is passed on, so that it grows where they take more, and no request that hangs keeps others out.
    """

    def __init__(self, app: ASGIApp, now: Callable[[], float] = time.monotonic) -> None:
        self._app, self._now = app, now
        self._on_way, self._most, self._probe_at = 0, FIRST, 0.0
        self._turns = Turns()
        self._answered_at: float | None = None
        """When the last answer was made, while others wait."""
        self._gaps: deque[float] = deque(maxlen=RECENT)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http" or not scope["path"].endswith("/score"):
            await self._app(scope, receive, send)
        elif self._on_way < self._most or self._may_probe():
            await self._pass_on(scope, receive, send)
        else:
            retry_s = self._turns.retry_s(self._now(), self._on_way, fmean(self._gaps) if self._gaps else 0.0)
            message = f"{self._on_way} requests are waiting to be scored; try again in {retry_s} s"
            headers = {"Retry-After": str(retry_s)}
            await error_response(HTTPStatus.SERVICE_UNAVAILABLE, BUSY, message, headers)(scope, receive, send)

    def _may_probe(self) -> bool:
        now = self._now()
        if now < self._probe_at:
            return False
        self._probe_at = now + PROBE_S
        self._most += 1
        return True

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        place, status, has_ended = 0, 0, False

        async def receive_and_count() -> Message:
            nonlocal place
            message = await receive()
            # Ray's proxy may read on after it has given a request up.
            if not place and not has_ended and message["type"] == "http.request" and not message.get("more_body"):
                self._on_way += 1
                place = self._on_way
            return message

        async def send_and_learn(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif status == HTTPStatus.SERVICE_UNAVAILABLE and f'"code":"{BUSY}"'.encode() in message.get("body", b""):
                taken = place - 1 if place else self._on_way
                self._most = max(FEWEST, min(self._most, taken))
            end()  # before it is sent: a client that does not read its answer keeps no place
            await send(message)

        def end() -> None:
            nonlocal has_ended
            if place and not has_ended:
                self._end(status)
            has_ended = True

        try:
            await self._app(scope, receive_and_count, send_and_learn)
        finally:
            end()

    def _end(self, status: int) -> None:
        """A request is no longer on its way."""
        self._on_way -= 1
        if status == HTTPStatus.OK:
            now = self._now()
            if self._answered_at is not None and now - self._answered_at < MAX_RETRY_AFTER_S:
                self._gaps.append(now - self._answered_at)
            self._answered_at = now
        if not self._on_way:
            self._answered_at = None
