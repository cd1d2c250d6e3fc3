"""A tracking server that can't be used is found out at once."""

import socket

import pytest
from upath import UPath

from sprue.errors import SprueError
from sprue.tracking import server


@pytest.fixture(autouse=True)
def no_server(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def refused(store, match):
    with pytest.raises(SprueError, match=match) as caught:
        server.connect(store)
    return caught.value


def test_a_server_that_is_away_is_named(tmp_path, monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{probe.getsockname()[1]}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    refused(UPath(tmp_path), f"the tracking server {uri} does not answer: start it, or unset")


def test_a_server_that_never_answers_is_waited_for_only_so_long(tmp_path, monkeypatch):
    monkeypatch.setattr(server, "PATIENCE_S", 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}/")
        error = refused(UPath(tmp_path), "does not answer")
    assert "read timeout=0.3" in str(error.__cause__)


@pytest.mark.parametrize("uri", ["mlruns", "./mlruns", "/data/mlruns", "file:///data/mlruns"])
def test_a_folder_has_no_registry(tmp_path, monkeypatch, uri):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    refused(UPath(tmp_path), f"MLFLOW_TRACKING_URI={uri} is a folder, which has no model registry")


def test_a_remote_store_needs_a_server(tmp_path):
    refused(UPath("s3://bucket/store"), "s3://bucket/store can't hold the tracking database; set MLFLOW_TRACKING_URI")
