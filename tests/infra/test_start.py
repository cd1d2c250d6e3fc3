"""What a service that was killed has left does not keep it from starting."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

START = Path(__file__).parents[2] / "infra/local/start.py"
LEADER = "import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', sys.argv[1]]); child.wait()"

LISTEN = """
import socket, time
server = socket.create_server(("127.0.0.1", {port}))
print(server.getsockname()[1], flush=True)
time.sleep(600)
"""

WORK = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(pathlib.Path({file!r}).touch()))
print("works", flush=True)
time.sleep(600)
"""


def start(file: Path, code: str, *arguments: str) -> "subprocess.Popen[str]":
    """As the supervisor does: in a process group of its own."""
    command = [sys.executable, "-I", "-S", str(START), str(file), "TERM", sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, process_group=0)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "service.group"


def test_a_killed_service_starts_again_on_the_port_that_its_child_has_kept(file):
    first = start(file, LEADER, LISTEN.format(port=0))
    port = int(first.stdout.readline())
    (child,) = psutil.Process(first.pid).children()
    first.kill()
    first.wait()
    assert child.is_running()

    second = start(file, LISTEN.format(port=port))
    assert int(second.stdout.readline()) == port
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    second.kill()
    second.wait()


def test_what_is_left_may_end_its_work(file, tmp_path):
    work = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: (open({file!r}, 'w').close(), sys.exit()))"
    )
    ended = tmp_path / "ended"
    first = start(file, LEADER, f"{work.format(file=str(ended))}; print('works', flush=True); time.sleep(600)")
    assert first.stdout.readline() == "works\n"
    first.kill()
    first.wait()
    assert start(file, "print('started')").communicate()[0] == "started\n"
    assert ended.exists()


def test_it_becomes_the_command(file):
    running = start(file, "import os, time; print(os.getpid(), flush=True); time.sleep(600)")
    assert int(running.stdout.readline()) == running.pid
    assert file.read_text().split()[1] == str(running.pid)
    running.send_signal(signal.SIGTERM)
    assert running.wait() == -signal.SIGTERM


@pytest.mark.parametrize("words", ["", "another-boot {pid}", "{boot} {pid}", "nonsense"])
def test_it_leaves_strangers_alone(file, words):
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], process_group=0) as stranger:
        file.write_text(words.format(boot=boot, pid=stranger.pid))
        done = start(file, "print('started')")
        assert done.communicate()[0] == "started\n"
        assert stranger.poll() is None
        os.kill(stranger.pid, signal.SIGKILL)
