"""Searches the flow of one class with Ray Tune: Optuna proposes points, ASHA stops the trials that fall behind."""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
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
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from upath import UPath

from sprue.config import SearchSettings
from sprue.errors import SprueError
from sprue.features.synthetic import SYNTHETIC_VERSION
from sprue.search.space import current_point, search_space
from sprue.search.trial import DataOwner, Trial, TrialData, read_checkpoint
from sprue.store import remove_folder
from sprue.training.checkpoint import Checkpoint
from sprue.training.class_queue import ATTEMPTS
from sprue.training.loop import Epoch, is_done
from sprue.training.placement import FitPlacement, fit_placement
from sprue.training.spec import FitSpec
from sprue.training.worker_groups import storage_filesystem

logger = logging.getLogger(__name__)

VERSION = 1
"""Changes when the same trials get other objectives, or the same search proposes other points."""

REDUCTION = 3
"""ASHA lets one of so many trials pass each of its rungs; the epochs of the rungs are its powers."""

STARTUP_TRIALS = 5
"""Random points, before Optuna learns from the trials."""

WORKERS = "workers"
"""Folder of the checkpoints of trials that several workers fit."""

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
        number: From 1, in the order of the proposals; the first has the recipe's own values.
        point: The values that were tried.
        history: The metrics of its epochs, with the objective.
        completed: Whether it ran all its epochs.
        failure: Why it failed, if it did.
    """

    number: int
    point: dict[str, Any]
    history: list[dict[str, Any]]
    completed: bool
    failure: str = ""

    @property
    def best(self) -> dict[str, Any]:
        """The metrics of the epoch with the best validation likelihood, whose weights a fit keeps."""
        return min(self.history, key=lambda row: float(row["validation_nll"]))

    @property
    def objective(self) -> float:
        """The AUROC of synthetic defects in its best epoch; 0 if it has none."""
        return float(self.best["objective"]) if self.history else 0.0


@dataclass(frozen=True)
class SearchOutcome:
    """What became of a class's search.

    Attributes:
        class_name: The product class.
        key: See `search_key`.
        trials: In the order of the proposals.
        best: The completed trial with the highest objective.
        stored: The trials' best checkpoints by their numbers; a trial that failed at once has none.
    """

    class_name: str
    key: str
    trials: list[TrialOutcome]
    best: TrialOutcome
    stored: Mapping[int, tune.Checkpoint]

    def checkpoint(self, number: int) -> Checkpoint:
        """A trial's best checkpoint, by the validation likelihood."""
        return read_checkpoint(self.stored[number])


def search_key(spec: FitSpec, settings: SearchSettings) -> str:
    """12 hexadecimal digits that name a search by the recipe's fit, what is varied, and the objective."""
    facts = [
        spec.key,
        spec.scoring.model_dump(mode="json"),
        settings.model_dump(mode="json"),
        {"search": VERSION, "synthetic": SYNTHETIC_VERSION},
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def search_name(spec: FitSpec, settings: SearchSettings) -> str:
    """A search's name in its storage, where an interrupted one is found again."""
    return f"search-{spec.class_name}-{search_key(spec, settings)}"


def search_class(
    spec: FitSpec,
    settings: SearchSettings,
    features: UPath,
    runs: UPath,
    callbacks: Sequence[tune.Callback] = (),
) -> SearchOutcome:
    """Runs the trials of one class, as many side by side as the cluster has room for; resumes an interrupted search.

    Every node sees the folders: `features` of the dataset, and `runs` of the trials' results and checkpoints. The
    class's synthetic defects have been extracted. Ray Tune stores the callbacks with the search and restores them.

    Raises:
        SprueError: If the space is not valid, or no trial ran to its end.
    """
    # Ray Tune would take Ctrl-C for the end of the search, and the trials so far for its result.
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    # The callbacks print; Ray Tune and Optuna stay silent.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with shared_data(spec, features) as data:
            return _outcome(spec, settings, _tuner(spec, settings, data, features, runs, callbacks).fit())
    finally:
        remove_folder(runs / WORKERS)  # Ray Tune may end a trial's process before it has cleared up


@contextmanager
def shared_data(spec: FitSpec, features: UPath) -> Iterator["ray.ObjectRef[TrialData]"]:
    """Ray's reference to what the trials of a class read; it is freed at the end."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    owner = ray.remote(num_cpus=0)(DataOwner).options(scheduling_strategy=here).remote()
    try:
        try:
            (data,) = ray.get(owner.read.remote(spec, features))
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error  # Ray's own message has the traceback
        yield data
    finally:
        ray.kill(owner)


def _tuner(
    spec: FitSpec,
    settings: SearchSettings,
    data: "ray.ObjectRef[TrialData]",
    features: UPath,
    runs: UPath,
    callbacks: Sequence[tune.Callback],
) -> tune.Tuner:
    """A new search, or an interrupted one."""
    placement = fit_placement(settings.trials, spec.fit)
    trial = Trial(spec, settings.epochs, data, features, placement, runs / WORKERS)
    trainable = _trainable(trial, spec.class_name)
    name, filesystem = search_name(spec, settings), storage_filesystem(runs)
    stored = (runs / name).path
    if tune.Tuner.can_restore(stored, storage_filesystem=filesystem):
        logger.info("%s: resumes an interrupted search", spec.class_name)
        return tune.Tuner.restore(stored, trainable, restart_errored=True, storage_filesystem=filesystem)
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
    return tune.Tuner(trainable, tune_config=tune_config(spec, settings, placement), run_config=run_config)


def tune_config(spec: FitSpec, settings: SearchSettings, placement: FitPlacement) -> tune.TuneConfig:
    """What Ray Tune proposes, stops and runs side by side; one at a time, the same settings propose the same points.

    Raises:
        SprueError: If the space is not valid.
    """
    epochs = settings.epochs or spec.fit.epochs
    space: dict[str, BaseDistribution] = search_space(spec, settings)
    search = _NumberedSearch(
        space,
        metric="objective",
        mode="max",
        points_to_evaluate=[current_point(spec, space)],
        sampler=TPESampler(seed=settings.seed, n_startup_trials=STARTUP_TRIALS, multivariate=True),
    )
    halving = ASHAScheduler(
        time_attr="epoch", max_t=epochs, grace_period=min(epochs, REDUCTION), reduction_factor=REDUCTION
    )
    return tune.TuneConfig(
        metric="objective",
        mode="max",
        search_alg=search,
        scheduler=halving,
        num_samples=settings.trials,
        max_concurrent_trials=placement.groups,
        time_budget_s=None if settings.minutes is None else 60 * settings.minutes,
        # A new process would spend seconds on imports.
        reuse_actors=True,
        trial_name_creator=lambda trial: f"{spec.class_name}-{trial.trial_id}",
        trial_dirname_creator=lambda trial: trial.trial_id,
    )


def _trainable(trial: Trial, class_name: str) -> type[tune.Trainable]:
    """The trial as Ray Tune takes it, with the name that Ray's dashboard and ``ray list actors`` show."""

    def run(config: dict[str, Any]) -> None:
        trial(point_of(config))

    trainable = wrap_function(tune.with_resources(run, trial.resources))
    trainable.__name__ = trainable.__qualname__ = f"search-{class_name}"
    return trainable


def point_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The point in a trial's config."""
    return {name: value for name, value in config.items() if name != NUMBER}


def _outcome(spec: FitSpec, settings: SearchSettings, results: tune.ResultGrid) -> SearchOutcome:
    trials: list[TrialOutcome] = []
    stored: dict[int, tune.Checkpoint] = {}
    for number, result in enumerate(sorted(results, key=lambda result: result.config[NUMBER]), 1):
        point = point_of(result.config)
        history, failure = _history(result)
        completed = not failure and is_done(history, spec.with_values(point, settings.epochs).fit)
        trials.append(TrialOutcome(number, point, history, completed, failure))
        if result.best_checkpoints:
            stored[number] = result.get_best_checkpoint("validation_nll", "min")
    finished = [trial for trial in trials if trial.completed and trial.number in stored]
    if not finished:
        reasons = {trial.failure for trial in trials if trial.failure}
        raise SprueError(
            f"class {spec.class_name}: no trial of {len(trials)} ran to its end; "
            f"{'; '.join(sorted(reasons)) or 'give search.minutes more time, or search.epochs fewer'}"
        )
    best = max(finished, key=lambda trial: trial.objective)
    return SearchOutcome(spec.class_name, search_key(spec, settings), trials, best, stored)


def _history(result: tune.Result) -> tuple[list[dict[str, Any]], str]:
    """The metrics of a trial's epochs, and why it failed, if it did."""
    names = [field.name for field in fields(Epoch)] + ["objective"]
    rows = pd.DataFrame(result.metrics_dataframe).reindex(columns=names).dropna().drop_duplicates("epoch", keep="last")
    history = [{str(name): value for name, value in row.items()} for row in rows.to_dict("records")]
    failure = (result.metrics or {}).get("failure") or (str(result.error).splitlines()[-1] if result.error else "")
    return history, failure
