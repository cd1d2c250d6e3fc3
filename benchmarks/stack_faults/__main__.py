"""Faults over the whole stack: ``python benchmarks/stack_faults --faults 100``.

Brings a local stack up on a disk of its own (a tmpfs, so that it needs root), runs the pipeline of two quick classes on
it as Ray jobs in a loop, fit to promotion, and lets clients score meanwhile. Then it injects one fault after the other,
of each kind by turns, waits until ``stack.py status`` is well and a score and a job have succeeded, and looks into the
stack's records: epochs done again although their checkpoint was stored, metrics missing or twice, accepted requests
without an answer, versions half registered. Each fault is a line of the record, which a later start continues; the end
is a table.
"""

import argparse
import os
import random
import statistics
import sys
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import ray  # noqa: F401 - before the stack's variables are in the environment
from clients import Client
from invariants import connect, half_registered, metrics_lost
from kinds import KINDS, NotNowError, Site
from pipeline import Pipeline, write_images, write_jsonl
from plant import Plant
from rich.console import Console
from rich.table import Table

PATIENCE_S = 300.0
CALM_S = 12.0
"""Between two faults."""
CLIENTS = 3


@dataclass
class Watch:
    """What has been seen of the work until the last fault, so that each loss is counted once."""

    pipeline: Pipeline
    clients: list[Client]
    whole: set[str] = field(default_factory=set)
    told: set[str] = field(default_factory=set)
    rounds: int = 0
    repeated: int = 0
    failed: int = 0

    def answered(self) -> int:
        """Scores until now."""
        return sum(client.tally.answered for client in self.clients)

    def taken(self) -> dict[str, Any]:
        """Losses since the last look."""
        lost = [each for client in self.clients for each in client.tally.lost]
        refused, unsent = 0, 0
        for client in self.clients:
            refused += client.tally.refused.total()
            unsent += client.tally.unsent
            client.tally.lost, client.tally.unsent = [], 0
            client.tally.refused.clear()
        done = self.pipeline.done[self.rounds :]
        self.rounds += len(done)
        repeated = sum(each.repeated for each in self.pipeline.done) + self.pipeline.round.repeated
        new, self.repeated = repeated - self.repeated, repeated
        failed, self.failed = self.pipeline.failed[self.failed :], len(self.pipeline.failed)
        return {
            "epochs": new, "metrics": [word for each in done for word in metrics_lost(each)], "requests": lost,
            "versions": self.versions(), "refused": refused, "unsent": unsent, "rounds": len(done), "jobs": failed,
        }  # fmt: skip

    def versions(self) -> list[str]:
        """What is half registered, and stays so: a look may fall into a registration."""
        found = set(half_registered(self.whole))
        for _ in range(4):
            if not found - self.told:
                break
            time.sleep(5)
            found &= set(half_registered(self.whole))
        new = sorted(found - self.told)
        self.told |= found
        return new


def inject(kind: str, site: Site, watch: Watch) -> dict[str, Any]:
    """Does a fault, waits for the stack to be well again, and says what was lost."""
    began = datetime.now().isoformat(timespec="seconds")
    try:
        words = KINDS[kind](site)
    except NotNowError as error:
        return {"kind": kind, "at": began, "what": f"not done: {error}", "skipped": True}
    started, scores = time.monotonic(), watch.answered()
    taken, state = site.plant.wait_until_well(PATIENCE_S)
    while watch.answered() < scores + CLIENTS and time.monotonic() - started < PATIENCE_S:
        time.sleep(0.2)
    scored = time.monotonic() - started if watch.answered() >= scores + CLIENTS else None
    time.sleep(CALM_S)
    row = {"kind": kind, "at": began, "what": words, "well_s": taken, "scored_s": scored, "state": state,
           "load": os.getloadavg()[0]}  # fmt: skip
    try:
        return row | watch.taken()
    except Exception as error:
        return row | {"unread": f"{type(error).__name__}: {error}"[:500]}


def table(rows: list[dict[str, Any]]) -> Table:
    """Each kind of fault: how often, how long until all was well, and what was lost."""
    found = Table("fault", "times", "recovered", "median", "worst", "score after", "jobs repeated", "epochs", "metrics",
                  "requests", "versions")  # fmt: skip
    done = [row for row in rows if not row.get("skipped")]
    for kind in [*KINDS, "all"]:
        own = [row for row in done if kind in (row["kind"], "all")]
        if not own:
            continue
        well = [row["well_s"] for row in own if row["well_s"] is not None]
        scored = [row["scored_s"] for row in own if row["scored_s"] is not None]
        lost = [str(sum(len(row.get(what, [])) for row in own)) for what in ("jobs", "metrics", "requests", "versions")]
        found.add_row(
            kind, str(len(own)), str(min(len(well), len(scored))),
            f"{statistics.median(well):.0f} s" if well else "-", f"{max(well):.0f} s" if well else "-",
            f"{statistics.median(scored):.0f} s" if scored else "-",
            lost[0], str(sum(row.get("epochs", 0) for row in own)), *lost[1:],
        )  # fmt: skip
    return found


def main() -> int:
    """Brings the stack up, injects, and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=100, help="of all kinds together (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of moments and victims (default: %(default)s)")
    parser.add_argument("--only", action="append", choices=list(KINDS), help="this kind; may be repeated")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/sprue-faults"), help="(default: %(default)s)")
    parser.add_argument("--base", type=int, default=13_000, help="first of 72 ports (default: %(default)s)")
    parser.add_argument("--keep", action="store_true", help="leave the stack up")
    arguments = parser.parse_args()
    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    record, kinds = folder / "faults.jsonl", arguments.only or list(KINDS)
    rows = read_rows(record)
    plant = Plant(folder / "stack", arguments.base)
    plant.up()
    connect(plant)
    if not (folder / "data").exists():
        write_images(folder / "data")
    pipeline = Pipeline(plant, folder, first=len(list(folder.glob("params-*.yaml"))))
    pipeline.start()
    while not pipeline.done:
        time.sleep(1)
    clients = [Client(plant, folder / "data", number) for number in range(CLIENTS)]
    for client in clients:
        client.start()
    watch = Watch(pipeline, clients)
    while watch.answered() < CLIENTS:
        time.sleep(0.5)
    watch.taken()
    try:
        while len([row for row in rows if not row.get("skipped")]) < arguments.faults:
            kind = kinds[len(rows) % len(kinds)]
            row = inject(kind, Site(plant, pipeline, random.Random(f"{arguments.seed} {len(rows)}")), watch)
            rows.append(row)
            write_jsonl(record, row)
            print(len(rows), row, flush=True)
    finally:
        pipeline.stopped.set()
        for client in clients:
            client.stopped.set()
        Console(width=160).print(table(rows))
        if not arguments.keep:
            pipeline.join(60)
            plant.down()
    lost = [row for row in rows if any(row.get(what) for what in ("epochs", "metrics", "requests", "versions"))]
    return bool(lost) or any(row.get("well_s", 0) is None for row in rows)


def read_rows(record: Path) -> list[dict[str, Any]]:
    """The faults of earlier starts."""
    import json

    return [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []


if __name__ == "__main__":
    sys.exit(main())
