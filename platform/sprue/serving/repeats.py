"""Requests whose replica dies are given to another one by Ray Serve's proxy: to score an image twice does no harm."""

import time
from collections import deque

from starlette.types import ASGIApp, Message, Receive, Scope, Send

REPEATS = 2
"""How often a request is given to another replica."""

MAX_AGE_S = 10.0
"""An older request is not: by default its answer is of no use any longer."""

MAX_BYTES = 256 * 2**20
"""Of the bodies of all requests on their way that are kept for it."""


class Repeating:
    """Gives a request to score, or to read, to another replica if its replica dies before the answer begins.

    Of such a request Ray Serve's proxy says nothing.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._kept = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http" or not (scope["method"] == "GET" or scope["path"].endswith("/score")):
            await self._app(scope, receive, send)
            return
        request, end, has_begun = _Request(self, receive), time.monotonic() + MAX_AGE_S, False

        async def send_and_see(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            for _ in range(1 + REPEATS):
                await self._app(dict(scope), request.replayed(), send_and_see)
                if has_begun or not request.is_repeatable or time.monotonic() > end:
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
