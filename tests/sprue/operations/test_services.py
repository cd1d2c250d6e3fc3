"""What the doctor finds of the store, the registry and the cluster."""

import sqlite3
import threading
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
from pathlib import Path

import mlflow
import pytest

from sprue.operations import services
from sprue.store import location


@pytest.fixture(autouse=True)
def no_servers(monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


def only(findings):
    (finding,) = findings
    return finding.level, finding.words


def test_a_folder_has_to_be_writable_and_have_room(tmp_path, monkeypatch):
    level, words = only(services.store(location(str(tmp_path / "new"))))
    assert words.startswith(f"{tmp_path}/new does not exist yet: ")
    for low, lowest, expected in ((0, 0, "OK"), (1e18, 0, "WARN"), (1e18, 1e18, "FAIL")):
        monkeypatch.setattr(services, "LOW", low)
        monkeypatch.setattr(services, "LOWEST", lowest)
        level, words = only(services.store(location(str(tmp_path))))
        assert level == expected and words.endswith("make room") == (expected != "OK")
    (tmp_path / "file").touch()
    assert only(services.store(location(str(tmp_path / "file"))))[0] == "FAIL"


def test_a_bucket_is_written_to(s3_bucket, monkeypatch):
    found = services.store(location(f"s3://{s3_bucket}/store"))
    assert [(each.level, each.subject) for each in found] == [("OK", "store"), ("OK", "clock")]
    assert not location(f"s3://{s3_bucket}/store/.doctor").exists()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    level, words = only(services.store(location(f"s3://{s3_bucket}/store")))
    assert level == "FAIL" and words.startswith(f"s3://{s3_bucket}/store can't be written: ")


def test_a_database_has_the_schema_of_the_installed_mlflow(tmp_path):
    store, file = location(str(tmp_path / "store")), tmp_path / "store/mlflow/mlflow.db"
    assert only(services.registry(store)) == ("OK", f"{file} does not exist yet: the first command makes it")
    file.parent.mkdir(parents=True)
    uri = f"sqlite:///{file}"
    mlflow.MlflowClient(uri, uri).search_experiments(max_results=1)
    assert only(services.registry(store)) == ("OK", f"{file}: 0 models, its schema is MLflow's")
    mlflow.MlflowClient(uri, uri).create_experiment("moved", "file:///elsewhere/mlflow/artifacts")
    level, words = only(services.registry(store))
    assert level == "FAIL" and "names files in file:///elsewhere/mlflow/artifacts: the store was moved" in words
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
    level, words = only(services.registry(store))
    assert level == "FAIL" and words.endswith(f"make a backup, then: mlflow db upgrade {uri}")
    file.write_bytes(b"words" * 1000)
    level, words = only(services.registry(store))
    assert level == "FAIL" and "can't be read: file is not a database" in words


def test_a_store_in_an_object_store_needs_a_server():
    level, words = only(services.registry(location("s3://plant/store")))
    assert level == "FAIL" and "can't hold the tracking database" in words


def test_a_server_that_is_away_fails(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    level, words = only(services.registry(location(str(tmp_path))))
    assert level == "FAIL" and words.startswith("http://127.0.0.1:9: ConnectionError; start the server")


class OfYesterday(BaseHTTPRequestHandler):
    """What a server would answer whose clock is wrong, and whose MLflow is old."""

    version_text = b"2.1.0"

    def do_GET(self):
        self.send_response_only(200)
        self.send_header("Date", "Mon, 09 Mar 2026 08:30:00 GMT")
        self.send_header("Content-Length", str(len(self.version_text)))
        self.end_headers()
        self.wfile.write(self.version_text)

    do_POST = do_GET

    def log_message(self, *_):
        """Prints nothing."""


def test_another_version_and_another_time_are_told(tmp_path, monkeypatch):
    with HTTPServer(("127.0.0.1", 0), OfYesterday) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")
        registry, clock = services.registry(location(str(tmp_path)))
        server.shutdown()
        thread.join()
    assert registry.level == "WARN"
    assert f"MLflow 2.1.0, and here it is {version('mlflow')}: install the same" in registry.words
    assert clock.level == "WARN" and "synchronise both" in clock.words


def test_without_a_cluster_a_command_starts_one_that_asks_for_a_token(monkeypatch):
    assert only(services.ray_cluster())[0] == "OK"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    level, words = only(services.ray_cluster())
    assert level == "WARN" and "RAY_AUTH_MODE=token" in words


@pytest.mark.parametrize("address", ["127.0.0.1:9", "ray://127.0.0.1:9", "http://127.0.0.1:9", "127.0.0.1:words"])
def test_a_cluster_that_is_away_fails(monkeypatch, address):
    monkeypatch.setenv("RAY_ADDRESS", address)
    level, words = only(services.ray_cluster())
    assert level == "FAIL" and words.startswith(f"RAY_ADDRESS={address} can't be reached: ")


def test_the_newest_revision_is_found():
    (head,) = services.schema_heads()
    folder = Path(mlflow.__file__).parent / "store/db_migrations/versions"
    assert list(folder.glob(f"{head}_*.py"))
