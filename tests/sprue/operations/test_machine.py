"""What the doctor finds on this machine."""

import importlib.metadata
import os
import subprocess
import sys

import pytest

from sprue.operations import machine
from sprue.serving.keys import add_key


def test_packages_that_sprue_needs_are_compared(monkeypatch):
    (versions,) = machine.packages()
    assert versions.level == "OK" and f"torch {importlib.metadata.version('torch')}" in versions.words
    needed = ["numpy>=99", "no-such-package>=1", "click>=8", "absent; extra == 'docs'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: needed)
    _, unmet = machine.packages()
    assert unmet.level == "FAIL"
    assert f"numpy is {importlib.metadata.version('numpy')}, and has to be >=99; no-such-package is mis" in unmet.words
    assert "click" not in unmet.words and "absent" not in unmet.words


def test_the_processor_says_what_runs_on_it():
    finding, *_ = machine.processor()
    assert "the backbone runs on" in finding.words and "cores" in finding.words


def test_a_file_of_keys_is_its_owners_alone(tmp_path):
    path = tmp_path / "keys.json"
    assert machine.keys_file(path) == []
    add_key(path, "line-7", ["score"])
    assert [each.level for each in machine.keys_file(path)] == ["OK"]
    for mode, level in ((0o640, "WARN"), (0o606, "FAIL"), (0o660, "FAIL")):
        path.chmod(mode)
        (finding,) = machine.keys_file(path)
        assert finding.level == level and finding.words.endswith(f"chmod 600 {path}")


def test_the_cache_is_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("SPRUE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "file").write_bytes(b"1" * 2000)
    (finding,) = machine.cache()
    assert finding.level == "OK" and "cache: 2 kB" in finding.words
    monkeypatch.setenv("SPRUE_CACHE_GB", "none")
    (finding,) = machine.cache()
    assert (finding.level, finding.words) == ("FAIL", "SPRUE_CACHE_GB=none is not a number of GiB above 0")
    monkeypatch.delenv("SPRUE_CACHE_GB")
    monkeypatch.setenv("SPRUE_CACHE", str(tmp_path / "cache" / "file" / "below"))
    assert machine.cache()[0].level == "FAIL"


@pytest.mark.parametrize(("address", "is_found"), [("0.0.0.0", True), ("127.0.0.1", False)])
def test_what_listens_beyond_the_loopback_is_named(address, is_found):
    listen = (
        f"import socket; s = socket.create_server(('{address}', 0)); print(s.getsockname()[1], flush=True); input()"
    )
    command = [sys.executable, "-c", listen, "mlflow"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        port = int(process.stdout.readline())
        found = [each for each in machine.exposure() if each.words.startswith("MLflow listens beyond")]
        process.stdin.close()
    assert any(str(port) in each.words for each in found) == is_found


def test_what_can_be_written_is_told_for_folders_that_do_not_exist_yet(tmp_path):
    assert machine.is_writable(tmp_path / "a" / "b")
    if os.geteuid():  # root may write everywhere
        tmp_path.chmod(0o500)
        assert not machine.is_writable(tmp_path / "a" / "b")
    (tmp_path / "file").touch()
    assert not machine.is_writable(tmp_path / "file" / "below")
