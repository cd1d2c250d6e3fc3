"""Whatever Ray Serve's proxy answers, a client reads the service's own error format."""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from sprue.serving.errors import error_response
from sprue.serving.proxy import middlewares


def wrapped(app: Any) -> TestClient:
    """A client of the application behind the middlewares, as Ray Serve applies them."""
    for middleware in middlewares():
        app = middleware.cls(app, *middleware.args, **middleware.kwargs)
    return TestClient(app)


def answer_of(app: Callable[..., Awaitable[None]]) -> Any:
    return wrapped(app).get("/")


@pytest.mark.parametrize(
    ("plain", "status", "code"),
    [(503, 503, "unavailable"), (404, 404, "not_found"), (408, 504, "gateway_timeout")],
)
def test_an_error_in_plain_text_becomes_json(plain: int, status: int, code: str) -> None:
    answer = answer_of(PlainTextResponse("no replica", plain, {"Retry-After": "7"}))
    assert answer.status_code == status
    assert answer.json() == {"error": {"code": code, "message": "no replica"}}
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["retry-after"] == "7"


def test_a_request_that_the_proxy_leaves_without_an_answer_gets_one() -> None:
    async def silent(scope: Any, receive: Any, send: Any) -> None:
        """What Ray Serve does when a replica dies."""

    answer = answer_of(silent)
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "bad_gateway")


def test_other_responses_pass_as_they_are() -> None:
    plain = answer_of(PlainTextResponse("success"))
    assert (plain.status_code, plain.text) == (200, "success")
    own = answer_of(error_response(503, "overloaded", "words", {"Retry-After": "3"}))
    assert own.json() == {"error": {"code": "overloaded", "message": "words"}}
    assert own.headers["retry-after"] == "3"
