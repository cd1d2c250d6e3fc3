"""Failures of the service's own, which a sound service can't be made to have."""

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from sprue.serving.errors import answer_errors_in_json


def test_a_failure_is_json_that_tells_nothing_of_the_inside_and_reaches_the_servers_log() -> None:
    app = FastAPI()
    answer_errors_in_json(app)

    @app.get("/broken")
    async def broken() -> None:
        raise RuntimeError("the inside")

    answer = TestClient(app, raise_server_exceptions=False).get("/broken")
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    assert "the inside" not in answer.text
    with pytest.raises(RuntimeError, match="the inside"):
        TestClient(app).get("/broken")
