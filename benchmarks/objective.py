"""How good a guide drawn defects are: ``python benchmarks/objective.py STORE --data DATA --recipe NAME``.

Searches each class as the stage does, and only then reads the test split: the AUROC of each trial's checkpoint there
beside its objective and its validation likelihood, their rank correlations over the trials, and the difference between
the winner and the recipe's own settings, fitted for as many epochs, with a 95 % interval over resampled pictures.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import ray
import yaml
from numpy.typing import NDArray
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score
from torch import Tensor
from upath import UPath

from defectflow import build_flow
from sprue.data.manifest import Manifest
from sprue.data.samples import samples_of
from sprue.errors import SprueError
from sprue.evaluation.metrics import auroc_difference
from sprue.features.tables import FeatureTable
from sprue.inference.backbone import resolve
from sprue.inference.detector import Scoring, best_device, score_features
from sprue.inference.memory import keep_freed_memory
from sprue.inference.spec import FeatureSpec
from sprue.pipeline import Context, connect_ray
from sprue.planning import recipe_requests
from sprue.search.drawn import extract_drawn
from sprue.search.objective import Objective
from sprue.search.progress import Place, Progress
from sprue.search.search import SearchOutcome, search_class
from sprue.search.space import SearchConfig, at_point
from sprue.search.trial import TrialData, read_trial_data
from sprue.store import location
from sprue.tracking.server import connect, experiment_id
from sprue.training.worker import FitRequest, fit_flow
from sprue.workspace import find_recipe


@dataclass(frozen=True)
class Judge:
    """Measures checkpoints of one class's flows.

    Attributes:
        request: The recipe's fit.
        scoring: How a score is made.
        data: What trials read.
        test: Maps of the test samples.
        label_N: Which of these are defective.
    """

    request: FitRequest
    scoring: Scoring
    data: TrialData
    test: list[NDArray[np.float16]]
    label_N: NDArray[np.int64]

    def scores_on_test(self, request: FitRequest, state: Mapping[str, Tensor]) -> NDArray[np.float32]:
        """Scores of the test samples."""
        config = request.whole_config(FeatureTable(location(request.table)))
        flow = build_flow(request.flow_name, **config).to(best_device())
        flow.load_state_dict(state)
        return score_features(flow, self.scoring, self.test)[0]

    def objective(self, request: FitRequest, state: Mapping[str, Tensor]) -> float:
        """How well drawn defects are found."""
        config = request.whole_config(FeatureTable(location(request.table)))
        return Objective(self.data.validation, self.data.drawn, self.scoring)(request.flow_name, config, state)


def compare(judge: Judge, outcome: SearchOutcome, config: SearchConfig) -> None:
    """Prints what the test split says of the trials."""
    label_N, rows = judge.label_N, []
    for trial in outcome.trials:
        if trial.number in outcome.stored:
            fit = at_point(judge.request, trial.point, config.epochs)
            score_N = judge.scores_on_test(fit, outcome.checkpoint(trial.number).flow)
            facts = {
                "trial": trial.number,
                **trial.point,
                "epochs": len(trial.history),
                "nll": trial.best["validation_nll"],
            }
            rows.append({**facts, "objective": 100 * trial.objective, "test": 100 * roc_auc_score(label_N, score_N)})
    table = pd.DataFrame(rows)
    print(table.round(4).to_string(index=False))
    for name, of_trials in (("all trials", table), ("whole trials", table[table["epochs"] == table["epochs"].max()])):
        by_objective = spearmanr(of_trials["objective"], of_trials["test"]).statistic
        by_nll = spearmanr(-of_trials["nll"], of_trials["test"]).statistic
        print(f"rank correlation with the test AUROC, {len(of_trials)} {name}: ", end="")
        print(f"objective {by_objective:.2f}, likelihood {by_nll:.2f}")
    fits = {}
    for name, point in (("recipe", outcome.trials[0].point), ("winner", outcome.best.point)):
        reports = []
        request = at_point(judge.request, point, config.epochs)
        fit_flow(request, best_device(), lambda *report, reports=reports: reports.append(report))
        state = min(reports, key=lambda report: report[0].validation_nll)[1].flow
        score_N = judge.scores_on_test(request, state)
        fits[name] = score_N
        drawn, test = 100 * judge.objective(request, state), 100 * roc_auc_score(label_N, score_N)
        print(f"{name}: drawn defects {drawn:.2f}, test {test:.2f}")
    figure = auroc_difference(fits["winner"], fits["recipe"], label_N)
    low, high = 100 * figure.low, 100 * figure.high
    print(f"winner - recipe on the test split: {100 * figure.value:+.2f} ({low:+.2f} to {high:+.2f})")


def main() -> None:
    """Searches each class, then compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path, help="the dataset's part of the store, such as store/tiles")
    parser.add_argument("--data", required=True, help="the dataset's pictures, on which defects are drawn")
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--epochs", type=int, help="of a whole trial (default: the recipe's)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    keep_freed_memory()
    recipe = yaml.safe_load(find_recipe(arguments.recipe).read_text())
    context = Context(
        "objective", {"dataset": arguments.store.resolve().name, **recipe}, location(arguments.data),
        UPath(arguments.store.resolve().parent),
    )  # fmt: skip
    config = SearchConfig(trials=arguments.trials, epochs=arguments.epochs, seed=arguments.seed)
    scoring, manifest = context.settings(Scoring, "scoring"), Manifest.read(context.folder / "manifest.parquet")
    spec = resolve(context.settings(FeatureSpec, "features"))
    with tempfile.TemporaryDirectory() as name:
        folder = UPath(name)
        connect(folder)
        connect_ray()
        for request in recipe_requests(context, manifest):
            drawn = folder / "drawn" / request.class_name
            extract_drawn(spec, manifest.select(request.class_name, "validation"), context.data, drawn)
            place = Place(experiment_id("objective", folder), "", {})
            progress = Progress(request, config.epochs, config.trials, place)
            started = time.perf_counter()
            outcome = search_class(request, config, scoring, drawn, folder / "runs", [progress])
            print(
                f"{request.class_name}: {arguments.trials} trials in {(time.perf_counter() - started) / 60:.1f} minutes"
            )
            ray.shutdown()
            rows = manifest.select(request.class_name, "test")
            table = FeatureTable(location(request.table))
            samples = samples_of(rows)
            label_N = rows.groupby("sample_id", sort=False)["label"].max().to_numpy()
            test = table.read_samples(samples, request.views, request.whole_config(table)["maps"])
            compare(Judge(request, scoring, read_trial_data(request, str(drawn)), test, label_N), outcome, config)
            connect_ray()


if __name__ == "__main__":
    import logging

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        main()
    except SprueError as error:
        sys.exit(f"objective: {error}")
