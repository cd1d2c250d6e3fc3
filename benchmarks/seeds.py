"""How well a recipe does over several seeds: ``python benchmarks/seeds.py STORE --data DATA --recipe csflow-cpu``.

STORE is a dataset's part of the store, with the manifest and the recipe's features, as `sprue run` leaves it. Each
class is fitted once for each seed in this process, and calibrated and measured as the pipeline does. Prints the metrics
of every fit, their means over the classes for each seed, and the mean and spread of these. Settings of the recipe can
be changed: ``--set flow.neighbours='[[], [], []]'`` scores Multi-Flow's views independently.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import torch
from pydantic import ValidationError
from ruamel.yaml import YAML
from upath import UPath

from defectflow import Flow
from sprue.config import CalibrationSettings, DatasetSettings
from sprue.data.manifest import Manifest
from sprue.errors import SprueError
from sprue.evaluation.calibrate import HeldOut, calibrate
from sprue.evaluation.evaluate import evaluate
from sprue.features.synthetic import extract_synthetic
from sprue.inference.backbone import resolve
from sprue.inference.detector import best_device
from sprue.inference.memory import keep_freed_memory
from sprue.params import find_recipe
from sprue.store import location
from sprue.training.checkpoint import Checkpoint
from sprue.training.loop import Epoch
from sprue.training.spec import FitSpec, recipe_spec
from sprue.training.worker import fit_flow

SHOWN = ("sample_auroc", "image_auroc", "pixel_auroc", "pixel_aupro", "false_alarm_rate", "detection_rate")


def fitted(spec: FitSpec, features: UPath) -> Flow:
    """A flow with the weights of its best epoch by the validation likelihood."""
    best: tuple[float, Mapping[str, torch.Tensor]] = (float("inf"), {})

    def report(epoch: Epoch, checkpoint: Checkpoint) -> None:
        nonlocal best
        print(f"  {spec.class_name}  seed {spec.fit.seed}  {epoch}", file=sys.stderr, flush=True)
        best = min(best, (epoch.validation_nll, checkpoint.flow), key=lambda each: each[0])

    fit_flow(spec, features, best_device(), report)
    flow = spec.build_flow()
    flow.load_state_dict(best[1])
    return flow


def measure(
    recipe: FitSpec, seed: int, alpha: float, manifest: Manifest, features: UPath, root: UPath
) -> dict[str, float]:
    """Fits a class with a seed, and measures the detector once on the test split."""
    spec = recipe.model_copy(update={"fit": recipe.fit.model_copy(update={"seed": seed})})
    started = time.perf_counter()
    flow = fitted(spec, features)
    minutes = (time.perf_counter() - started) / 60
    table = spec.table(features)
    calibration, test = (manifest.select(spec.class_name, split) for split in ("calibration", "test"))
    promise, held_out = CalibrationSettings(alpha=alpha), [HeldOut(flow, calibration)]
    detector = calibrate(
        spec.dataset, spec.class_name, spec.features, spec.flow_name, held_out, spec.scoring, promise, table
    )
    metrics = evaluate(detector, table, test, root).metrics
    return {name: 100 * metrics[name] for name in SHOWN if name in metrics} | {"minutes": minutes}


def settings_of(recipe: str, changes: list[str]) -> DatasetSettings:
    """A recipe with some settings changed, each given as ``section.name=value``."""
    yaml = YAML(typ="safe")
    sections = yaml.load(find_recipe(recipe))
    for change in changes:
        path, _, value = change.partition("=")
        section, _, name = path.partition(".")
        if section not in sections or not name or not value:
            raise SprueError(f"--set {change}: give section.name=value, with one of {', '.join(sections)}")
        sections[section][name] = yaml.load(value)
    try:
        return DatasetSettings.model_validate_json(json.dumps(sections))
    except ValidationError as error:
        raise SprueError(f"--set: {error}") from error


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", type=Path, help="the dataset's part of the store, such as store/tiles")
    parser.add_argument("--data", required=True, help="the dataset's images, whose masks are read")
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--alpha", type=float, default=0.05)
    parser.add_argument("--set", dest="changes", action="append", default=[], metavar="SECTION.NAME=VALUE")
    arguments = parser.parse_args()
    keep_freed_memory()
    settings, folder = settings_of(arguments.recipe, arguments.changes), UPath(arguments.store.resolve())
    manifest, spec, features = (
        Manifest.read(folder / "manifest.parquet"),
        resolve(settings.features),
        folder / "features",
    )
    recipes = [recipe_spec(manifest, "", name, spec, settings, features) for name in manifest.classes]
    for recipe in recipes:
        if recipe.weighted:
            rows, table = manifest.select(recipe.class_name, "validation"), recipe.synthetic_folder(features)
            extract_synthetic(spec, rows, location(arguments.data), table)
    found = pd.DataFrame(
        {
            "class": recipe.class_name,
            "seed": seed,
            **measure(recipe, seed, arguments.alpha, manifest, features, location(arguments.data)),
        }
        for seed in arguments.seeds
        for recipe in recipes
    )
    print(found.round(2).to_string(index=False))
    by_seed = found.drop(columns=["class"]).groupby("seed").mean()
    summary = pd.DataFrame({"mean": by_seed.mean(), "lowest": by_seed.min(), "highest": by_seed.max()})
    print(f"\n{arguments.recipe} {' '.join(arguments.changes)}: over {len(by_seed)} seeds, of the classes' means\n")
    print(summary.round(2).to_string())


if __name__ == "__main__":
    try:
        main()
    except SprueError as error:
        sys.exit(f"seeds: {error}")
