"""The local tracking server keeps what it is given, whichever of its parts dies."""

import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_kill_while_detectors_are_registered_loses_nothing(ports):
    command = [sys.executable, "benchmarks/registry_faults.py", "--kills", "3", "--port", str(ports(1)[0])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "kill 3 of 3: SeaweedFS" in done.stdout
    assert "lost or twice: nothing" in done.stdout
    assert "http://127.0.0.1:" in done.stdout


def test_a_port_that_is_taken_is_said(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        command = [sys.executable, "infra/local/tracking.py", "--folder", str(tmp_path / "t"), "--port", port]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert f"tracking: port {port} is taken; name another with --port" in done.stderr
