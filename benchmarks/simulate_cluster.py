"""Many classes on many GPU nodes with failures, simulated: ``python benchmarks/simulate_cluster.py scale.json``.

What a class costs the driver, the tracking server and the store in each stage comes from a file of
``benchmarks/scale``: the slope between its rows with the fewest and the most classes of the same nodes, so that what
a stage costs once is left out. How long the work itself takes (an epoch, an image through the backbone) can't be
measured there and is an argument, as are failures and the machines.

The simulation goes from event to event: a slot of a node begins a piece of a class's work (an epoch; in the other
stages the whole), which may end with the node's failure; then a piece is repeated when another slot is free. Driver,
tracking server and store are queues, first come, first served: all wait for the store, register's tasks for the
tracking server, and fits not for the driver, which logs their epochs. Stages follow each other. Prints for each stage
how long it takes, how busy everything is, and what is busiest: the bottleneck.
"""

import argparse
import heapq
import json
import math
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

FREE, FINISHED = 0, 1

STAGES = ("manifest", "features", "search", "fit", "evaluate", "register")


@dataclass
class Queue:
    """A server with some workers, first come, first served.

    Attributes:
        workers: How many there are.
        busy: Seconds of work so far.
    """

    workers: int
    busy: float = 0.0
    free: list[float] = field(default_factory=list)

    def use(self, now: float, seconds: float) -> float:
        """Takes a request; returns when it is answered."""
        self.free = self.free or [0.0] * self.workers
        end = max(now, heapq.heappop(self.free)) + seconds
        heapq.heappush(self.free, end)
        self.busy += seconds
        return end


@dataclass(frozen=True)
class Cost:
    """What a class costs in a stage: seconds of the driver and of the tracking server, and requests to the store."""

    driver: float
    server: float
    store: float


@dataclass
class Result:
    """A stage's length and how busy everything was in it, as fractions; how often nodes failed at work."""

    hours: float
    busy: dict[str, float]
    failures: int


def calibrate(rows: list[dict[str, Any]], speed: float) -> dict[str, Cost]:
    """The costs of a class, on cores that are `speed` times as fast as those of the measurement."""
    by_nodes: dict[int, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["classes"]):
        by_nodes.setdefault(row["nodes"], []).append(row)
    few, *_, many = max(by_nodes.values(), key=lambda found: found[-1]["classes"] - found[0]["classes"])
    if few["classes"] == many["classes"]:
        raise SystemExit("the file has no two rows with the same nodes and other numbers of classes")

    def slope(stage: str, name: str) -> float:
        return max(0.0, many["stages"][stage][name] - few["stages"][stage][name]) / (many["classes"] - few["classes"])

    return {
        stage: Cost(
            slope(stage, "driver_cpu_seconds") / speed,
            slope(stage, "server_cpu_seconds") / speed,
            sum(slope(stage, kind) for kind in ("read", "written", "listed", "removed")),
        )
        for stage in STAGES
    }


def simulate(
    stage: str, cost: Cost, slots_of_node: int, pieces: int, seconds: float, given: argparse.Namespace
) -> Result:
    """Runs a stage; a class is so many pieces of work, of so many seconds each, on one slot."""
    rng = random.Random(stage)
    driver, server, store = Queue(1), Queue(given.server_workers), Queue(1)
    fails_at = [rng.expovariate(1 / (3600 * given.mtbf_hours)) for _ in range(given.nodes)]
    # Events in the order of time: a slot is free, or has finished a piece.
    events = [(0.0, FREE, number, number // slots_of_node) for number in range(given.nodes * slots_of_node)]
    left = dict.fromkeys(range(len(events)), 0)
    waiting, interrupted = given.classes, []
    work = end = 0.0
    failures = 0
    while events:
        now, what, slot, node = heapq.heappop(events)
        if what == FINISHED:
            left[slot] -= 1
            logged = server.use(now, cost.server / pieces)
            stored = store.use(now, cost.store / pieces / given.store_requests)
            kept = driver.use(now, cost.driver / pieces) if stage == "fit" else now
            end = max(end, logged, stored, kept)
            heapq.heappush(events, (max(logged, stored) if stage == "register" else stored, FREE, slot, node))
            continue
        if not left[slot]:
            if interrupted:
                left[slot] = interrupted.pop()
            elif waiting:
                waiting, left[slot] = waiting - 1, pieces
            else:
                continue
            if stage != "fit":  # the driver hands out each class; the fits' queue needs it not
                now = driver.use(now, cost.driver)
        done = now + seconds * rng.uniform(0.8, 1.2)
        while fails_at[node] < now:  # it failed and came back while it had nothing to do
            fails_at[node] += rng.expovariate(1 / (3600 * given.mtbf_hours))
        if fails_at[node] < done:
            failures += 1
            work += fails_at[node] - now
            interrupted.append(left[slot])
            left[slot] = 0
            back = fails_at[node] + 60 * given.repair_minutes + given.restart_seconds
            heapq.heappush(events, (back, FREE, slot, node))
            continue
        work += done - now
        heapq.heappush(events, (done, FINISHED, slot, node))
    return Result(
        end / 3600,
        {
            "nodes": work / (end * given.nodes * slots_of_node),
            "driver": driver.busy / end,
            "tracking server": server.busy / (end * given.server_workers),
            "store": store.busy / end,
        },
        failures,
    )


def alone(cost: Cost, given: argparse.Namespace) -> Result:
    """A stage that the driver does by itself."""
    driver, store = cost.driver * given.classes, cost.store * given.classes / given.store_requests
    seconds = max(driver, store, 1e-9)
    busy = {"nodes": 0.0, "driver": driver / seconds, "tracking server": 0.0, "store": store / seconds}
    return Result(seconds / 3600, busy, 0)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("file", type=Path, help="scale.json of benchmarks/scale")
    add("--classes", type=int, default=10_000, help="(default: %(default)s)")
    add("--nodes", type=int, default=100, help="with a GPU each (default: %(default)s)")
    add("--cpus", type=int, default=8, help="of a node (default: %(default)s)")
    add("--images", type=int, default=200, help="of a class (default: %(default)s)")
    add("--images-per-second", type=float, default=300.0, help="through a GPU's backbone (default: %(default)s)")
    add("--epochs", type=int, default=20, help="of a fit (default: %(default)s)")
    add("--epoch-seconds", type=float, default=3.0, help="on a GPU (default: %(default)s)")
    add("--evaluate-seconds", type=float, default=10.0, help="of a class on a CPU (default: %(default)s)")
    add("--register-seconds", type=float, default=5.0, help="of a class on a CPU, alone (default: %(default)s)")
    add("--mtbf-hours", type=float, default=500.0, help="between two failures of a node (default: %(default)s)")
    add("--repair-minutes", type=float, default=15.0, help="(default: %(default)s)")
    add("--restart-seconds", type=float, default=20.0, help="of a worker group of Ray Train (default: %(default)s)")
    add("--server-workers", type=int, default=2, help="of the tracking server (default: %(default)s)")
    add("--store-requests", type=float, default=2000.0, help="a second, that the store takes (default: %(default)s)")
    add("--speed", type=float, default=1.0, help="of a core, as a multiple of the measurement's (default: %(default)s)")
    given = parser.parse_args()
    costs = calibrate(json.loads(given.file.read_text()), given.speed)
    work = {  # slots of a node, pieces, seconds of a piece
        "features": (1, 1, given.images / given.images_per_second),
        "fit": (1, given.epochs, given.epoch_seconds),
        "evaluate": (given.cpus, 1, given.evaluate_seconds),
        "register": (given.cpus, 1, given.register_seconds),
    }
    results = {
        stage: simulate(stage, costs[stage], *work[stage], given) if stage in work else alone(costs[stage], given)
        for stage in STAGES
    }
    show(results, costs, given)


def show(results: dict[str, Result], costs: dict[str, Cost], given: argparse.Namespace) -> None:
    """Prints what was simulated."""
    names = ("nodes", "driver", "tracking server", "store")
    title = f"{given.classes} classes on {given.nodes} nodes, each failing every {given.mtbf_hours:g} h"
    table = Table("stage", "a class, ms: driver", "server", "h", *names, "failures", "bottleneck", title=title)
    for stage, result in results.items():
        table.add_row(
            stage, f"{1000 * costs[stage].driver:.1f}", f"{1000 * costs[stage].server:.1f}", f"{result.hours:.2f}",
            *(f"{result.busy[name]:.0%}" for name in names), str(result.failures),
            max(names, key=lambda name: result.busy[name]),
        )  # fmt: skip
    hours = sum(result.hours for result in results.values())
    mean = {name: sum(each.hours * each.busy[name] for each in results.values()) / hours for name in names}
    table.add_row("all", "", "", f"{hours:.2f}", *(f"{mean[name]:.0%}" for name in names),
                  str(sum(result.failures for result in results.values())), "")  # fmt: skip
    Console(width=150).print(table)
    longest = max(results, key=lambda stage: results[stage].hours)
    share = results[longest].hours / hours
    fit = costs["fit"]
    needed = fit.driver * given.classes / (3600 * results["fit"].hours) if results["fit"].hours else math.nan
    print(f"{longest} takes {share:.0%} of the time; the driver is busy for {needed:.0%} of the fits' time")


if __name__ == "__main__":
    main()
