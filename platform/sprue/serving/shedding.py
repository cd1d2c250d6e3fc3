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
from sprue.serving.turns import Turns

FEWEST = 16
"""So many are always passed on: a batch."""

FIRST = 32.0
"""So many are passed on at first: a replica's places."""

LENGTHEN_FIRST, LENGTHEN = 1.0, 0.1
"""What an answer adds to how many are passed on, until a replica refuses one, and then: one is refused for ten that are
answered."""

RECENT = 64
"""Answers whose pace is that of scoring."""


class Shedding:
    """Bounds how many requests to score are on their way to replicas: as many as these have been seen to take.

    The bound follows the replicas: one that is refused shows how many are too many, each answer adds a little (additive
    increase after a quick start, as TCP controls congestion). A request is on its way when its body has arrived, so
    slow clients take nobody's place.
    """

    def __init__(self, app: ASGIApp, now: Callable[[], float] = time.monotonic) -> None:
        self._app, self._now = app, now
        self._on_way, self._most, self._lengthen = 0, FIRST, LENGTHEN_FIRST
        self._turns = Turns()
        self._last: float | None = None
        """When the last answer was made, if others were waiting then."""
        self._gaps: deque[float] = deque(maxlen=RECENT)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http" or not scope["path"].endswith("/score"):
            await self._app(scope, receive, send)
        elif self._on_way >= self._most:
            retry_s = self._turns.retry_s(self._now(), self._on_way, self._pace_s())
            message = f"{self._on_way} requests are waiting to be scored; try again in {retry_s} s"
            headers = {"Retry-After": str(retry_s)}
            await error_response(HTTPStatus.SERVICE_UNAVAILABLE, BUSY, message, headers)(scope, receive, send)
        else:
            await self._pass_on(scope, receive, send)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_on_way, status = False, 0

        async def receive_and_count() -> Message:
            nonlocal is_on_way
            message = await receive()
            if not is_on_way and message["type"] == "http.request" and not message.get("more_body"):
                is_on_way = True
                self._on_way += 1
            return message

        async def send_and_learn(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if status == HTTPStatus.OK:
                    self._answered()
            elif status == HTTPStatus.SERVICE_UNAVAILABLE and f'"code":"{BUSY}"'.encode() in message.get("body", b""):
                self._most = max(FEWEST, min(self._most, self._on_way - is_on_way))
                self._lengthen = LENGTHEN
            await send(message)

        try:
            await self._app(scope, receive_and_count, send_and_learn)
        finally:
            self._on_way -= is_on_way

    def _answered(self) -> None:
        now = self._now()
        if self._last is not None:
            self._gaps.append(now - self._last)
        self._last = now if self._on_way > 1 else None
        if 2 * self._on_way >= self._most:  # otherwise, nothing is learned of the bound
            self._most += self._lengthen

    def _pace_s(self) -> float:
        """Seconds an answer while others wait; 0 while unknown."""
        return fmean(self._gaps) if self._gaps else 0.0
