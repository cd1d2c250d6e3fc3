"""The audit log: one MLflow run for each decision about a champion, never changed afterwards.

Changes outside of sprue, such as in MLflow's own pages, are found by comparing the alias with the last entry; each
becomes an entry of its own.
"""

import json
import textwrap
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Literal, Self

import mlflow
from mlflow.entities import Metric, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, ErrorCode

from sprue.formats import AUDIT
from sprue.tracking.user import whoami

EXPERIMENT = "sprue-audit"
LONGEST_REASON = 2000
"""Characters of a reason that are kept."""

Kind = Literal["first", "promoted", "forced", "refused", "rolled back", "external"]
"""``first`` is a model's first version, ``external`` a change of the alias outside of sprue."""


@dataclass(frozen=True)
class Entry:
    """A decision.

    Attributes:
        number: Its place among the model's, from 1.
        model: The registered model.
        kind: What happened.
        before: The champion's version until then; None if there was none.
        after: The champion's version from then on; None if there is none.
        challenger: The version that was judged; None if none was.
        reason: Why, in words.
        by: Who, as user@host; of a change outside of sprue, who noticed it.
        at: When, in UTC.
    """

    number: int
    model: str
    kind: Kind
    before: int | None
    after: int | None
    challenger: int | None
    reason: str
    by: str
    at: datetime

    def __str__(self) -> str:
        """The entry on a line."""
        judged = f", version {self.challenger} judged" if self.kind == "refused" else ""
        change = f"{self.before or '-'} -> {self.after or '-'}{judged}"
        return f"{self.at:%Y-%m-%d %H:%M:%S}  {self.model:<24} {self.kind:<11} {change}  by {self.by}: {self.reason}"

    def as_json(self) -> dict[str, Any]:
        """The entry as JSON takes it."""
        return asdict(self) | {"at": self.at.isoformat()}


@dataclass
class History:
    """The decisions about one model. Who appends to it holds the model's lock since before it was read.

    Attributes:
        model: The registered model.
        entries: In the order of the decisions.
    """

    model: str
    entries: list[Entry]

    @classmethod
    def read(cls, model: str) -> Self:
        """Reads it."""
        return cls(model, entries(model))

    @property
    def champion(self) -> int | None:
        """The champion's version, as the last entry says."""
        changes = [entry for entry in self.entries if entry.kind != "refused"]
        return changes[-1].after if changes else None

    def append(
        self,
        kind: Kind,
        before: int | None,
        after: int | None,
        reason: str,
        challenger: int | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Appends an entry; `metrics` are what the decision rests on."""
        client = mlflow.MlflowClient()
        facts: dict[str, Any] = {
            "number": len(self.entries) + 1,  # the clocks of several machines do not tell the order
            "model": self.model,
            "kind": kind,
            "before": before,
            "after": after,
            "challenger": challenger,
            "reason": textwrap.shorten(reason, LONGEST_REASON),
            "by": f"unknown, noticed by {whoami()}" if kind == "external" else whoami(),
        }
        tags = {
            "sprue.audit": json.dumps(AUDIT.stamped({"id": uuid.uuid4().hex} | facts)),
            "sprue.model": self.model,
        }
        run = client.create_run(_experiment(), run_name=f"{self.model} {kind}", tags=tags)
        client.log_batch(
            run.info.run_id,
            metrics=[Metric(name, value, 0, 0) for name, value in (metrics or {}).items()],
            tags=[RunTag("mlflow.note.content", facts["reason"])],
        )
        client.set_terminated(run.info.run_id)
        self.entries.append(Entry(**facts, at=_time(run)))


def _experiment() -> str:
    """The audit log's experiment, created if there is none."""
    client = mlflow.MlflowClient()
    found = client.get_experiment_by_name(EXPERIMENT)
    if found is not None:
        return str(found.experiment_id)
    try:
        return str(client.create_experiment(EXPERIMENT))
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
            raise
        return _experiment()


def entries(model: str | None = None) -> list[Entry]:
    """The entries of a model in the order of the decisions; of all models, oldest first."""
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        return []
    which = f"tags.`sprue.model` = '{model}'" if model else ""
    found: dict[str, Entry] = {}  # MLflow's client may repeat a request, which makes a second run with the same id
    token = None
    while True:
        page = client.search_runs(
            [experiment.experiment_id], which, order_by=["attributes.start_time ASC"], page_token=token
        )
        for run in page:
            facts = AUDIT.current(json.loads(run.data.tags["sprue.audit"]), f"run {run.info.run_id} of the audit log")
            found.setdefault(facts.pop("id"), Entry(**facts, at=_time(run)))
        token = page.token
        if not token:
            ordered = found.values()
            return sorted(ordered, key=lambda entry: entry.number) if model else list(ordered)


def histories() -> list[History]:
    """The decisions about all models that have any, by model."""
    of_model: dict[str, list[Entry]] = {}
    for entry in entries():
        of_model.setdefault(entry.model, []).append(entry)
    return [History(model, sorted(found, key=lambda entry: entry.number)) for model, found in sorted(of_model.items())]


def _time(run: Run) -> datetime:
    return datetime.fromtimestamp(run.info.start_time / 1000, UTC)
