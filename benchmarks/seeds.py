"""How well a recipe does over several seeds: ``python benchmarks/seeds.py STORE --data DATA --recipe csflow-cpu``.

STORE is a dataset's part of the store, with the manifest and the recipe's features, as `make run` leaves it. Each class
is fitted once for each seed in this process, and calibrated and measured as the pipeline does. Prints the figures of
every fit, their means over the classes for each seed, and the mean and spread of these. Settings of the recipe can be
changed: ``--set flow.neighbours='[[], [], []]'`` has Multi-Flow's views judged alone.
"""

import argparse
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from upath import UPath

from defectflow import Flow
from sprue.data.manifest import Manifest
from sprue.errors import SprueError
from sprue.evaluation.evaluate import calibrate, evaluate
from sprue.features.tables import FeatureTable
from sprue.inference.backbone import resolve
from sprue.inference.detector import Scoring, best_device
from sprue.inference.memory import keep_freed_memory
from sprue.inference.spec import FeatureSpec
from sprue.pipeline import Context
from sprue.store import location
from sprue.training.checkpoint import Checkpoint
from sprue.training.loop import Epoch, FitSettings
from sprue.training.requests import fit_requests
from sprue.training.worker import FitRequest, fit_flow
from sprue.workspace import find_recipe

SHOWN = ("image_auroc", "picture_auroc", "pixel_auroc", "pixel_aupro", "false_alarm_rate", "detection_rate")


def fitted(request: FitRequest) -> Flow:
    """A flow with the weights of its best epoch by the validation likelihood."""
    best: tuple[float, Mapping[str, torch.Tensor]] = (float("inf"), {})

    def report(epoch: Epoch, checkpoint: Checkpoint) -> None:
        nonlocal best
        print(f"  {request.class_name}  seed {request.settings.seed}  {epoch}", file=sys.stderr, flush=True)
        best = min(best, (epoch.validation_nll, checkpoint.flow), key=lambda each: each[0])

    fit_flow(request, best_device(), report)
    flow = request.build_flow(FeatureTable(location(request.table)))
    flow.load_state_dict(best[1])
    return flow


def measure(context: Context, class_name: str, seed: int, alpha: float) -> dict[str, float]:
    """Fits a class with a seed, and measures the detector once on the test split."""
    manifest = Manifest.read(context.folder / "manifest.parquet")
    spec = resolve(context.settings(FeatureSpec, "features"))
    settings = replace(context.settings(FitSettings, "fit"), seed=seed)
    requests = fit_requests(manifest, spec, context.folder / "features", context.section("flow"), settings)
    request = next(each for each in requests if each.class_name == class_name)
    request.check()
    started = time.perf_counter()
    flow = fitted(request)
    minutes = (time.perf_counter() - started) / 60
    table = FeatureTable(location(request.table))
    scoring = context.settings(Scoring, "scoring")
    calibration, test = (manifest.select(class_name, split) for split in ("calibration", "test"))
    detector = calibrate(class_name, spec, request.flow_name, flow, scoring, alpha, table, calibration)
    metrics = evaluate(detector, table, test, context.data).metrics
    return {name: 100 * metrics[name] for name in SHOWN if name in metrics} | {"minutes": minutes}


def changed(sections: dict[str, Any], changes: list[str]) -> dict[str, Any]:
    """A recipe with some settings changed, each given as ``section.name=value``."""
    for change in changes:
        place, _, value = change.partition("=")
        section, _, name = place.partition(".")
        if section not in sections or not name or not value:
            raise SprueError(f"--set {change}: give section.name=value, with one of {', '.join(sections)}")
        sections[section][name] = yaml.safe_load(value)
    return sections


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", type=Path, help="the dataset's part of the store, such as store/tiles")
    parser.add_argument("--data", required=True, help="the dataset's pictures, whose masks are read")
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--alpha", type=float, default=0.05)
    parser.add_argument("--set", dest="changes", action="append", default=[], metavar="SECTION.NAME=VALUE")
    arguments = parser.parse_args()
    keep_freed_memory()
    recipe = changed(yaml.safe_load(find_recipe(arguments.recipe).read_text()), arguments.changes)
    params = {"dataset": arguments.store.resolve().name, **recipe}
    context = Context("seeds", params, location(arguments.data), UPath(arguments.store.resolve().parent))
    classes = Manifest.read(context.folder / "manifest.parquet").classes
    found = pd.DataFrame(
        {"class": name, "seed": seed, **measure(context, name, seed, arguments.alpha)}
        for seed in arguments.seeds
        for name in classes
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
