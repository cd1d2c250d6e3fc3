"""Reports a search to the terminal and to the tracking server, epoch by epoch."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ray import tune
from ray.tune.experiment import Trial

from sprue.search.run import NUMBER, point_of
from sprue.tracking.runs import FitRun
from sprue.tracking.writer import TrackingWriter
from sprue.training.loop import Epoch
from sprue.training.spec import FitSpec

logger = logging.getLogger(__name__)

EPOCH_FIELDS = tuple(field.name for field in fields(Epoch))


@dataclass(frozen=True)
class TrialRuns:
    """The runs of a search's trials on the tracking server.

    Attributes:
        spec: The recipe's plan.
        epochs: Of a full trial; as in the plan if None.
        experiment_id: The experiment.
        parent: The search's run.
        tags: Where the trials come from.
    """

    spec: FitSpec
    epochs: int | None
    experiment_id: str
    parent: str
    tags: Mapping[str, str]

    def open(self, point: Mapping[str, Any]) -> FitRun:
        """The run of the fit at a point, below the search's; made if there is none."""
        spec = self.spec.with_values(point, self.epochs)
        return FitRun.open(self.experiment_id, spec.name, spec.key, spec.params, self.tags, self.parent)


class Progress(tune.Callback):
    """Prints each epoch of each trial and logs it to the trial's run.

    A thread of its own writes to the server, so that no trial waits for it. Ray Tune stores its callbacks with the
    search; the thread and the open runs are made again when the search resumes.
    """

    def __init__(self, trial_runs: TrialRuns, trials: int) -> None:
        """Takes the runs, and how many trials there will be."""
        self.trial_runs, self.trials = trial_runs, trials
        self.best = 0.0
        self._connect()

    def _connect(self) -> None:
        self.history: dict[str, list[dict[str, Any]]] = {}
        self.runs: dict[str, FitRun] = {}
        self.writer = TrackingWriter()

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the thread and the runs."""
        return {name: value for name, value in vars(self).items() if name not in ("history", "runs", "writer")}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Restores the state and connects again."""
        self.__dict__.update(state)
        self._connect()

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """Reports an epoch."""
        name = f"{self.trial_runs.spec.class_name}  trial {trial.config[NUMBER]:2d} of {self.trials}"
        if "failure" in result:
            logger.warning("%s  %s", name, result["failure"])
            return
        epoch = Epoch(**{field: result[field] for field in EPOCH_FIELDS})
        self.best = max(self.best, result["objective"])
        objective, highest = 100 * result["objective"], 100 * self.best
        logger.info("%s  %s  synthetic defects %5.1f %% (highest %.1f %%)", name, epoch, objective, highest)
        row = {field: result[field] for field in (*EPOCH_FIELDS, "objective")}
        self.history.setdefault(trial.trial_id, []).append(row)
        self.writer.submit(self._log, trial.trial_id, point_of(trial.config), list(self.history[trial.trial_id]))

    def on_experiment_end(self, trials: list[Trial], **info: Any) -> None:
        """Waits until the server has everything."""
        self.writer.close()

    def _log(self, trial_id: str, point: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        if trial_id not in self.runs:
            self.runs[trial_id] = self.trial_runs.open(point)
        self.runs[trial_id].log_epochs(rows)
