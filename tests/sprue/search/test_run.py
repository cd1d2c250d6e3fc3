"""A search tries points on Ray Tune, judges them by synthetic defects, and keeps the best trial's fit."""

import time

import pytest
import ray
import torch

from sprue.config import SearchSettings
from sprue.errors import SprueError
from sprue.search.record import SearchRecord
from sprue.search.report import importances, parallel_coordinates, trials_table
from sprue.search.run import (
    VERSION,
    SearchOutcome,
    TrialOutcome,
    point_of,
    search_class,
    search_key,
    search_name,
    shared_data,
    tune_config,
)
from sprue.search.space import search_space
from sprue.training.placement import FitPlacement
from sprue.training.record import FitRecord
from sprue.training.worker import fit_flow

SETTINGS = SearchSettings(
    trials=6, space={"flow.steps": [1, 3], "fit.learning_rate": {"low": 1e-4, "high": 0.1, "log": True}}
)


def fitted_here(spec, features):
    """The best epoch of the same fit without Ray, and its checkpoint."""
    reports = []
    fit_flow(spec, features, torch.device("cpu"), lambda *report: reports.append(report))
    return min(reports, key=lambda report: report[0].validation_nll)


def search(case, spec, settings):
    return search_class(spec, settings, case.features, case.runs)


def test_the_best_trial_is_the_fit_of_its_settings(cluster, case):
    found = search(case, case.spec, SETTINGS)

    assert found.trials[0].point == {"flow.steps": 1, "fit.learning_rate": 0.01}
    assert [trial.number for trial in found.trials] == [1, 2, 3, 4, 5, 6]
    assert all(trial.history for trial in found.trials)
    assert found.best.completed
    assert found.best.objective == max(trial.objective for trial in found.trials if trial.completed)
    assert any(len(trial.history) < 4 for trial in found.trials), "no trial was stopped"

    torch.set_num_threads(1)
    spec = case.spec.with_values(found.best.point)
    epoch, checkpoint = fitted_here(spec, case.features)
    kept = found.checkpoint(found.best.number)
    assert epoch.epoch == kept.epoch
    assert checkpoint.flow.keys() == kept.flow.keys()
    assert all(torch.equal(value, checkpoint.flow[name]) for name, value in kept.flow.items())

    second = search(case, case.spec, SETTINGS)
    assert second.trials == found.trials

    folder = case.runs / "record" / "brick"
    record = SearchRecord.of(found)
    plan = record.plan(case.spec, SETTINGS)
    assert plan.key == spec.key
    assert (
        f"the best of 6 trials, by synthetic defects on good validation images (AUROC {found.best.objective:.1%}; "
        in (plan.origin)
    )
    assert not SearchRecord.is_current(folder, search_key(case.spec, SETTINGS))
    record.write(folder, FitRecord(plan, kept.epoch, found.best.history, "abc", 1, kept.flow))
    assert SearchRecord.read(folder) == record
    assert FitRecord.is_current(folder / "fit", plan.key)
    assert SearchRecord.is_current(folder, search_key(case.spec, SETTINGS))


def test_what_trials_share_is_freed_though_its_reference_was_pickled(cluster, case):
    with shared_data(case.spec, case.features) as data:
        ray.cloudpickle.dumps(data)  # as Ray Tune does, which pins it
        assert ray.get(data).validation
    with pytest.raises(ray.exceptions.ObjectLostError):
        for _ in range(300):  # Ray notices the owner's death within seconds
            ray.get(data, timeout=60)
            time.sleep(0.1)


def test_a_search_is_found_by_all_that_its_outcome_depends_on(case):
    changes = [
        (case.spec.with_values({"fit.learning_rate": 0.02}), SETTINGS),
        (case.spec.model_copy(update={"train": case.spec.train[1:]}), SETTINGS),
        (case.spec.model_copy(update={"scoring": case.spec.scoring.model_copy(update={"top": 0.2})}), SETTINGS),
        (case.spec, SETTINGS.model_copy(update={"seed": 1})),
        (case.spec, SETTINGS.model_copy(update={"trials": 7})),
        (case.spec, SETTINGS.model_copy(update={"space": {"flow.steps": [1, 2]}})),
    ]
    keys = {search_key(*each) for each in [(case.spec, SETTINGS), *changes]}
    assert len(keys) == len(changes) + 1
    moved = case.spec.model_copy(update={"manifest": "1" * 64, "origin": "words"})
    assert search_key(moved, SETTINGS) == search_key(case.spec, SETTINGS)
    assert search_name(case.spec, SETTINGS) == f"search-brick-{search_key(case.spec, SETTINGS)}"


def test_no_search_and_a_damaged_one_say_what_to_do(case):
    folder = case.runs / "none"
    with pytest.raises(SprueError, match=r"there is no .*search\.json; run the search stage first"):
        SearchRecord.read(folder)
    folder.mkdir(parents=True)
    (folder / "search.json").write_text('{"format": 1, "class_name": "brick", "trials": []}')
    with pytest.raises(SprueError, match=r"is not a finished search: .*; delete it and run the search again"):
        SearchRecord.read(folder)


def test_a_trial_that_can_not_be_fitted_detects_nothing(cluster, case):
    space = {"fit.learning_rate": [0.01, 1e20], "fit.gradient_norm": [1.0, 1e30]}
    found = search(case, case.spec, SearchSettings(trials=6, epochs=2, space=space))
    failed = [trial for trial in found.trials if trial.failure]
    assert failed, "no point with an endless gradient was tried"
    assert all("the likelihood stopped being finite" in trial.failure for trial in failed)
    assert all(not trial.completed for trial in failed)
    assert found.best not in failed


def test_trials_of_several_workers_are_runs_of_ray_train(cluster, case):
    fit = {"workers": 2, "precision": "float32"}  # parts of a batch are rounded otherwise than all of it
    spec = case.spec.model_copy(update={"fit": case.spec.fit.model_copy(update=fit)})
    (case.runs / "workers" / "of-a-trial-that-was-killed").mkdir(parents=True)
    found = search(case, spec, SearchSettings(trials=2, space={"fit.learning_rate": [0.01, 0.1]}))
    assert found.trials[0].completed
    assert not any(trial.failure for trial in found.trials)
    assert any(len(trial.history) < 4 for trial in found.trials), "no trial was stopped"
    alone, _ = fitted_here(spec.with_values(found.best.point), case.features)
    assert found.best.best["validation_nll"] == pytest.approx(alone.validation_nll, rel=1e-4)
    assert found.checkpoint(found.best.number).epoch == alone.epoch
    assert not (case.runs / "workers" / "of-a-trial-that-was-killed").exists()


PINNED = {
    1: [
        (1, 0.01),
        (3, 0.006431172),
        (1, 0.00866328),
        (3, 0.0778015558),
        (3, 0.00386086627),
        (3, 0.000202381258),
        (3, 0.072166357),
        (1, 0.000120226322),
    ]
}
"""By `VERSION`: the first points; the last three are learned from the trials."""


def test_other_proposals_need_another_version(case):
    algorithm = tune_config(case.spec, SETTINGS, FitPlacement(groups=1, workers=1, cpus=1, gpus=0)).search_alg
    points = []
    for number in range(1, 9):
        config = algorithm.suggest(str(number))
        assert config["number"] == number
        points.append(tuple(point_of(config).values()))
        objective = points[-1][0] / 4 + points[-1][1]
        algorithm.on_trial_complete(str(number), {"objective": objective})
    assert points == [(steps, pytest.approx(rate, rel=1e-6)) for steps, rate in PINNED[VERSION]]


def outcome_of(objectives, spec):
    """A search with these objectives; all trials but the last were completed."""
    trials = [
        TrialOutcome(
            number,
            {"flow.steps": 1 + 2 * (number % 2), "fit.learning_rate": 0.001 * ((number + 1) // 2)},
            [
                {"epoch": 1, "validation_nll": 2.0, "objective": 0.1},
                {"epoch": 2, "validation_nll": 1.0, "objective": found},
            ],
            number < len(objectives),
        )
        for number, found in enumerate(objectives, 1)
    ]
    best = max(trials[:-1], key=lambda trial: trial.objective)
    return SearchOutcome("brick", search_key(spec, SETTINGS), trials, best, {})


def test_the_report_tells_which_settings_mattered(case):
    # The objective follows the number of steps alone.
    record = SearchRecord.of(outcome_of([0.5, 0.9, 0.52, 0.91, 0.5, 0.92, 0.51, 0.93, 0.53], case.spec))
    table = trials_table(record)
    assert record.best == 8
    assert table["end"].tolist() == ["completed"] * 7 + ["best", "stopped"]
    assert table["objective"].tolist()[:2] == [0.5, 0.9]
    space = search_space(case.spec, SETTINGS)
    fractions = importances(record, space)
    assert fractions["flow.steps"] > 0.8
    assert sum(fractions.values()) == pytest.approx(1)
    assert parallel_coordinates(record, space).startswith(b"\x89PNG")
    assert importances(SearchRecord.of(outcome_of([0.5] * 9, case.spec)), space) == {}
    assert importances(SearchRecord.of(outcome_of([0.5, 0.9, 0.6], case.spec)), space) == {}
