"""What a class costs the platform, as classes and nodes become many: ``python benchmarks/scale``.

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
import json
import os
import platform
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dataset import write_dataset
from measured_store import KINDS, ROOT, MeasuredStore
from processes import CpuMeter, cluster, tracking_server
from rich.console import Console
from rich.table import Table

from sprue.stages.runtime import STAGES


def measure(folder: Path, data: Path, nodes: int, classes: int) -> dict[str, Any]:
    """Runs all stages on a cluster; returns the row."""
    shutil.rmtree(folder, ignore_errors=True)
    store = MeasuredStore(folder, data, classes)
    row: dict[str, Any] = {"nodes": nodes, "classes": classes, "date": datetime.now(UTC).date().isoformat()}
    with tracking_server(store.server) as (uri, server):
        store.environment["MLFLOW_TRACKING_URI"] = uri
        with cluster(nodes, store.environment) as (address, processes):
            store.environment["RAY_ADDRESS"] = address
            store.meters = {"cluster": CpuMeter(processes), "server": CpuMeter([server])}
            row["stages"] = {}
            for stage in STAGES:
                row["stages"][stage] = store.run(stage)
                print(f"{nodes} nodes, {classes} classes, {stage}: {row['stages'][stage]}", flush=True)
            for meter in store.meters.values():
                meter.close()
    return row | {"sizes": store.sizes()}


def show(rows: list[dict[str, Any]]) -> None:
    """Prints the tables of all rows, and the ratios."""
    console = Console(width=150)
    cpu = [f"{who}_cpu_seconds" for who in ("driver", "cluster", "server")]
    for row in rows:
        classes = row["classes"]
        headings = ("s", "ms a class", "CPU ms a class: driver", "cluster", "server", "driver, MiB", "requests a class")
        failed = max(found["failed"] for found in row["stages"].values())
        title = f"{row['nodes']} nodes, {classes} classes, {failed} of them failed"
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
