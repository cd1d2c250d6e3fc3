"""What the proxy refuses by itself, and what is none of its business."""

import asyncio
from typing import Any

import pytest
from starlette.testclient import TestClient

from sprue.serving import shedding
from sprue.serving.errors import error_response
from sprue.serving.shedding import Shedding


def test_a_connection_that_comes_back_too_early_reaches_no_replica() -> None:
    asked: list[str] = []
    now = 100.0
    code = "overloaded"

    async def replica(scope: Any, receive: Any, send: Any) -> None:
        asked.append(scope["path"])
        await error_response(503, code, "words", {"Retry-After": "3"})(scope, receive, send)

    app = Shedding(replica, lambda: now)

    def answer(port: int, path: str = "/v1/classes/brick/score", **headers: str) -> str:
        """Retry-After of the answer, and "early" where no replica was asked for it."""
        before = len(asked)
        response = TestClient(app, client=("10.0.0.7", port)).post(path, headers=headers)
        assert (response.status_code, response.json()["error"]["code"]) == (503, code)
        return response.headers["retry-after"] + ("" if len(asked) > before else " early")

    assert [answer(1), answer(1), answer(2)] == ["3", "3 early", "3"]
    now += 2.5
    assert answer(1) == "1 early"
    # Other requests, and connections of many clients, are none of its business.
    assert answer(1, "/v1/classes") == "3"
    assert answer(1, **{"X-Forwarded-For": "10.0.0.8"}) == "3"
    now += 0.5
    assert [answer(1), answer(1)] == ["3", "3 early"]
    # Of other errors it learns nothing: another class may be there.
    code = "class_unavailable"
    assert [answer(3), answer(3)] == ["3", "3"]


def test_connections_are_remembered_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shedding, "MAX_TURNS", 10)
    app = Shedding(error_response(503, "overloaded", "words", {"Retry-After": "3"}))
    for port in range(30):
        TestClient(app, client=("10.0.0.7", port)).post("/v1/classes/brick/score")
    assert len(app._turns) == 10


def test_a_crowd_is_refused_while_the_proxy_is_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shedding, "FEW", 2)
    behind_s = 1.0

    async def run() -> None:
        done = asyncio.Event()

        async def replica(scope: Any, receive: Any, send: Any) -> None:
            await done.wait()
            await error_response(422, "wrong", "words")(scope, receive, send)

        app = Shedding(replica)
        monkeypatch.setattr(app, "behind_s", lambda: behind_s)
        sent: dict[int, list[Any]] = {port: [] for port in range(6)}

        async def ask(port: int) -> None:
            async def send(message: Any) -> None:
                sent[port].append(message)

            path = "/v1/classes" if port == 5 else "/v1/classes/brick/score"
            await app({"type": "http", "path": path, "headers": [], "client": ("10.0.0.7", port)}, None, send)  # type: ignore[arg-type]

        nonlocal behind_s
        first = [asyncio.create_task(ask(port)) for port in (0, 1)]
        await asyncio.sleep(0)
        await ask(2)  # beyond the few
        behind_s = 0.0
        second = [asyncio.create_task(ask(port)) for port in (3, 5)]
        await asyncio.sleep(0)
        await ask(2)  # too early
        assert [bool(sent[port]) for port in (0, 1, 2, 3, 5)] == [False, False, True, False, False]
        assert [each["status"] for each in sent[2] if "status" in each] == [503, 503]
        retry_s = int(dict(sent[2][0]["headers"])[b"retry-after"])
        assert 1 <= retry_s <= shedding.MAX_RETRY_AFTER_S
        done.set()
        await asyncio.gather(*first, *second)
        assert app._in_flight == 0

    asyncio.run(run())


def test_a_busy_loop_is_behind() -> None:
    async def run() -> None:
        now = 0.0
        app = Shedding(error_response(422, "wrong", "words"), lambda: now)
        assert app.behind_s() == 0
        task = asyncio.create_task(app._tick())
        await asyncio.sleep(0)
        now += 1.0
        assert app.behind_s() == pytest.approx(1.0 - shedding.TICK_S)
        await asyncio.sleep(2 * shedding.TICK_S)
        assert app.behind_s() <= 0
        task.cancel()

    asyncio.run(run())
