"""Ray nodes and a tracking server as processes of this machine, and the CPU that they take."""

import contextlib
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

import psutil
import requests

ATTEMPTS = 5
"""At starting a Ray node."""


def free_port() -> int:
    """A port of the loopback address that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class CpuMeter:
    """Seconds of CPU of processes and all that they have started, also of those that have ended.

    Ray's workers are nobody's to wait for, so that the kernel adds their time to no other process when they end: they
    are looked at several times a second, and what a process takes after the last look is missed.
    """

    EVERY_S = 0.3

    def __init__(self, processes: list[subprocess.Popen[bytes]]) -> None:
        self._roots = [psutil.Process(process.pid) for process in processes]
        # psutil compares processes by what a step of the system's clock does not change.
        self._seen: dict[psutil.Process, float] = {}
        self._ended = Event()
        self._thread = Thread(target=self._watch, daemon=True)
        self._thread.start()

    def seconds(self) -> float:
        """So far."""
        self._look()
        return sum(self._seen.values())

    def close(self) -> None:
        """Looks no more."""
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(self.EVERY_S):
            self._look()

    def _look(self) -> None:
        for root in self._roots:
            with contextlib.suppress(psutil.NoSuchProcess):
                for each in [root, *root.children(recursive=True)]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        times = each.cpu_times()
                        self._seen[each] = times.user + times.system


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """Kills a process and all that it has started."""
    if process.poll() is None:
        for each in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            each.kill()
    process.wait()


def wait_until(happened: Callable[[], bool], log: Path, patience_s: float = 300.0) -> None:
    """Waits for something that a process with that log does; a busy machine may need minutes."""
    deadline = time.monotonic() + patience_s
    while not happened():
        if time.monotonic() > deadline:
            raise SystemExit(f"a process does not start:\n{log.read_text()[-3000:]}")
        time.sleep(0.5)


def start_node(command: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Starts a Ray node and waits until it runs; on a busy machine Ray gives up at times, and is asked again."""
    for _ in range(ATTEMPTS):
        with log.open("wb") as output:
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
        wait_until(lambda: re.search("runtime started|Traceback", log.read_text()) is not None, log)
        if "runtime started" in log.read_text():
            return process
        kill_all(process)  # after such a failure it may stay
    raise SystemExit(f"Ray does not start:\n{log.read_text()[-3000:]}")


@contextmanager
def cluster(nodes: int, environment: dict[str, str]) -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """Ray nodes as processes, each with one CPU; the address, and the processes."""
    processes: list[subprocess.Popen[bytes]] = []
    # Not below the benchmark's folder: the paths of Ray's sockets would be too long.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        port = free_port()
        head = ["--head", f"--port={port}", f"--temp-dir={folder}", f"--dashboard-port={free_port()}"]
        try:
            for number in range(nodes):
                role = head if not number else [f"--address=127.0.0.1:{port}"]
                command = [
                    "ray", "start", "--block", "--num-cpus=1", "--object-store-memory=200000000",
                    f"--dashboard-agent-listen-port={free_port()}", *role,
                ]  # fmt: skip
                processes.append(start_node(command, environment, Path(folder, f"node{number}.log")))
            yield f"127.0.0.1:{port}", processes
        finally:
            for process in reversed(processes):
                kill_all(process)


def answers(url: str) -> bool:
    """Whether there is an answer."""
    try:
        return requests.get(url, timeout=1).ok
    except requests.RequestException:
        return False


@contextmanager
def tracking_server(folder: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A tracking server in a process of its own, its access log in ``access.log``; its URI, and the process."""
    uri = f"http://127.0.0.1:{(port := free_port())}"
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "artifacts"),
    ]  # fmt: skip
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (folder / "access.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        try:
            wait_until(lambda: answers(f"{uri}/health"), folder / "access.log")
            yield uri, process
        finally:
            kill_all(process)
