"""What was lost by a fault, and the record of all faults."""

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clients import Client
from invariants import half_registered, metrics_lost
from kinds import KINDS
from pipeline import Pipeline
from rich.table import Table

LOSSES = ("epochs", "metrics", "requests", "versions")


@dataclass
class Watch:
    """What has been seen of the work until the last fault, so that each loss is counted once."""

    pipeline: Pipeline
    clients: list[Client]
    whole: set[str] = field(default_factory=set)
    reported: set[str] = field(default_factory=set)
    rounds: int = 0
    repeated: int = 0
    failed: int = 0

    def answered(self) -> int:
        """Scores until now."""
        return sum(client.tally.answered for client in self.clients)

    def look(self) -> dict[str, Any]:
        """What was lost since the last look, and what clients and jobs had to repeat."""
        lost, refused, unsent = [], 0, 0
        for client in self.clients:
            tally = client.renew()
            lost += tally.lost
            refused += tally.refused.total()
            unsent += tally.unsent
        done = self.pipeline.done[self.rounds :]
        self.rounds += len(done)
        repeated = sum(each.repeated for each in self.pipeline.done) + self.pipeline.round.repeated
        new, self.repeated = repeated - self.repeated, repeated
        failed, self.failed = self.pipeline.failed[self.failed :], len(self.pipeline.failed)
        return {
            "epochs": new, "metrics": [word for each in done for word in metrics_lost(each)], "requests": lost,
            "versions": self._versions(), "refused": refused, "unsent": unsent, "rounds": len(done), "jobs": failed,
        }  # fmt: skip

    def _versions(self) -> list[str]:
        """What is half registered, and stays so: a look may fall into a registration."""
        found = set(half_registered(self.whole)) - self.reported
        for _ in range(6):
            if not found:
                break
            self.pipeline.stopped.wait(5)
            found &= set(half_registered(self.whole))
        self.reported |= found
        return sorted(found)


def read_rows(record: Path) -> list[dict[str, Any]]:
    """The faults of earlier starts."""
    return [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []


def add_row(record: Path, row: dict[str, Any]) -> None:
    """Appends a fault."""
    with record.open("a") as lines:
        lines.write(json.dumps(row) + "\n")


def is_well(row: dict[str, Any]) -> bool:
    """Whether nothing was lost, and the stack was well again."""
    return not any(row.get(what) for what in LOSSES) and None not in (row["well_s"], row["scored_s"])


def table(rows: list[dict[str, Any]]) -> Table:
    """Each kind of fault: how often, how long until all was well, and what was lost."""
    headings = ("fault", "times", "recovered", "median", "worst", "scores after", "jobs again", *LOSSES)
    found = Table(*headings)
    for kind in [*KINDS, "all"]:
        own = [row for row in rows if kind in (row["kind"], "all")]
        if not own:
            continue
        well = [row["well_s"] for row in own if row["well_s"] is not None]
        scored = [row["scored_s"] for row in own if row["scored_s"] is not None]
        lost = {what: sum(len(row.get(what, [])) for row in own) for what in ("jobs", *LOSSES[1:])}
        lost["epochs"] = sum(row.get("epochs", 0) for row in own)
        found.add_row(
            kind, str(len(own)), str(min(len(well), len(scored))), _seconds(well, statistics.median),
            _seconds(well, max), _seconds(scored, statistics.median), *(str(lost[what]) for what in ("jobs", *LOSSES)),
        )  # fmt: skip
    return found


def _seconds(values: list[float], of: Any) -> str:
    return f"{of(values):.0f} s" if values else "-"
