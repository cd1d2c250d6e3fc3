"""Requests whose replica dies are given to another one by Ray Serve's proxy: to score an image twice does no harm."""

import time
from collections import deque
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

REPEATS = 2
"""How often a request is given to another replica."""

MAX_AGE_S = 10.0
"""An older request is not: by default its answer is of no use any longer."""

MAX_BYTES = 256 * 2**20
"""Of the bodies of all requests on their way that are kept for it."""


class Repeating:
    """Gives a request to score, or to read, to another replica if its replica fails before the answer begins.

    A replica's own errors are JSON; what Ray Serve says of one that has died is plain text, or nothing.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._kept = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http" or not (scope["method"] == "GET" or scope["path"].endswith("/score")):
            await self._app(scope, receive, send)
            return
        request, end = _Request(self, receive), time.monotonic() + MAX_AGE_S
        try:
            for left in range(REPEATS, -1, -1):
                attempt = _Attempt(send, request, end if left else 0.0)
                await self._app(dict(scope), request.replayed(), attempt.send)
                if not attempt.is_to_repeat():
                    return
        finally:
            self._kept -= request.bytes

    def keep(self, size: int) -> bool:
        """Whether there is room for more of a body."""
        if self._kept + size > MAX_BYTES:
            return False
        self._kept += size
        return True


class _Request:
    """A request's messages, kept so that they can be read again."""

    def __init__(self, owner: Repeating, receive: Receive) -> None:
        self._owner, self._receive = owner, receive
        self._messages: list[Message] = []
        self.bytes = 0
        self.is_repeatable = True

    def replayed(self) -> Receive:
        """Reads the request from its beginning."""
        past = deque(self._messages)

        async def receive() -> Message:
            if past:
                return past.popleft()
            message = await self._receive()
            size = len(message.get("body", b""))
            if message["type"] == "http.disconnect" or not self.is_repeatable or not self._owner.keep(size):
                self.is_repeatable = False  # the client has gone, or there is no room
            else:
                self._messages.append(message)
                self.bytes += size
            return message

        return receive


class _Attempt:
    """Passes an answer on, unless it says that the replica has failed and the request can be repeated."""

    def __init__(self, send: Send, request: _Request, end: float) -> None:
        self._send, self._request, self._end = send, request, end
        self._has_begun = self._is_held = False

    async def send(self, message: Message) -> None:
        if not self._has_begun and message["type"] == "http.response.start":
            self._is_held = _is_failure(message) and self.is_to_repeat()
            self._has_begun = True
        if not self._is_held:
            await self._send(message)

    def is_to_repeat(self) -> bool:
        """Whether nothing has been passed on, and another attempt makes sense."""
        return (self._is_held or not self._has_begun) and self._request.is_repeatable and time.monotonic() < self._end


def _is_failure(start: Message) -> bool:
    kind = Headers(raw=start["headers"]).get("content-type", "text/plain")
    return start["status"] == HTTPStatus.INTERNAL_SERVER_ERROR and kind.startswith("text/plain")
