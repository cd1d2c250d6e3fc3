"""The store, on a local folder and in an object store alike."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from ruamel.yaml import YAML
from s3fs import S3FileSystem
from upath import UPath

from sprue.errors import SprueError
from sprue.stages.runtime import run_stage
from sprue.store import StoreError, digest, local_copy, location, read_json, replace_folder, write_bytes, write_json


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> UPath:
    """An empty folder of the store."""
    if request.param == "local":
        return location(str(tmp_path / "store"))
    return location(f"s3://{request.getfixturevalue('s3_bucket')}/store")


def files(folder: UPath) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tree(folder: Path, contents: dict[str, str]) -> Path:
    for name, text in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_a_path_is_made_absolute_and_a_url_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert location("store/a") == UPath(tmp_path / "store" / "a")
    assert location("~/store") == UPath("/home/me/store")
    assert location("a/../b") == UPath(tmp_path / "b")
    assert str(location("s3://plant/store")) == "s3://plant/store"


@pytest.mark.parametrize("url", ["gs://plant/store", "http://plant/store", "file:///store", "://x"])
def test_other_schemes_are_refused_by_name(url):
    with pytest.raises(SprueError, match=f"{url} is neither a path nor an s3 URL"):
        location(url)


def test_what_is_written_is_read_and_nothing_else_is_left(store):
    path = store / "a" / "b.json"
    write_json(path, {"second": [1, 2], "first": "ü"})
    write_json(path, {"first": "ü", "second": [1, 2]})
    assert read_json(path, made_by="fit") == {"first": "ü", "second": [1, 2]}
    second = store / "a" / "c.json"
    write_json(second, {"first": "ü", "second": [1, 2]})
    assert path.read_bytes() == second.read_bytes()
    assert set(files(store)) == {"a/b.json", "a/c.json"}


def test_a_missing_file_names_the_stage_that_writes_it(store):
    with pytest.raises(SprueError, match=r"there is no .*nothing\.json; run the fit stage first"):
        read_json(store / "nothing.json", made_by="fit")


def test_a_write_that_fails_keeps_the_old_file_and_leaves_no_other(tmp_path, monkeypatch):
    path = location(str(tmp_path / "file"))
    write_bytes(path, b"old")

    def full_disk(self, target):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(type(path), "rename", full_disk)
        write_bytes(path, b"new")
    assert files(UPath(tmp_path)) == {"file": b"old"}


def test_threads_that_write_one_file_do_not_disturb_each_other(tmp_path):
    path = location(str(tmp_path / "file"))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: write_bytes(path, bytes([number]) * 1000), range(100)))
    assert len(set(path.read_bytes())) == 1
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_a_digest_is_that_of_names_and_contents(store):
    write_bytes(store / "x" / "a", b"1")
    write_bytes(store / "x" / "sub" / "b", b"2")
    write_bytes(store / "y" / "sub" / "b", b"2")
    write_bytes(store / "y" / "a", b"1")
    assert digest(store / "x" / "a") == hashlib.sha256(b"1").hexdigest()
    folder = digest(store / "x")
    assert folder == digest(store / "y")
    write_bytes(store / "y" / "a", b"3")
    assert digest(store / "y") != folder
    write_bytes(store / "z" / "a2", b"1")
    write_bytes(store / "z" / "sub" / "b", b"2")
    assert digest(store / "z") != folder
    with pytest.raises(SprueError, match="there is nothing at"):
        digest(store / "missing")


def test_a_digest_is_the_same_here_and_in_an_object_store(s3_bucket, tmp_path):
    source = tree(tmp_path / "source", {"b": "1", "a/c": "2", "a.d": "3"})
    remote = location(f"s3://{s3_bucket}/folder")
    replace_folder(source, remote)
    assert digest(remote) == digest(location(str(source)))


def test_a_folder_replaces_what_was_there(store, tmp_path):
    target = store / "detectors" / "brick"
    replace_folder(tree(tmp_path / "one", {"a": "1", "sub/b": "2", "gone/c": "3"}), target)
    assert files(target) == {"a": b"1", "sub/b": b"2", "gone/c": b"3"}
    replace_folder(tree(tmp_path / "two", {"a": "4", "sub/b": "5"}), target)
    assert files(target) == {"a": b"4", "sub/b": b"5"}
    # No staging folder beside it.
    assert set(files(store)) == {"detectors/brick/a", "detectors/brick/sub/b"}


def test_a_replaced_folder_can_be_read_by_others(tmp_path):
    target = location(str(tmp_path / "store" / "x"))
    replace_folder(tree(tmp_path / "one", {"a": "1"}), target)
    assert Path(target.path).stat().st_mode & 0o777 == 0o755


def test_a_local_copy_holds_the_folders_files(store, tmp_path):
    target = store / "x"
    replace_folder(tree(tmp_path / "one", {"a": "1", "sub/b": "2"}), target)
    with local_copy(target) as folder:
        assert isinstance(folder, Path)
        assert files(UPath(folder)) == {"a": b"1", "sub/b": b"2"}
    assert files(target) == {"a": b"1", "sub/b": b"2"}


class Overloaded(BaseHTTPRequestHandler):
    """An object store that answers as Amazon's does under too much load."""

    def do_GET(self) -> None:
        body = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
        self.send_response(503)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_PUT = do_GET

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


@pytest.fixture
def overloaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[UPath]:
    """A folder in it."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Overloaded) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "sprue")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "sprue-secret")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # s3fs repeats, too
        S3FileSystem.clear_instance_cache()  # it keeps the address
        yield location("s3://plant/store")
        server.shutdown()
    S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize(
    "look",
    [
        lambda folder: (folder / "fit.json").is_file(),
        lambda folder: list(folder.glob("*.json")),
        lambda folder: list(folder.iterdir()),
        lambda folder: folder.exists(),
        lambda folder: (folder / "fit.json").read_bytes(),
        lambda folder: (folder / "fit.json").write_bytes(b"1"),
        lambda folder: read_json(folder / "fit.json", made_by="fit"),
        lambda folder: digest(folder / "fit.json"),
    ],
    ids=["file", "glob", "iterdir", "exists", "bytes", "write", "read", "digest"],
)
def test_a_store_that_refuses_does_not_count_as_empty(overloaded, look):
    with pytest.raises(StoreError, match=r"s3://plant/store.*: the object store does not answer, or refuses"):
        look(overloaded)


def test_a_stage_says_so_in_a_line(overloaded, tmp_path):
    recipe = YAML(typ="safe").load(Path(__file__).parents[2] / "models/recipes/patchflow-cpu.yaml")
    YAML().dump({"datasets": {"bolts": recipe}}, tmp_path / "params.yaml")
    arguments = ["--params", str(tmp_path / "params.yaml"), "--data", str(tmp_path), "--store", str(overloaded)]
    with pytest.raises(
        SystemExit, match=r"^sprue evaluate: s3://plant/store/bolts/manifest.parquet: the object store "
    ):
        run_stage("evaluate", arguments)


def test_what_is_not_there_is_not_there(store):
    assert not (store / "a").is_file() and list((store / "a").glob("*")) == []
    write_bytes(store / "a" / "b.json", b"1")
    write_bytes(store / "a" / "c" / "d.json", b"2")
    assert (store / "a" / "b.json").is_file() and not (store / "a").is_file()
    assert sorted(path.name for path in (store / "a").glob("*")) == ["b.json", "c"]
    assert [path.name for path in (store / "a").glob("*.json")] == ["b.json"]
    assert sorted(path.name for path in (store / "a").glob("**/*.json")) == ["b.json", "d.json"]
