"""Faults over the whole stack: ``python benchmarks/stack_faults --faults 100``.

Brings a local stack up on a disk of its own (a tmpfs; it needs root), runs the pipeline of two quick classes on it as
Ray jobs in a loop, from the fit to a promotion, and lets clients score meanwhile. Then it injects one fault after the
other, of each kind by turns, waits until ``stack.py status`` is well and clients get scores, and looks into the stack's
records: epochs done again although their checkpoint was stored, metrics missing or twice, accepted requests without an
answer, versions half registered. Each fault is a line of the record, which a later start continues; the end is a table.
It exits 1 if anything was lost, or the stack was not well again within five minutes.
"""

import argparse
import logging
import os
import platform
import random
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from clients import Client
from invariants import connect
from kinds import KINDS, NotNowError, Site
from pipeline import Pipeline, write_images
from plant import Plant
from rich.console import Console
from watch import Watch, add_row, is_well, read_rows, table

PATIENCE_S = 300.0
CALM_S = 10.0
"""Between two faults, so that requests on their way end."""
NOTICE_S = 3.0
"""From a fault to the first look: until then the supervisor and Ray may not have noticed that a process has died."""
CLIENTS = 2


def inject(kind: str, site: Site, watch: Watch) -> dict[str, Any] | None:
    """Does a fault, waits for the stack to be well again, and says what was lost; None if there was nothing to hit."""
    began = datetime.now().isoformat(timespec="seconds")
    try:
        what = KINDS[kind](site)
    except NotNowError as error:
        print(f"{kind}: not done, {error}", flush=True)
        return None
    ended, scores = time.monotonic(), watch.answered() + CLIENTS
    time.sleep(NOTICE_S)
    well_s, state = site.plant.wait_until_well(PATIENCE_S)
    while watch.answered() < scores and time.monotonic() < ended + PATIENCE_S:
        time.sleep(0.2)
    scored_s = time.monotonic() - ended if watch.answered() >= scores else None
    time.sleep(CALM_S)
    row = {"kind": kind, "at": began, "what": what,
           "well_s": None if well_s is None else NOTICE_S + well_s, "scored_s": scored_s, "state": state,
           "load": os.getloadavg()[0]}  # fmt: skip
    return row | watch.look()


def inject_all(
    rows: list[dict[str, Any]], wanted: int, kinds: list[str], seed: int, watch: Watch, record: Path
) -> None:
    """Injects faults until there are so many, of each kind by turns."""
    turn = len(rows)
    while len(rows) < wanted:
        kind, rng = kinds[turn % len(kinds)], random.Random(f"{seed} {turn}")
        turn += 1
        row = inject(kind, Site(watch.pipeline.plant, watch.pipeline, rng), watch)
        if row is not None:
            rows.append(row)
            add_row(record, row)
            print(len(rows), row, flush=True)


def main() -> int:
    """Brings the stack up, injects, and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=100, help="of all kinds together (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of moments and victims (default: %(default)s)")
    parser.add_argument("--only", action="append", choices=list(KINDS), help="this kind; may be repeated")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/sprue-faults"), help="(default: %(default)s)")
    parser.add_argument("--base", type=int, default=13_000, help="first of 72 ports (default: %(default)s)")
    parser.add_argument("--keep", action="store_true", help="leave the stack up, for another start")
    arguments = parser.parse_args()
    logging.getLogger("ray").setLevel(logging.ERROR)  # it names each file that it leaves out of a job
    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "data").exists():
        write_images(folder / "data")
    rows, plant = read_rows(folder / "faults.jsonl"), Plant(folder / "stack", arguments.base)
    plant.up()
    connect(plant)
    pipeline = Pipeline(plant, folder, first=len(list(folder.glob("params-*.yaml"))))
    clients = [Client(plant, folder / "data", number) for number in range(CLIENTS)]
    watch = Watch(pipeline, clients)
    pipeline.start()
    try:
        while not pipeline.done:
            time.sleep(1)
        for client in clients:
            client.start()
        while watch.answered() < CLIENTS:
            time.sleep(0.5)
        print("before the first fault:", watch.look(), flush=True)
        kinds = arguments.only or list(KINDS)
        inject_all(rows, arguments.faults, kinds, arguments.seed, watch, folder / "faults.jsonl")
    finally:
        for each in (pipeline, *clients):
            each.stopped.set()
        print(f"{datetime.now():%Y-%m-%d}, {os.cpu_count()} cores, {platform.processor() or platform.machine()}")
        Console(width=170).print(table(rows))
        if not arguments.keep:
            pipeline.join(60)
            plant.down()
    return not all(map(is_well, rows))


if __name__ == "__main__":
    sys.exit(main())
