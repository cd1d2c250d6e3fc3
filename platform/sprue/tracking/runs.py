"""One MLflow run for each fit, found by the fit's key."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import mlflow
from mlflow.entities import Metric, Param, RunTag, ViewType

KEY_TAG = "sprue.run-key"
PARENT_TAG = "mlflow.parentRunId"
CURVES = ("train_nll", "validation_nll", "learning_rate", "images_per_second", "objective")
"""Metrics of an epoch; a fit outside of a search has no objective."""


@dataclass
class FitRun:
    """A fit's run: parameters, curves, and later metrics and images.

    Epochs that the server did not take are sent again with the next epoch, or when the run is opened again: nothing is
    lost, and nothing is logged twice.

    Attributes:
        run_id: MLflow's identifier.
        experiment_id: That of its experiment.
        params: Its parameters, as the server takes them.
        logged: Epochs whose metrics the server has.
    """

    run_id: str
    experiment_id: str
    params: dict[str, str]
    logged: set[int] = field(default_factory=set)

    @classmethod
    def open(
        cls,
        experiment_id: str,
        name: str,
        key: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str] | None = None,
        parent: str | None = None,
    ) -> Self:
        """Finds the run of a fit by its name and key, or creates it below a parent run."""
        client, params = mlflow.MlflowClient(), {name: str(value)[:6000] for name, value in params.items()}
        found = client.search_runs(
            [experiment_id], f"tags.`{KEY_TAG}` = '{name}-{key}'", ViewType.ACTIVE_ONLY, max_results=1
        )
        if found:
            run_id = found[0].info.run_id
            if missing := params.keys() - found[0].data.params.keys():
                client.log_batch(run_id, params=[Param(each, params[each]) for each in sorted(missing)])
            logged = {metric.step for metric in client.get_metric_history(run_id, CURVES[0])}
            return cls(run_id, experiment_id, params, logged)
        own = {KEY_TAG: f"{name}-{key}"} | ({PARENT_TAG: parent} if parent else {})
        run = client.create_run(experiment_id, run_name=name, tags={**(tags or {}), **own})
        client.log_batch(run.info.run_id, params=[Param(*each) for each in params.items()])
        return cls(run.info.run_id, experiment_id, params)

    def log_epochs(self, epochs: Sequence[Mapping[str, Any]]) -> None:
        """Logs the epochs that the server does not have."""
        missing = [epoch for epoch in epochs if epoch["epoch"] not in self.logged]
        if not missing:
            return
        metrics = [
            Metric(name, float(epoch[name]), round(epoch["time"] * 1000), epoch["epoch"])
            for epoch in missing
            for name in CURVES
            if name in epoch
        ]
        mlflow.MlflowClient().log_batch(self.run_id, metrics=metrics)
        self.logged |= {epoch["epoch"] for epoch in missing}

    def end(self, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
        """Ends the run; a later attempt at the same fit continues it."""
        mlflow.MlflowClient().set_terminated(self.run_id, status)

    def log_file(self, file: Path, folder: str) -> str:
        """Logs a file to a folder; returns its path there."""
        mlflow.MlflowClient().log_artifact(self.run_id, str(file), folder)
        return f"{folder}/{file.name}"

    def finish(self, metrics: Mapping[str, float], files: Path, name: str, tags: Mapping[str, str]) -> None:
        """Logs metrics and a folder of files under a name, and ends the run."""
        client = mlflow.MlflowClient()
        client.log_batch(
            self.run_id,
            metrics=[Metric(name, value, 0, 0) for name, value in metrics.items()],
            tags=[RunTag(name, value) for name, value in tags.items()],
        )
        client.log_artifacts(self.run_id, str(files), name)
        client.set_terminated(self.run_id)
