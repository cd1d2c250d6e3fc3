"""Internal errors, which requests to a sound service can't cause."""

import asyncio
import threading

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from sprue.serving import inspection
from sprue.serving.errors import add_error_handlers
from sprue.store import StoreError


def test_a_failure_is_json_that_hides_its_cause_and_reaches_the_servers_log() -> None:
    app = FastAPI()
    add_error_handlers(app)

    @app.get("/broken")
    async def broken() -> None:
        raise RuntimeError("the cause")

    response = TestClient(app, raise_server_exceptions=False).get("/broken")
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert "the cause" not in response.text
    with pytest.raises(RuntimeError, match="the cause"):
        TestClient(app).get("/broken")


def test_a_store_that_does_not_answer_is_no_failure_of_the_service() -> None:
    app = FastAPI()
    add_error_handlers(app)
    inspection.add_to(app)

    @app.get("/decisions")
    async def decisions() -> None:
        raise StoreError("s3://plant/decisions: the object store does not answer")

    response = TestClient(app).get("/decisions")
    assert (response.status_code, response.headers["retry-after"]) == (503, "5")
    assert response.json()["error"]["code"] == "store_unavailable"


def test_a_store_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    store = threading.Event()
    monkeypatch.setattr(inspection, "STORE_S", 0.1)
    try:
        with pytest.raises(StoreError, match="did not answer within"):
            asyncio.run(inspection.in_store(store.wait, 60))
    finally:
        store.set()
