"""The audit trail: an MLflow run for each decision about a class's champion, never changed afterwards.

A change that nobody decided here, as one made in MLflow's own UI, is found by comparing the alias with the last entry,
and becomes an entry of its own.
"""

import json
import textwrap
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import mlflow
from mlflow.entities import Metric, RunTag
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, ErrorCode

from sprue.tracking.lock import whoami

EXPERIMENT = "sprue-audit"
LONGEST = 2000
"""Characters of a reason that are kept."""

Kind = Literal["first", "promoted", "forced", "refused", "rolled back", "external"]
"""What happened: ``first`` is a class's first version, ``external`` a change of the alias that was made elsewhere."""


@dataclass(frozen=True)
class Entry:
    """A decision.

    Attributes:
        number: Its place among the class's, from 1.
        class_name: The product class.
        kind: What happened.
        before: The champion's version until then; None if there was none.
        after: The champion's version from then on; None if there is none.
        challenger: The version that was judged; None if none was.
        reason: Why, in words.
        by: Who, as user@host.
        at: When, in UTC.
    """

    number: int
    class_name: str
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
        return (
            f"{self.at:%Y-%m-%d %H:%M:%S}  {self.class_name:<20} {self.kind:<11} {change}  by {self.by}: {self.reason}"
        )


def record(
    class_name: str,
    kind: Kind,
    before: int | None,
    after: int | None,
    reason: str,
    challenger: int | None = None,
    figures: Mapping[str, float] | None = None,
) -> None:
    """Adds an entry, by who holds the class's lock; `figures` are what the decision rests on."""
    client = mlflow.MlflowClient()
    reason = textwrap.shorten(reason, LONGEST)
    # Clocks of several machines do not tell the order.
    number = len(entries(class_name)) + 1
    facts = {
        "id": uuid.uuid4().hex,
        "number": number,
        "class": class_name,
        "kind": kind,
        "before": before,
        "after": after,
        "challenger": challenger,
    }
    tags = {
        "sprue.audit": json.dumps(facts | {"reason": reason, "by": whoami()}),
        "sprue.class": class_name,
    }
    run = client.create_run(_experiment(), run_name=f"{class_name} {kind}", tags=tags)
    client.log_batch(
        run.info.run_id,
        metrics=[Metric(name, value, 0, 0) for name, value in (figures or {}).items()],
        tags=[RunTag("mlflow.note.content", reason)],
    )
    client.set_terminated(run.info.run_id)


def _experiment() -> str:
    """The trail's experiment, made if there is none."""
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


def entries(class_name: str | None = None) -> list[Entry]:
    """The trail of a class, or of all, oldest first; of one class, in the order of the decisions."""
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        return []
    which = f"tags.`sprue.class` = '{class_name}'" if class_name else ""
    found: dict[str, Entry] = {}  # a request whose answer is lost is sent again, and makes a second run
    token = None
    while True:
        page = client.search_runs(
            [experiment.experiment_id], which, order_by=["attributes.start_time ASC"], page_token=token
        )
        for run in page:
            facts = json.loads(run.data.tags["sprue.audit"])
            found.setdefault(facts.pop("id"), _entry(facts, run.info.start_time))
        token = page.token
        if not token:
            ordered = found.values()
            return sorted(ordered, key=lambda entry: entry.number) if class_name else list(ordered)


def _entry(facts: dict[str, Any], milliseconds: int) -> Entry:
    at = datetime.fromtimestamp(milliseconds / 1000, UTC)
    return Entry(class_name=facts.pop("class"), at=at, **facts)
