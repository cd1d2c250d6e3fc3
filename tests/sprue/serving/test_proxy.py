"""Whatever Ray Serve's proxy answers, a client reads the service's own error format."""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from sprue.serving import repeats
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


async def body_of(receive: Any) -> bytes:
    parts, more = [], True
    while more:
        message = await receive()
        parts.append(message["body"])
        more = message.get("more_body", False)
    return b"".join(parts)


def test_a_request_whose_replica_dies_is_scored_by_another_one() -> None:
    bodies: list[bytes] = []

    async def dies_once(scope: Any, receive: Any, send: Any) -> None:
        bodies.append(await body_of(receive))
        if len(bodies) > 1:
            await PlainTextResponse("scored")(scope, receive, send)

    answer = wrapped(dies_once).post("/v1/classes/brick/score", content=iter([b"image", bytes(100)]))
    assert (answer.status_code, answer.text) == (200, "scored")
    assert bodies == [b"image" + bytes(100)] * 2


def test_a_request_is_not_repeated_for_ever_nor_if_that_may_do_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    bodies: list[bytes] = []

    async def dies(scope: Any, receive: Any, send: Any) -> None:
        bodies.append(await body_of(receive))

    score = "/v1/classes/brick/score"
    for _ in range(2):
        answer = wrapped(dies).post(score, content=b"image")
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "bad_gateway")
        assert bodies == [b"image"] * (1 + repeats.REPEATS)
        bodies.clear()
    assert wrapped(dies).post("/v1/classes/brick/reviews", content=b"{}").status_code == 502
    monkeypatch.setattr(repeats, "MAX_BYTES", 4)
    assert wrapped(dies).post(score, content=b"image").status_code == 502
    monkeypatch.setattr(repeats, "MAX_AGE_S", 0.0)
    assert wrapped(dies).post(score, content=b"img").status_code == 502
    assert bodies == [b"{}", b"image", b"img"]
