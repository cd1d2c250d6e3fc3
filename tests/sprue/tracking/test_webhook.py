"""A real tracking server signs its webhooks, and what is not signed by it, or is old, is refused."""

import os
import stat
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any, ClassVar

import mlflow
import pytest
import requests

from sprue.errors import SprueError
from sprue.tracking.webhook import EVENTS, ROUTE, read_secret, register_webhook, verify

SECRET = "0123456789abcdef"


@pytest.fixture
def tracking_server(tmp_path, ports):
    """The URI of a tracking server that delivers webhooks on this machine."""
    (port,) = ports(1)
    environment = os.environ | {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http,https",
        "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
        "MLFLOW_WEBHOOK_CACHE_TTL": "0",
    }
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    database = ["--backend-store-uri", f"sqlite:///{tmp_path / 'mlflow.db'}"]
    with subprocess.Popen([*command, *database], env=environment, cwd=tmp_path) as process:
        uri, before = f"http://127.0.0.1:{port}", mlflow.get_tracking_uri()
        for _ in range(600):
            try:
                requests.get(f"{uri}/health", timeout=1).raise_for_status()
                break
            except requests.RequestException:
                time.sleep(0.2)
        mlflow.set_tracking_uri(uri)
        mlflow.set_registry_uri(uri)
        yield uri
        mlflow.set_tracking_uri(before)
        mlflow.set_registry_uri(before)
        process.terminate()


class Service(BaseHTTPRequestHandler):
    """Keeps the messages that come."""

    messages: ClassVar[list[Any]] = []

    def do_POST(self):
        self.messages.append((self.path, dict(self.headers), self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()


@pytest.fixture
def service():
    Service.messages.clear()
    server = HTTPServer(("127.0.0.1", 0), Service)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_server_tells_of_each_change_of_an_alias_and_signs_it(tracking_server, service):
    for _ in range(2):  # the second replaces the first
        assert register_webhook(service, SECRET) == service + ROUTE
    client = mlflow.MlflowClient()
    (webhook,) = client.list_webhooks()
    assert sorted(map(str, webhook.events)) == sorted(EVENTS)
    tries = len(Service.messages)
    assert tries == 2
    client.create_registered_model("textures.brick")
    client.create_model_version("textures.brick", "s3://bucket/nothing")
    client.set_registered_model_alias("textures.brick", "champion", "1")
    client.delete_registered_model_alias("textures.brick", "champion")
    for _ in range(100):
        if len(Service.messages) == tries + 2:
            break
        time.sleep(0.1)
    assert len(Service.messages) == tries + 2
    for path, headers, body in Service.messages:
        assert path == ROUTE
        verify(SECRET, headers, body)
        for wrong in ("0" * 16, ""):
            with pytest.raises(SprueError, match="not signed with this service's secret"):
                verify(wrong, headers, body)
        with pytest.raises(SprueError, match="not signed"):
            verify(SECRET, headers, body + b" ")
        with pytest.raises(SprueError, match="not signed"):
            verify(SECRET, headers | {"X-MLflow-Timestamp": str(int(time.time()) + 1)}, body)
        with pytest.raises(SprueError, match="not signed"):
            verify(SECRET, {}, body)
        for apart_s in (-400, 400):
            with pytest.raises(SprueError, match="too old, or the clocks"):
                verify(SECRET, headers, body, now=time.time() + apart_s)


def test_a_service_that_is_not_reached_is_named(tracking_server, ports):
    with pytest.raises(SprueError, match=r"does not reach http://127\.0\.0\.1:\d+/v1/registry-events"):
        register_webhook(f"http://127.0.0.1:{ports(1)[0]}", SECRET)
    for wrong in ("scoring.plant:8443", "ftp://scoring.plant"):
        with pytest.raises(SprueError, match="is no URL of a service"):
            register_webhook(wrong, SECRET)


def test_a_secret_is_its_owners_alone(tmp_path):
    path = tmp_path / "secret"
    with pytest.raises(SprueError, match="can't be read"):
        read_secret(path)
    path.write_text(f"{SECRET}\n")
    path.chmod(0o644)
    with pytest.raises(SprueError, match="others may read the webhook's secret"):
        read_secret(path)
    path.chmod(stat.S_IRUSR | stat.S_IWUSR)
    assert read_secret(path) == SECRET
    path.write_text("short")
    with pytest.raises(SprueError, match="fewer than 16 characters"):
        read_secret(path)
