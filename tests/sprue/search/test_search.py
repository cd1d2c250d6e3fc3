"""A search tries points on Ray Tune, judges them by drawn defects, and hands the best trial's fit on."""

import torch

from sprue.inference.detector import Scoring
from sprue.search.search import search_class
from sprue.search.space import SearchConfig, at_point
from sprue.training.record import fit_key
from sprue.training.worker import fit_flow

CONFIG = SearchConfig(
    trials=6, space={"flow.steps": [1, 3], "fit.learning_rate": {"low": 1e-4, "high": 0.1, "log": True}}
)
SCORING = Scoring(top=0.1)


def test_the_best_trial_is_the_fit_of_its_settings(cluster, case):
    found = search_class(case.request, CONFIG, SCORING, case.drawn, case.runs)

    assert found.trials[0].point == {"flow.steps": 1, "fit.learning_rate": 0.01}
    assert [trial.number for trial in found.trials] == [1, 2, 3, 4, 5, 6]
    assert all(trial.history for trial in found.trials)
    assert found.best.whole
    assert found.best.objective == max(trial.objective for trial in found.trials if trial.whole)
    assert any(len(trial.history) < 4 for trial in found.trials), "ASHA stopped no trial"

    torch.set_num_threads(1)
    reports = []
    request = at_point(case.request, found.best.point)
    assert fit_key(request) == found.best.key
    fit_flow(request, torch.device("cpu"), lambda *report: reports.append(report))
    best = min(reports, key=lambda report: report[0].validation_nll)
    assert best[0].epoch == found.checkpoint.epoch
    assert best[1].flow.keys() == found.checkpoint.flow.keys()
    assert all(torch.equal(value, best[1].flow[name]) for name, value in found.checkpoint.flow.items())

    again = search_class(case.request, CONFIG, SCORING, case.drawn, case.runs)
    assert [trial.point for trial in again.trials] == [trial.point for trial in found.trials]
    assert [trial.history for trial in again.trials] == [trial.history for trial in found.trials]
