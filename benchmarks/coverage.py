"""Whether the false-alarm rate is what is promised: ``python benchmarks/coverage.py STORE --recipe NAME [--folds 5]``.

STORE is a dataset's part of the store, as `sprue run` leaves it. Each class is fitted several times, with other
calibration images, and the false alarms on the good test images are counted at several alphas under each promise: the
marginal and the conditional guarantee, and with `--folds` cross-conformal calibration. Beside each count stands the
interval that holds nine in ten by the Beta law. A promise that needs more calibration samples than there are has no
row.

By default the same test images are scored each time: where all counts are high, the test images are not like the
training ones. With `--exchange` each refit draws its good test images, as many, from all good images. They are
exchangeable then by construction, and what is tested is the promise alone.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from seeds import fitted
from upath import UPath

from defectflow import Ensemble
from sprue.config import CalibrationSettings, DatasetSettings, Guarantee, ManifestSettings
from sprue.data.folds import assign_folds
from sprue.data.manifest import Manifest
from sprue.data.samples import samples_of
from sprue.data.splits import TEST, assign_splits
from sprue.errors import SprueError
from sprue.evaluation.calibrate import HeldOut, score_held_out
from sprue.inference.backbone import resolve
from sprue.inference.calibration import Calibration, calibration_samples_needed, cross_conformal_bound
from sprue.inference.detector import score_features
from sprue.inference.memory import keep_freed_memory
from sprue.inference.spec import FeatureSpec
from sprue.params import find_recipe, read_recipe
from sprue.release.false_alarms import false_alarms
from sprue.training.plan import recipe_plan

ALPHAS = (0.01, 0.05, 0.1)
GUARANTEES: tuple[Guarantee, ...] = ("marginal", "conditional")


def good_samples(manifest: Manifest, class_name: str, seed: int, exchange: bool) -> pd.Series:
    """The good samples of a class that are not for the test, by their ids: the digests of their images, joined."""
    frame = manifest.frame[(manifest.frame["class_name"] == class_name) & (manifest.frame["label"] == 0)]
    contents = frame.groupby("sample_id", sort=False)["sha256"].agg("".join)
    tested = frame.loc[frame["split"] == TEST, "sample_id"].unique()
    if exchange:
        tested = np.random.default_rng(seed).choice(contents.index, len(tested), replace=False)
    return contents.drop(tested)


def resplit(
    manifest: Manifest, class_name: str, settings: ManifestSettings, good: pd.Series, assigned: Sequence[str]
) -> Manifest:
    """The manifest of one class with other splits of its `good` samples; the other good ones are for the test."""
    frame = manifest.frame[manifest.frame["class_name"] == class_name].copy()
    split_of = dict(zip(good.index, assigned, strict=True))
    frame["split"] = frame["sample_id"].map(split_of).fillna(TEST)
    return Manifest(manifest.dataset, settings, frame)


def refit(
    manifest: Manifest, features: UPath, spec: FeatureSpec, settings: DatasetSettings
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Fits a class; returns the scores of its calibration samples and of its good test samples."""
    (class_name,) = manifest.classes
    plan = recipe_plan(manifest, "", class_name, spec, settings, features)
    rows = manifest.folds(class_name) or [manifest.calibration_rows(class_name)]
    held_out = [HeldOut(fitted(fit, features), of_fit) for fit, of_fit in zip(plan.fits, rows, strict=True)]
    table, test = plan.first.table(features), manifest.select(class_name, TEST)
    calibration_N, _ = score_held_out(held_out, plan.first.scoring, table)
    maps = table.read_samples(samples_of(test[test["label"] == 0]), plan.first.views)
    test_N, _, _ = score_features(Ensemble([each.flow for each in held_out]), plan.first.scoring, maps)
    return calibration_N, test_N


def rows_of(
    promise: str, guarantee: Guarantee, folds: int, calibration_N: NDArray[np.float32], test_N: NDArray[np.float32]
) -> list[dict[str, object]]:
    """A row for each alpha: how many false alarms there are, and what is promised."""
    rows: list[dict[str, object]] = []
    samples, good = len(calibration_N), len(test_N)
    for alpha in ALPHAS:
        if samples < calibration_samples_needed(alpha, guarantee):
            continue
        calibration = Calibration.fit(calibration_N, calibration_N, alpha, guarantee=guarantee, folds=folds)
        alarms = int(calibration.is_anomalous(test_N).sum())
        low, high = (int(bound) for bound in false_alarms(calibration, good).interval(0.9))
        proven = cross_conformal_bound(samples, max(2, folds), alpha)
        said = {
            "marginal": f"at most {100 * alpha:.3g} % on average",
            "conditional": f"at most {100 * alpha:.3g} % in 95 of 100 calibrations",
            "cross": f"{100 * alpha:.3g} % on average; proven {100 * proven:.3g} %",
        }
        facts = {"alpha": alpha, "promise": promise, "promised": said[promise], "calibration": samples, "good": good}
        rows.append(facts | {"alarms": alarms, "inside": low <= alarms <= high, "above": alarms > alpha * good})
    return rows


def main() -> None:
    """Prints a row for each refit, promise and alpha, and their means."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", type=Path, help="the dataset's part of the store, such as store/tiles")
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--refits", type=int, default=10)
    parser.add_argument("--folds", type=int, default=0, help="of cross-conformal calibration; 0 for none")
    parser.add_argument("--exchange", action="store_true", help="draw the good test images anew for each refit")
    parser.add_argument("--epochs", type=int, help="of each fit (default: the recipe's)")
    parser.add_argument("--calibration", type=float, default=0.15, help="fraction of good ones (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.folds in (1, 2):
        parser.error("--folds: give 3 or more")
    keep_freed_memory()
    recipe, folder = read_recipe(find_recipe(arguments.recipe)), UPath(arguments.store.resolve())
    fit = recipe.fit.model_copy(update={"epochs": arguments.epochs or recipe.fit.epochs})
    settings = DatasetSettings(features=recipe.features, flow=recipe.flow, fit=fit, scoring=recipe.scoring)
    manifest, spec, features = Manifest.read(folder / "manifest.parquet"), resolve(recipe.features), folder / "features"
    rows: list[dict[str, object]] = []
    for class_name, seed in itertools.product(manifest.classes, range(arguments.refits)):
        splits = ManifestSettings(seed=seed, calibration=arguments.calibration, validation=0.05)
        good = good_samples(manifest, class_name, seed, arguments.exchange)
        wanted = CalibrationSettings(alpha=min(ALPHAS))
        held_out = assign_splits(class_name, list(good), splits, wanted)
        scores = refit(resplit(manifest, class_name, splits, good, held_out), features, spec, settings)
        found = [row for guarantee in GUARANTEES for row in rows_of(guarantee, guarantee, 1, *scores)]
        if arguments.folds:
            in_folds = assign_folds(class_name, list(good), arguments.folds, splits)
            scores = refit(resplit(manifest, class_name, splits, good, in_folds), features, spec, settings)
            found += rows_of("cross", "marginal", arguments.folds, *scores)
        for row in found:
            values = "  ".join(f"{name} {value}" for name, value in row.items())
            print(f"{class_name}  seed {seed}  {values}", flush=True)
        rows += found
    groups = pd.DataFrame(rows).groupby(["alpha", "promise", "promised"])
    table = groups.agg(
        calibration=("calibration", "first"), good=("good", "first"), alarms=("alarms", "mean"),
        above=("above", "sum"), inside=("inside", "sum"),
    )  # fmt: skip
    table["rate %"] = 100 * table["alarms"] / table["good"]
    print(f"\nof {arguments.refits} fits a class: counts above alpha, and in the interval of nine in ten\n")
    print(table.round(2).to_string())


if __name__ == "__main__":
    try:
        main()
    except SprueError as error:
        sys.exit(f"coverage: {error}")
