"""Searches the flow of one class with Ray Tune: Optuna proposes points, ASHA stops the trials that fall behind."""

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import optuna
import pandas as pd
import ray
from optuna.distributions import BaseDistribution
from optuna.samplers import TPESampler
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch
from ray.tune.trainable import wrap_function
from upath import UPath

from sprue.errors import SprueError
from sprue.inference.detector import Scoring
from sprue.search.drawn import code_digest
from sprue.search.space import SearchConfig, at_point, current_point, search_space
from sprue.search.trial import Trial, read_checkpoint, read_trial_data
from sprue.training.checkpoint import Checkpoint
from sprue.training.fit import Slots, place_fits, storage_filesystem
from sprue.training.loop import Epoch, is_done
from sprue.training.queue import ATTEMPTS
from sprue.training.record import fit_key
from sprue.training.worker import FitRequest

logger = logging.getLogger(__name__)

REDUCTION = 3
"""ASHA lets one of so many trials pass each of its rungs; the epochs of the rungs are its powers."""

STARTUP_TRIALS = 5
"""Points that are drawn at random, before Optuna learns from what was found."""

NUMBER = "number"
"""A trial's number in Ray Tune's config, beside its point."""


class _NumberedSearch(OptunaSearch):
    """Optuna's search, which numbers the trials from 1 in the order in which it proposes them."""

    proposed = 0

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        point = super().suggest(trial_id)
        if point is None:
            return None
        self.proposed += 1
        return {**point, NUMBER: self.proposed}


@dataclass(frozen=True)
class TrialOutcome:
    """What became of a trial.

    Attributes:
        number: From 1, in the order in which they were proposed; the first has the recipe's own values.
        point: The values that were tried.
        key: The fit's; see `sprue.training.record.fit_key`.
        history: The figures of its epochs, with the objective.
        whole: Whether it ran to its end, and was not stopped before.
        failure: Why it failed, if it did.
    """

    number: int
    point: dict[str, Any]
    key: str
    history: list[dict[str, Any]]
    whole: bool
    failure: str = ""

    @property
    def best(self) -> dict[str, Any]:
        """The figures of its best epoch by the validation likelihood, which is the one that a fit keeps."""
        return min(self.history, key=lambda row: float(row["validation_nll"]))

    @property
    def objective(self) -> float:
        """How well its best epoch finds drawn defects; 0 if it has none."""
        return float(self.best["objective"]) if self.history else 0.0


@dataclass(frozen=True)
class SearchOutcome:
    """What became of a class's search.

    Attributes:
        class_name: The product class.
        key: Names the search by everything it depends on; see `search_key`.
        trials: In the order in which they were proposed.
        best: The whole trial with the highest objective.
        stored: Where the best checkpoints of the trials are, by their numbers; a trial that failed at once has none.
    """

    class_name: str
    key: str
    trials: list[TrialOutcome]
    best: TrialOutcome
    stored: Mapping[int, tune.Checkpoint]

    def checkpoint(self, number: int) -> Checkpoint:
        """A trial's best checkpoint, by the validation likelihood."""
        return read_checkpoint(self.stored[number])


def search_key(request: FitRequest, config: SearchConfig, scoring: Scoring) -> str:
    """12 hexadecimal digits that name a search by the recipe's fit, what is varied, and how points are judged."""
    facts = [fit_key(request), asdict(config), asdict(scoring), code_digest()]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def search_name(request: FitRequest, config: SearchConfig, scoring: Scoring) -> str:
    """A search's name in its storage, where an interrupted one is found again."""
    return f"search-{request.class_name}-{search_key(request, config, scoring)}"


def search_class(
    request: FitRequest,
    config: SearchConfig,
    scoring: Scoring,
    drawn: UPath,
    runs: UPath,
    callbacks: Sequence[tune.Callback] = (),
) -> SearchOutcome:
    """Runs the trials of one class, as many side by side as the cluster has room for.

    A search that was interrupted goes on with the trials that it has.

    Args:
        request: The recipe's fit.
        config: What is varied, and how long.
        scoring: How a score is made.
        drawn: The feature table of the class's drawn defects.
        runs: Folder or s3 URL of the trials' results and checkpoints, as every node sees it.
        callbacks: Told of each trial's epochs. They are stored with the search, and taken from there when it goes on.

    Raises:
        SprueError: If the space can't be searched, or no trial ran to its end.
    """
    # Ray Tune would take Ctrl-C for the search's end, and what it has found so far for its result.
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    # Ray Tune and Optuna would talk between the lines of the callbacks.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = search_space(request, config)
    slots = place_fits(config.trials, request.settings.workers)
    data = ray.remote(num_cpus=0)(read_trial_data).remote(request, str(drawn))
    trial = Trial(request, config.epochs, data, scoring, slots, runs / "workers")
    trainable = _trainable(trial, request.class_name)
    name, filesystem = search_name(request, config, scoring), storage_filesystem(runs)
    stored = (runs / name).path
    if tune.Tuner.can_restore(stored, storage_filesystem=filesystem):
        logger.info("%s: an interrupted search goes on", request.class_name)
        tuner = tune.Tuner.restore(stored, trainable, restart_errored=True, storage_filesystem=filesystem)
    else:
        run_config = tune.RunConfig(
            name=name,
            storage_path=runs.path,
            storage_filesystem=filesystem,
            failure_config=tune.FailureConfig(max_failures=ATTEMPTS),
            checkpoint_config=tune.CheckpointConfig(
                num_to_keep=1, checkpoint_score_attribute="validation_nll", checkpoint_score_order="min"
            ),
            callbacks=list(callbacks),
            verbose=0,
        )
        tuner = tune.Tuner(trainable, tune_config=_tune_config(request, config, space, slots), run_config=run_config)
    return _outcome(request, config, search_key(request, config, scoring), tuner.fit())


def _tune_config(
    request: FitRequest, config: SearchConfig, space: Mapping[str, BaseDistribution], slots: Slots
) -> tune.TuneConfig:
    epochs = config.epochs or request.settings.epochs
    search = _NumberedSearch(
        dict(space),
        metric="objective",
        mode="max",
        points_to_evaluate=[current_point(request, space)],
        sampler=TPESampler(seed=config.seed, n_startup_trials=STARTUP_TRIALS, multivariate=True),
    )
    halving = ASHAScheduler(
        time_attr="epoch", max_t=epochs, grace_period=min(epochs, REDUCTION), reduction_factor=REDUCTION
    )
    return tune.TuneConfig(
        metric="objective",
        mode="max",
        search_alg=search,
        scheduler=halving,
        num_samples=config.trials,
        max_concurrent_trials=slots.count,
        time_budget_s=None if config.minutes is None else 60 * config.minutes,
        # A new process imports for seconds what the last trial's has imported.
        reuse_actors=True,
        trial_name_creator=lambda trial: f"{request.class_name}-{trial.trial_id}",
        trial_dirname_creator=lambda trial: trial.trial_id,
    )


def _trainable(trial: Trial, class_name: str) -> type[tune.Trainable]:
    """The trial as Ray Tune wants it, with the name under which Ray's dashboard and ``ray list actors`` show it."""

    def run(config: dict[str, Any]) -> None:
        trial(point_of(config))

    trainable = wrap_function(tune.with_resources(run, trial.resources))
    trainable.__name__ = trainable.__qualname__ = f"search-{class_name}"
    return trainable


def point_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The point that a trial's config names."""
    return {name: value for name, value in config.items() if name != NUMBER}


def _outcome(request: FitRequest, config: SearchConfig, key: str, results: tune.ResultGrid) -> SearchOutcome:
    trials: list[TrialOutcome] = []
    stored: dict[int, tune.Checkpoint] = {}
    for number, result in enumerate(sorted(results, key=lambda result: result.config[NUMBER]), 1):
        point = point_of(result.config)
        fit = at_point(request, point, config.epochs)
        history, failure = _history(result)
        whole = not failure and is_done(history, fit.settings)
        trials.append(TrialOutcome(number, point, fit_key(fit), history, whole, failure))
        if result.best_checkpoints:
            stored[number] = result.get_best_checkpoint("validation_nll", "min")
    finished = [trial for trial in trials if trial.whole and trial.number in stored]
    if not finished:
        reasons = {trial.failure for trial in trials if trial.failure}
        raise SprueError(
            f"class {request.class_name}: no trial of {len(trials)} ran to its end; "
            f"{'; '.join(sorted(reasons)) or 'give search.minutes more time, or search.epochs fewer'}"
        )
    best = max(finished, key=lambda trial: trial.objective)
    return SearchOutcome(request.class_name, key, trials, best, stored)


def _history(result: tune.Result) -> tuple[list[dict[str, Any]], str]:
    """The figures of a trial's epochs, and why it failed, if it did."""
    names = [field.name for field in fields(Epoch)] + ["objective"]
    rows = pd.DataFrame(result.metrics_dataframe).reindex(columns=names).dropna().drop_duplicates("epoch", keep="last")
    history = [{str(name): value for name, value in row.items()} for row in rows.to_dict("records")]
    failure = (result.metrics or {}).get("failure") or (str(result.error).splitlines()[-1] if result.error else "")
    return history, failure
