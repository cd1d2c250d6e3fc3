"""What Ray Serve's proxy refuses by itself: no replica, and little of the proxy, spends time on it.

A request takes the proxy some milliseconds. So where many clients come at once, or come back at once, the proxy is what
they wait for. It refuses them before it does anything for them.
"""

import asyncio
import math
import random
import time
from collections.abc import Callable
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sprue.serving.errors import BUSY, error_response

FORWARDED = ("forwarded", "via", "x-forwarded-for")
"""Headers of requests that come through another proxy, whose connections belong to many clients."""

MAX_TURNS = 10_000
"""Connections that are remembered."""

MAX_BEHIND_S, FEW = 0.2, 64
"""How far the proxy may be behind, where it has more requests than these: what a replica takes on, twice."""

TICK_S = 0.05
MAX_RETRY_AFTER_S = 15
"""As a replica's: clients of a crowd come back one after the other."""


class Shedding:
    """Refuses requests to score that come before their Retry-After is over, and a crowd that the proxy can't follow.

    Clients that keep to Retry-After are not concerned by the first. It knows a client by its connection.
    """

    def __init__(self, app: ASGIApp, now: Callable[[], float] = time.monotonic) -> None:
        self._app, self._now = app, now
        self._turns: dict[tuple[str, int], float] = {}
        self._in_flight = 0
        self._ticked: float | None = None
        self._ticker: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http" or not scope["path"].endswith("/score"):
            await self._app(scope, receive, send)
            return
        self._ticker = self._ticker or asyncio.create_task(self._tick())
        connection = _connection(scope)
        left_s = self._turns.get(connection, 0.0) - self._now() if connection else 0.0
        if left_s > 0:
            await _refuse("this client was asked to wait", math.ceil(left_s), scope, receive, send)
        elif self._in_flight >= FEW and self.behind_s() > MAX_BEHIND_S:
            retry_s = random.randint(1, MAX_RETRY_AFTER_S)
            self._remember(connection, retry_s)
            await _refuse(f"{self._in_flight} requests are on their way", retry_s, scope, receive, send)
        else:
            self._in_flight += 1
            try:
                await self._pass_on(connection, scope, receive, send)
            finally:
                self._in_flight -= 1

    def behind_s(self) -> float:
        """How long what is to be done at once has been waiting to be done."""
        return 0.0 if self._ticked is None else self._now() - self._ticked - TICK_S

    async def _tick(self) -> None:
        while True:
            self._ticked = self._now()
            await asyncio.sleep(TICK_S)

    async def _pass_on(self, connection: tuple[str, int] | None, scope: Scope, receive: Receive, send: Send) -> None:
        retry_after = ""

        async def send_and_see(message: Message) -> None:
            nonlocal retry_after
            if message["type"] == "http.response.start" and message["status"] == HTTPStatus.SERVICE_UNAVAILABLE:
                retry_after = Headers(raw=message["headers"]).get("retry-after", "")
            elif retry_after.isdecimal() and f'"code":"{BUSY}"'.encode() in message.get("body", b""):
                self._remember(connection, float(retry_after))
            await send(message)

        await self._app(scope, receive, send_and_see)

    def _remember(self, connection: tuple[str, int] | None, seconds: float) -> None:
        now = self._now()
        if len(self._turns) >= MAX_TURNS:
            self._turns = {each: turn for each, turn in self._turns.items() if turn > now}
        if connection and len(self._turns) < MAX_TURNS:
            self._turns[connection] = now + seconds


def _connection(scope: Scope) -> tuple[str, int] | None:
    """The address and port of a client that makes a request by itself."""
    names = {bytes(name).lower() for name, _ in scope["headers"]}
    alone = scope.get("client") and not any(each.encode() in names for each in FORWARDED)
    return tuple(scope["client"]) if alone else None


async def _refuse(reason: str, retry_s: int, scope: Scope, receive: Receive, send: Send) -> None:
    message, headers = f"{reason}; try again in {retry_s} s", {"Retry-After": str(retry_s)}
    await error_response(HTTPStatus.SERVICE_UNAVAILABLE, BUSY, message, headers)(scope, receive, send)
