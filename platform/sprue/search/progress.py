"""Tells a person and the tracking server how a search goes on, epoch by epoch."""

import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any

from mlflow.exceptions import MlflowException
from ray import tune
from ray.tune.experiment import Trial

from sprue.search.search import NUMBER, point_of
from sprue.search.space import at_point
from sprue.tracking.runs import FitRun
from sprue.training.loop import Epoch
from sprue.training.record import fit_key
from sprue.training.worker import FitRequest

logger = logging.getLogger(__name__)

EPOCH_FIELDS = tuple(field.name for field in fields(Epoch))


@dataclass(frozen=True)
class Place:
    """Where the runs of a search's trials are on the tracking server.

    Attributes:
        experiment_id: The experiment.
        parent: The search's run.
        tags: Where the trials come from.
    """

    experiment_id: str
    parent: str
    tags: Mapping[str, str]


class Progress(tune.Callback):
    """Prints each epoch of each trial, and logs it to a run of the trial below the search's.

    The server is told by a thread of its own, so that no trial waits for it. Ray Tune stores its callbacks with the
    search: the thread and the runs that it has opened are made anew when the search goes on.
    """

    def __init__(self, request: FitRequest, epochs: int | None, trials: int, place: Place) -> None:
        """Takes what names the trials.

        Args:
            request: The recipe's fit.
            epochs: Of a whole trial; as in the request if None.
            trials: How many there will be.
            place: Where their runs are.
        """
        self.request, self.epochs, self.trials, self.place = request, epochs, trials, place
        self.best = 0.0
        self._forget()

    def _forget(self) -> None:
        self.seen: dict[str, list[dict[str, Any]]] = {}
        self.runs: dict[str, FitRun] = {}
        self.logger = ThreadPoolExecutor(1, thread_name_prefix="tracking")

    def __getstate__(self) -> dict[str, Any]:
        """What is stored: everything but the thread and the runs."""
        return {name: value for name, value in vars(self).items() if name not in ("seen", "runs", "logger")}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Makes the thread and the runs anew."""
        self.__dict__.update(state)
        self._forget()

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """An epoch has ended."""
        name = f"{self.request.class_name}  trial {trial.config[NUMBER]:2d} of {self.trials}"
        if "failure" in result:
            logger.warning("%s  %s", name, result["failure"])
            return
        epoch = Epoch(**{field: result[field] for field in EPOCH_FIELDS})
        self.best = max(self.best, result["objective"])
        found, highest = 100 * result["objective"], 100 * self.best
        logger.info("%s  %s  drawn defects %5.1f %% (highest %.1f %%)", name, epoch, found, highest)
        row = {field: result[field] for field in (*EPOCH_FIELDS, "objective")}
        self.seen.setdefault(trial.trial_id, []).append(row)
        self.logger.submit(self._log, trial.trial_id, point_of(trial.config), list(self.seen[trial.trial_id]))

    def on_experiment_end(self, trials: list[Trial], **info: Any) -> None:
        """Waits until the server has been told."""
        self.logger.shutdown(wait=True)

    def _log(self, trial_id: str, point: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        try:
            if trial_id not in self.runs:
                self.runs[trial_id] = open_trial_run(self.request, point, self.epochs, self.place)
            self.runs[trial_id].log_epochs(rows)
        except MlflowException as error:
            logger.warning("the tracking server took no figures (%s); they are offered again", error)


def open_trial_run(request: FitRequest, point: Mapping[str, Any], epochs: int | None, place: Place) -> FitRun:
    """The run of a trial, below the search's; the run of the fit at that point, should there be one already."""
    fit = at_point(request, point, epochs)
    return FitRun.open(place.experiment_id, request.class_name, fit_key(fit), fit.params(), place.tags, place.parent)
