"""Whether the false-alarm rate is what is guaranteed: ``python benchmarks/coverage.py STORE --recipe NAME``.

STORE is a dataset's part of the store, as `make run` leaves it. Each class is fitted several times, with calibration
pictures drawn anew from its good training pictures, and the false alarms on the good test pictures are counted at
several alphas: beside the interval in which the guarantee puts nine counts in ten. The same test pictures are judged
each time, so the counts scatter with the calibrations alone; where all of them are high, the test pictures are not like
the training ones.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from upath import UPath

from sprue.data.manifest import Manifest
from sprue.data.samples import samples_of
from sprue.data.splits import SplitConfig, assign_splits
from sprue.errors import SprueError
from sprue.evaluation.alarms import chance_of, false_alarms
from sprue.features.tables import FeatureTable
from sprue.inference.backbone import resolve
from sprue.inference.calibration import Calibration
from sprue.inference.detector import Scoring, best_device, score_features
from sprue.inference.memory import keep_freed_memory
from sprue.inference.spec import FeatureSpec
from sprue.pipeline import Context
from sprue.store import location
from sprue.training.loop import FitSettings
from sprue.training.requests import fit_requests
from sprue.training.worker import fit_flow
from sprue.workspace import find_recipe

ALPHAS = (0.01, 0.05, 0.1)


def redrawn(manifest: Manifest, class_name: str, splits: SplitConfig) -> Manifest:
    """The manifest of one class, its good training samples divided anew."""
    frame = manifest.frame[manifest.frame["class_name"] == class_name].copy()
    pool = frame[frame["split"] != "test"]
    samples = {name: "".join(group) for name, group in pool.groupby("sample_id", sort=False)["sha256"]}
    assigned = assign_splits(class_name, list(samples.values()), splits, min(ALPHAS), "samples")
    split_of = dict(zip(samples, assigned, strict=True))
    frame.loc[pool.index, "split"] = pool["sample_id"].map(split_of)
    return Manifest(manifest.dataset, splits, frame)


def refit(context: Context, manifest: Manifest, epochs: int | None) -> list[dict[str, object]]:
    """Fits and calibrates a class, and counts its false alarms at each alpha."""
    (class_name,) = manifest.classes
    spec, settings = resolve(context.settings(FeatureSpec, "features")), context.settings(FitSettings, "fit")
    settings = replace(settings, epochs=epochs or settings.epochs)
    (request,) = fit_requests(manifest, spec, context.folder / "features", context.section("flow"), settings)
    best: list[tuple[float, dict]] = []
    fit_flow(request, best_device(), lambda epoch, state: best.append((epoch.validation_nll, state.flow)))
    table = FeatureTable(location(request.table))
    flow = request.build_flow(table)
    flow.load_state_dict(min(best, key=lambda each: each[0])[1])
    scoring, places = context.settings(Scoring, "scoring"), request.whole_config(table)["maps"]

    def scores(rows: pd.DataFrame) -> np.ndarray:
        return score_features(flow, scoring, table.read_samples(samples_of(rows), request.views, places))[0]

    test = manifest.select(class_name, "test")
    held_N, good_N = scores(manifest.select(class_name, "calibration")), scores(test[test["label"] == 0])
    found = []
    for alpha in ALPHAS:
        alarms = int((Calibration.fit(held_N, held_N, alpha).p_values(good_N) <= alpha).sum())
        expected = false_alarms(len(held_N), alpha, len(good_N))
        low, high = (int(bound) for bound in expected.interval(0.9))
        facts = {"class": class_name, "seed": manifest.splits.seed, "alpha": alpha, "calibration": len(held_N)}
        counts = {"good": len(good_N), "alarms": alarms, "guaranteed": f"{low} to {high}"}
        chance = chance_of(alarms, len(held_N), alpha, len(good_N))
        found.append(facts | counts | {"inside": low <= alarms <= high, "chance": chance})
    return found


def main() -> None:
    """Prints a row for each fit and alpha, and how many counts are inside of their interval."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", type=Path, help="the dataset's part of the store, such as store/tiles")
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--refits", type=int, default=10)
    parser.add_argument("--epochs", type=int, help="of each fit (default: the recipe's)")
    parser.add_argument("--calibration", type=float, default=0.15, help="share of good ones (default: %(default)s)")
    arguments = parser.parse_args()
    keep_freed_memory()
    recipe = yaml.safe_load(find_recipe(arguments.recipe).read_text())
    params = {"dataset": arguments.store.resolve().name, **recipe}
    context = Context("coverage", params, location("."), UPath(arguments.store.resolve().parent))
    manifest = Manifest.read(context.folder / "manifest.parquet")
    rows = []
    for class_name in manifest.classes:
        for seed in range(arguments.refits):
            splits = SplitConfig(seed=seed, calibration=arguments.calibration, validation=0.05)
            rows += refit(context, redrawn(manifest, class_name, splits), arguments.epochs)
            for row in rows[-len(ALPHAS) :]:
                print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    by_alpha = pd.DataFrame(rows).groupby("alpha")
    table = by_alpha.agg(alarms=("alarms", "mean"), good=("good", "first"), inside=("inside", "sum"))
    table["rate"] = table["alarms"] / table["good"]
    print(f"\nof {arguments.refits} fits a class, counts in the interval of nine in ten:\n\n{table.round(4)}")


if __name__ == "__main__":
    try:
        main()
    except SprueError as error:
        sys.exit(f"coverage: {error}")
