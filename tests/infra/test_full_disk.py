"""An object store that has met a full disk is restarted when there is room, by a real supervisor."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xmlrpc.client import ServerProxy

import pytest
from supervisor.xmlrpc import SupervisorTransport

LISTENER = Path(__file__).parents[2] / "infra/local/full_disk.py"
CONFIG = """
[supervisord]
nodaemon=true
pidfile={folder}/pid
logfile={folder}/log
[unix_http_server]
file={folder}/socket
[rpcinterface:supervisor]
supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface
[eventlistener:full-disk]
command={python} {listener} {folder}
events=PROCESS_LOG_STDOUT,TICK_5
[program:seaweedfs]
command=sh -c "cat {folder}/says; sleep 600"
stdout_events_enabled=true
"""


@pytest.fixture
def lives(tmp_path: Path) -> Iterator[set[int]]:
    """The processes that the service has been within seconds, whose first one says what is in the file ``says``."""
    (tmp_path / "says").write_text("E filer.go: insert entry /a: write 000003.log: no space left on device\n")
    (tmp_path / "conf").write_text(CONFIG.format(folder=tmp_path, python=sys.executable, listener=LISTENER))
    with subprocess.Popen([Path(sys.executable).parent / "supervisord", "-c", tmp_path / "conf"]) as process:
        try:
            yield _lives(tmp_path)
        finally:
            process.terminate()


def _lives(folder: Path) -> set[int]:
    found, began = set[int](), time.monotonic()
    while time.monotonic() < began + 20:
        time.sleep(0.2)
        supervisor: Any = ServerProxy("http://127.0.0.1", SupervisorTransport(None, None, f"unix://{folder}/socket"))
        try:
            info = supervisor.supervisor.getProcessInfo("seaweedfs")
        except OSError:  # it does not listen yet
            continue
        if info["statename"] == "RUNNING":
            found.add(info["pid"])
            (folder / "says").write_text("fine\n")
    return found


def test_it_is_restarted_once(lives: set[int]) -> None:
    assert len(lives) == 2
