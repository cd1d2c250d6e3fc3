"""What is counted of requests, and which states are reported."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from starlette.types import Message

from sprue.serving import metrics
from sprue.serving.metrics import CountRequests, report_state
from sprue.tracking.registry import RegisteredDetector


class Recorder:
    """A metric that remembers what it was given."""

    def __init__(self) -> None:
        self.calls: list[tuple[float, Any]] = []

    def record(self, value: float, labels: Any = None) -> None:
        self.calls.append((value, labels))

    inc = set = record


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(metrics, "REQUESTS", recorder)
    return recorder


def test_requests_are_counted_by_the_status_that_clients_see(requests: Recorder) -> None:
    app = FastAPI()
    app.add_middleware(CountRequests)

    @app.get("/broken/score")
    async def broken() -> None:
        raise RuntimeError("a defect")

    @app.get("/sound")
    async def sound() -> None:
        pass

    client = TestClient(app, raise_server_exceptions=False)
    for path in ("/broken/score", "/sound", "/unknown"):
        status = client.get(path).status_code
        route = "score" if path.endswith("score") else "other"
        assert requests.calls.pop() == (1, {"route": route, "status": str(status)})
    assert not requests.calls


def test_a_client_that_leaves_counts_as_499(requests: Recorder) -> None:
    async def wait(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(60)

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        pass

    async def run() -> None:
        request = asyncio.create_task(CountRequests(wait)({"type": "http", "path": "/x/score"}, receive, send))
        await asyncio.sleep(0)
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request

    asyncio.run(run())
    assert requests.calls == [(1, {"route": "score", "status": "499"})]


def test_every_report_has_the_version_of_every_champion(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray may miss a value, and has none to show for a model then."""
    versions, ages = Recorder(), Recorder()
    monkeypatch.setattr(metrics, "VERSIONS", versions)
    monkeypatch.setattr(metrics, "REGISTRY_AGE", ages)
    champions = [RegisteredDetector("textures", "brick", 3, ""), RegisteredDetector("textures", "gräs", 1, "")]
    models: Any = SimpleNamespace(available=champions, failures={})
    admission: Any = SimpleNamespace(queued=0, reading=0)
    for _ in range(2):
        report_state(admission, models, None, 1.5)
        assert versions.calls == [(3, {"model": "textures.brick"}), (1, {"model": "textures.gr%C3%A4s"})]
        versions.calls.clear()
    assert ages.calls == [(1.5, None)] * 2
