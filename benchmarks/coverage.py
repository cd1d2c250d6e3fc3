"""Whether the false-alarm rate is what is guaranteed: ``python benchmarks/coverage.py STORE --recipe NAME``.

STORE is a dataset's part of the store, as `sprue run` leaves it. Each class is fitted several times, with other
calibration images of its good training images, and the false alarms on the good test images are counted at several
alphas under both guarantees: beside the interval in which the guarantee puts nine counts in ten. The same test images
are scored each time, so the counts scatter with the calibrations alone; where all of them are high, the test images are
not like the training ones. A guarantee that needs more calibration samples than there are has no row.
"""

import argparse
import itertools
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from upath import UPath

from sprue.config import CalibrationSettings, DatasetSettings, Guarantee, ManifestSettings
from sprue.data.manifest import Manifest
from sprue.data.samples import samples_of
from sprue.data.splits import assign_splits
from sprue.errors import SprueError
from sprue.inference.backbone import resolve
from sprue.inference.calibration import Calibration, calibration_samples_needed
from sprue.inference.detector import best_device, score_features
from sprue.inference.memory import keep_freed_memory
from sprue.inference.spec import FeatureSpec
from sprue.params import find_recipe, read_recipe
from sprue.release.false_alarms import chance_of, false_alarms
from sprue.training.spec import recipe_spec
from sprue.training.worker import fit_flow

ALPHAS = (0.01, 0.05, 0.1)
GUARANTEES: tuple[Guarantee, ...] = ("marginal", "conditional")


def resplit(manifest: Manifest, class_name: str, settings: ManifestSettings) -> Manifest:
    """The manifest of one class with another split of its good training samples."""
    frame = manifest.frame[manifest.frame["class_name"] == class_name].copy()
    pool = frame[frame["split"] != "test"]
    samples = {name: "".join(group) for name, group in pool.groupby("sample_id", sort=False)["sha256"]}
    promise = CalibrationSettings(alpha=min(ALPHAS))
    assigned = assign_splits(class_name, list(samples.values()), settings, promise, "samples")
    split_of = dict(zip(samples, assigned, strict=True))
    frame.loc[pool.index, "split"] = pool["sample_id"].map(split_of)
    return Manifest(manifest.dataset, settings, frame)


def refit(
    manifest: Manifest, features: UPath, feature_spec: FeatureSpec, settings: DatasetSettings
) -> list[dict[str, object]]:
    """Fits and calibrates a class, and counts its false alarms at each alpha under each guarantee."""
    (class_name,) = manifest.classes
    spec = recipe_spec(manifest, "", class_name, feature_spec, settings, features)
    best: list[tuple[float, dict]] = []
    fit_flow(spec, features, best_device(), lambda epoch, state: best.append((epoch.validation_nll, state.flow)))
    table, flow = spec.table(features), spec.build_flow()
    flow.load_state_dict(min(best, key=lambda each: each[0])[1])

    def scores(rows: pd.DataFrame) -> np.ndarray:
        maps = table.read_samples(samples_of(rows), spec.views, spec.flow_config["maps"])
        return score_features(flow, spec.scoring, maps)[0]

    test = manifest.select(class_name, "test")
    held_N, good_N = scores(manifest.select(class_name, "calibration")), scores(test[test["label"] == 0])
    found = []
    for alpha, guarantee in itertools.product(ALPHAS, GUARANTEES):
        if len(held_N) < calibration_samples_needed(alpha, guarantee):
            continue
        calibration = Calibration.fit(held_N, held_N, alpha, guarantee=guarantee)
        alarms = int(calibration.is_anomalous(good_N).sum())
        low, high = (int(bound) for bound in false_alarms(calibration, len(good_N)).interval(0.9))
        facts = {"class": class_name, "seed": manifest.settings.seed, "alpha": alpha, "guarantee": guarantee}
        counts = {"calibration": len(held_N), "good": len(good_N), "alarms": alarms, "guaranteed": f"{low} to {high}"}
        chance = chance_of(alarms, calibration, len(good_N))
        found.append(facts | counts | {"inside": low <= alarms <= high, "chance": chance})
    return found


def main() -> None:
    """Prints a row for each fit and alpha, and how many counts are inside of their interval."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", type=Path, help="the dataset's part of the store, such as store/tiles")
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--refits", type=int, default=10)
    parser.add_argument("--epochs", type=int, help="of each fit (default: the recipe's)")
    parser.add_argument("--calibration", type=float, default=0.15, help="fraction of good ones (default: %(default)s)")
    arguments = parser.parse_args()
    keep_freed_memory()
    recipe, folder = read_recipe(find_recipe(arguments.recipe)), UPath(arguments.store.resolve())
    fit = recipe.fit.model_copy(update={"epochs": arguments.epochs or recipe.fit.epochs})
    settings = DatasetSettings(features=recipe.features, flow=recipe.flow, fit=fit, scoring=recipe.scoring)
    manifest, spec, features = Manifest.read(folder / "manifest.parquet"), resolve(recipe.features), folder / "features"
    rows = []
    for class_name in manifest.classes:
        for seed in range(arguments.refits):
            splits = ManifestSettings(seed=seed, calibration=arguments.calibration, validation=0.05)
            found = refit(resplit(manifest, class_name, splits), features, spec, settings)
            for row in found:
                print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
            rows += found
    by_promise = pd.DataFrame(rows).groupby(["alpha", "guarantee"])
    table = by_promise.agg(alarms=("alarms", "mean"), good=("good", "first"), inside=("inside", "sum"))
    table["rate"] = table["alarms"] / table["good"]
    print(f"\nof {arguments.refits} fits a class, counts in the interval of nine in ten:\n\n{table.round(4)}")


if __name__ == "__main__":
    try:
        main()
    except SprueError as error:
        sys.exit(f"coverage: {error}")
