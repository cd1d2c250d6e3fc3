"""How good a guide synthetic defects are: ``python benchmarks/objective.py STORE --data DATA --recipe NAME``.

Searches each class as the stage does, and only then reads the test split: the AUROC of each trial's checkpoint there
beside its objective and its validation likelihood, their rank correlations over the trials, and the difference between
the best trial's and the recipe's own settings, fitted for as many epochs, with a 95 % interval over resampled images.
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
from numpy.typing import NDArray
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score
from torch import Tensor
from upath import UPath

from defectflow import build_flow
from sprue.config import DatasetSettings, SearchSettings
from sprue.data.manifest import Manifest
from sprue.data.samples import samples_of
from sprue.errors import SprueError
from sprue.evaluation.metrics import auroc_difference
from sprue.features.synthetic import extract_synthetic
from sprue.inference.backbone import resolve
from sprue.inference.detector import best_device, score_features
from sprue.inference.memory import keep_freed_memory
from sprue.params import find_recipe, read_recipe
from sprue.search.objective import Objective
from sprue.search.progress import Progress, TrialRuns
from sprue.search.run import SearchOutcome, search_class
from sprue.search.trial import TrialData, read_trial_data
from sprue.stages.runtime import connect_ray
from sprue.store import location
from sprue.tracking.server import connect, experiment_id
from sprue.training.spec import FitSpec, recipe_spec
from sprue.training.worker import fit_flow


@dataclass(frozen=True)
class Judge:
    """Measures checkpoints of one class's flows.

    Attributes:
        spec: The recipe's plan.
        features: Folder of the dataset's features.
        data: What trials read.
        test: Maps of the test samples.
        label_N: Which of these are defective.
    """

    spec: FitSpec
    features: UPath
    data: TrialData
    test: list[NDArray[np.float16]]
    label_N: NDArray[np.int64]

    def scores_on_test(self, spec: FitSpec, state: Mapping[str, Tensor]) -> NDArray[np.float32]:
        """Scores of the test samples."""
        flow = build_flow(spec.flow_name, **spec.flow_config).to(best_device())
        flow.load_state_dict(state)
        return score_features(flow, spec.scoring, self.test)[0]

    def objective(self, spec: FitSpec, state: Mapping[str, Tensor]) -> float:
        """The AUROC of synthetic defects."""
        objective = Objective(self.data.validation, self.data.synthetic, spec.scoring)
        return objective(spec.flow_name, spec.flow_config, state)


def compare(judge: Judge, outcome: SearchOutcome, settings: SearchSettings) -> None:
    """Prints the trials' metrics on the test split."""
    label_N, rows = judge.label_N, []
    for trial in outcome.trials:
        if trial.number in outcome.stored:
            spec = judge.spec.with_values(trial.point, settings.epochs)
            score_N = judge.scores_on_test(spec, outcome.checkpoint(trial.number).flow)
            facts = {
                "trial": trial.number,
                **trial.point,
                "epochs": len(trial.history),
                "nll": trial.best["validation_nll"],
            }
            rows.append({**facts, "objective": 100 * trial.objective, "test": 100 * roc_auc_score(label_N, score_N)})
    table = pd.DataFrame(rows)
    print(table.round(4).to_string(index=False))
    longest = table[table["epochs"] == table["epochs"].max()]
    for name, of_trials in (("all trials", table), ("completed trials", longest)):
        by_objective = spearmanr(of_trials["objective"], of_trials["test"]).statistic
        by_nll = spearmanr(-of_trials["nll"], of_trials["test"]).statistic
        print(f"rank correlation with the test AUROC, {len(of_trials)} {name}: ", end="")
        print(f"objective {by_objective:.2f}, likelihood {by_nll:.2f}")
    fits = {}
    for name, point in (("recipe", outcome.trials[0].point), ("best", outcome.best.point)):
        reports = []
        spec = judge.spec.with_values(point, settings.epochs)
        fit_flow(spec, judge.features, best_device(), lambda *report, reports=reports: reports.append(report))
        state = min(reports, key=lambda report: report[0].validation_nll)[1].flow
        fits[name] = judge.scores_on_test(spec, state)
        synthetic, test = 100 * judge.objective(spec, state), 100 * roc_auc_score(label_N, fits[name])
        print(f"{name}: synthetic defects {synthetic:.2f}, test {test:.2f}")
    estimate = auroc_difference(fits["best"], fits["recipe"], label_N)
    low, high = 100 * estimate.low, 100 * estimate.high
    print(f"best - recipe on the test split: {100 * estimate.value:+.2f} ({low:+.2f} to {high:+.2f})")


def search_and_compare(
    spec: FitSpec, settings: SearchSettings, manifest: Manifest, features: UPath, root: UPath, folder: UPath
) -> None:
    """Searches a class in a folder, then compares its trials on the test split."""
    name = spec.class_name
    extract_synthetic(spec.features, manifest.select(name, "validation"), root, spec.synthetic_folder(features))
    trial_runs = TrialRuns(spec, settings.epochs, experiment_id("objective", folder), "", {})
    connect_ray()
    started = time.perf_counter()
    outcome = search_class(spec, settings, features, folder / "runs", [Progress(trial_runs, settings.trials)])
    print(f"{name}: {settings.trials} trials in {(time.perf_counter() - started) / 60:.1f} minutes")
    ray.shutdown()
    rows = manifest.select(name, "test")
    label_N = rows.groupby("sample_id", sort=False)["label"].max().to_numpy()
    test = spec.table(features).read_samples(samples_of(rows), spec.views, spec.flow_config["maps"])
    data = read_trial_data(spec, features)
    compare(Judge(spec, features, data, test, label_N), outcome, settings)


def main() -> None:
    """Searches each class, then compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path, help="the dataset's part of the store, such as store/tiles")
    parser.add_argument("--data", required=True, help="the dataset's images, on which synthetic defects are made")
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--epochs", type=int, help="of a full trial (default: the recipe's)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    keep_freed_memory()
    recipe, folder = read_recipe(find_recipe(arguments.recipe)), UPath(arguments.store.resolve())
    settings = DatasetSettings(features=recipe.features, flow=recipe.flow, fit=recipe.fit, scoring=recipe.scoring)
    search = SearchSettings(trials=arguments.trials, epochs=arguments.epochs, seed=arguments.seed)
    manifest, spec, features = Manifest.read(folder / "manifest.parquet"), resolve(recipe.features), folder / "features"
    with tempfile.TemporaryDirectory() as name:
        connect(UPath(name))
        for class_name in manifest.classes:
            planned = recipe_spec(manifest, "", class_name, spec, settings, features)
            search_and_compare(planned, search, manifest, features, location(arguments.data), UPath(name))


if __name__ == "__main__":
    import logging

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        main()
    except SprueError as error:
        sys.exit(f"objective: {error}")
