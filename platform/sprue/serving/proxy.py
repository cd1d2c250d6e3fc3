"""Errors of Ray Serve's own proxy as JSON, like all others of the service.

The proxy answers with plain text, or not at all, where it reaches no replica. It takes middlewares from the function
that ``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`` names in the environment of the node it runs on:
`sprue.stages.runtime.connect_ray` sets it to ``sprue.serving.proxy:middlewares`` for a Ray that it starts.
"""

from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sprue.serving.errors import error_response
from sprue.serving.repeats import Repeating
from sprue.serving.shedding import Shedding


def middlewares() -> list[Middleware]:
    """What Ray Serve's proxy runs around itself."""
    return [Middleware(Repeating), Middleware(JsonErrors), Middleware(Shedding)]


class JsonErrors:
    """Replaces errors in plain text, and those without any response, by an `ErrorBody`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started: Message | None = None
        text = b""

        async def send_json(message: Message) -> None:
            nonlocal started, text
            if message["type"] == "http.response.start":
                started = message
            if started is None or not _is_plain_error(started):
                await send(message)
                return
            text += message.get("body", b"")
            if message["type"] == "http.response.body" and not message.get("more_body"):
                await _respond(started, text.decode(errors="replace"), scope, receive, send)

        await self._app(scope, receive, send_json)
        if started is None:  # the replica has died, or the client has gone
            await _respond({"status": 502, "headers": []}, "the replica failed on this request", scope, receive, send)


def _is_plain_error(start: Message) -> bool:
    kind = Headers(raw=start["headers"]).get("content-type", "text/plain")
    return start["status"] >= 400 and kind.startswith("text/plain")


async def _respond(start: Message, text: str, scope: Scope, receive: Receive, send: Send) -> None:
    status = HTTPStatus(start["status"])
    if status == HTTPStatus.REQUEST_TIMEOUT:  # Ray Serve's word for its own slowness
        status = HTTPStatus.GATEWAY_TIMEOUT
    headers = Headers(raw=[tuple(each) for each in start["headers"]])
    kept = {name: value for name, value in headers.items() if name not in ("content-type", "content-length")}
    code = status.name.lower()
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        code = "unavailable"
        kept.setdefault("retry-after", "1")
    await error_response(status, code, text or status.phrase, kept)(scope, receive, send)
