"""A search tries points on Ray Tune, judges them by drawn defects, and hands the best trial's fit on."""

from dataclasses import replace

import pytest
import torch

from sprue.errors import SprueError
from sprue.inference.detector import Scoring
from sprue.search.record import SearchRecord, with_winners
from sprue.search.report import importances, parallel_coordinates, trials_table
from sprue.search.search import SearchOutcome, TrialOutcome, search_class, search_key
from sprue.search.space import SearchConfig, at_point, search_space
from sprue.training.record import FitRecord, fit_key
from sprue.training.worker import fit_flow

CONFIG = SearchConfig(
    trials=6, space={"flow.steps": [1, 3], "fit.learning_rate": {"low": 1e-4, "high": 0.1, "log": True}}
)
SCORING = Scoring(top=0.1)


def fitted_here(request):
    """The best epoch of the same fit without Ray, and its checkpoint."""
    reports = []
    fit_flow(request, torch.device("cpu"), lambda *report: reports.append(report))
    return min(reports, key=lambda report: report[0].validation_nll)


def test_the_best_trial_is_the_fit_of_its_settings(cluster, case, tmp_path):
    found = search_class(case.request, CONFIG, SCORING, case.drawn, case.runs)

    assert found.trials[0].point == {"flow.steps": 1, "fit.learning_rate": 0.01}
    assert [trial.number for trial in found.trials] == [1, 2, 3, 4, 5, 6]
    assert all(trial.history for trial in found.trials)
    assert found.best.whole
    assert found.best.objective == max(trial.objective for trial in found.trials if trial.whole)
    assert any(len(trial.history) < 4 for trial in found.trials), "no trial was stopped"

    torch.set_num_threads(1)
    request = at_point(case.request, found.best.point)
    assert fit_key(request) == found.best.key
    epoch, checkpoint = fitted_here(request)
    kept = found.checkpoint(found.best.number)
    assert epoch.epoch == kept.epoch
    assert checkpoint.flow.keys() == kept.flow.keys()
    assert all(torch.equal(value, checkpoint.flow[name]) for name, value in kept.flow.items())

    again = search_class(case.request, CONFIG, SCORING, case.drawn, case.runs)
    assert again.trials == found.trials

    folder = case.runs / "record"
    record = SearchRecord.of(found)
    record.write(folder / "brick", FitRecord.of(request, kept, found.best.history, "abc", 1))
    assert SearchRecord.read(folder / "brick") == record
    assert with_winners([case.request], folder, CONFIG, SCORING) == [request]
    assert with_winners([case.request], folder, SearchConfig(), SCORING) == [case.request]
    with pytest.raises(SprueError, match="searched on other pictures or with other parameters than there are now"):
        with_winners([case.request], folder, replace(CONFIG, seed=1), SCORING)


def test_a_trial_that_can_not_be_fitted_finds_nothing(cluster, case):
    space = {"fit.learning_rate": [0.01, 1e20], "fit.gradient_norm": [1.0, 1e30]}
    config = SearchConfig(trials=6, epochs=2, space=space)
    found = search_class(case.request, config, SCORING, case.drawn, case.runs)
    failed = [trial for trial in found.trials if trial.failure]
    assert failed, "no point with an endless gradient was tried"
    assert all("the likelihood stopped being finite" in trial.failure for trial in failed)
    assert all(not trial.whole for trial in failed)
    assert found.best not in failed


def test_trials_of_several_workers_are_runs_of_ray_train(cluster, case):
    request = replace(case.request, settings=replace(case.request.settings, workers=2))
    config = replace(CONFIG, trials=4)
    found = search_class(request, config, SCORING, case.drawn, case.runs)
    assert found.trials[0].whole
    assert any(len(trial.history) < 4 for trial in found.trials), "no trial was stopped"
    alone, _ = fitted_here(at_point(case.request, found.best.point))
    assert found.best.best["validation_nll"] == pytest.approx(alone.validation_nll, rel=1e-4)
    assert found.checkpoint(found.best.number).epoch == alone.epoch
    assert not any((case.runs / "workers").iterdir())


def outcome_of(objectives, request):
    """A search whose trials found so much; all but the last ran to their ends."""
    trials = [
        TrialOutcome(
            number,
            {"flow.steps": 1 + 2 * (number % 2), "fit.learning_rate": 0.001 * ((number + 1) // 2)},
            f"key{number}",
            [
                {"epoch": 1, "validation_nll": 2.0, "objective": 0.1},
                {"epoch": 2, "validation_nll": 1.0, "objective": found},
            ],
            number < len(objectives),
        )
        for number, found in enumerate(objectives, 1)
    ]
    best = max(trials[:-1], key=lambda trial: trial.objective)
    return SearchOutcome("brick", search_key(request, CONFIG, SCORING), trials, best, {})


def test_the_report_tells_what_mattered(case):
    # The objective follows the number of steps alone.
    record = SearchRecord.of(outcome_of([0.5, 0.9, 0.52, 0.91, 0.5, 0.92, 0.51, 0.93, 0.53], case.request))
    table = trials_table(record)
    assert record.best == 8
    assert table["end"].tolist() == ["whole"] * 7 + ["best", "stopped"]
    assert table["objective"].tolist()[:2] == [0.5, 0.9]
    space = search_space(case.request, CONFIG)
    shares = importances(record, space)
    assert shares["flow.steps"] > 0.8
    assert sum(shares.values()) == pytest.approx(1)
    assert parallel_coordinates(record, space).startswith(b"\x89PNG")
    assert importances(SearchRecord.of(outcome_of([0.5] * 9, case.request)), space) == {}
    assert importances(SearchRecord.of(outcome_of([0.5, 0.9, 0.6], case.request)), space) == {}
