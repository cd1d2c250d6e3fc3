"""How recipes do on parts that nobody tuned them to: ``python benchmarks/parts.py STORE DATA [DATA ...]``.

DATA are dataset folders in MVTec AD's layout. Each recipe's features of each dataset are extracted into STORE unless
they are there; then each class is fitted once for each seed, calibrated, and measured once on the test split. Prints a
row for each class and recipe: means over the seeds, in %, and the seconds of a fit. No recipe sees a defect, but the
development of the default recipe looked at the test splits of the classes that its file names.
"""

import argparse
import sys
from pathlib import Path

import pandas as pd
from seeds import measure, settings_of

from sprue.config import CalibrationSettings, ManifestSettings
from sprue.data.build import build_manifest
from sprue.data.manifest import Manifest
from sprue.errors import SprueError
from sprue.features.extraction import extract
from sprue.features.synthetic import extract_synthetic
from sprue.inference.backbone import resolve
from sprue.inference.memory import keep_freed_memory
from sprue.params import FIRST_RECIPE
from sprue.stages.runtime import connect_ray
from sprue.store import location
from sprue.training.spec import recipe_spec

RECIPES = (FIRST_RECIPE, "gaussian-cpu", "memorybank-cpu", "csflow-cpu", "patchflow-deep-cpu")
SHOWN = {"sample_auroc": "image AUROC", "pixel_auroc": "pixel AUROC", "pixel_aupro": "AUPRO"} | {
    "false_alarm_rate": "false alarms",
    "detection_rate": "detected",
}


def rows(manifest: Manifest, data: Path, store: Path, recipe: str, seeds: list[int]) -> list[dict[str, object]]:
    """A recipe's row for each class of a dataset."""
    settings, root = settings_of(recipe, []), location(str(data.resolve()))
    features = location(str(store.resolve())) / data.name / "features"
    spec = resolve(settings.features)
    extract(spec, manifest.frame, root, features)
    found = []
    for name in manifest.classes:
        plan = recipe_spec(manifest, "", name, spec, settings, features)
        if plan.weighted:
            extract_synthetic(spec, manifest.select(name, "validation"), root, plan.synthetic_folder(features))
        alpha = manifest.calibration(name, CalibrationSettings()).alpha
        measured = pd.DataFrame([measure(plan, seed, alpha, manifest, features, root) for seed in seeds]).mean()
        shown = {title: measured[key] for key, title in SHOWN.items() if key in measured}
        found.append({"class": name, "recipe": recipe, **shown, "seconds": 60 * measured["minutes"]})
    return found


def main() -> None:
    """Prints the table, a class after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", type=Path, help="where features are kept")
    parser.add_argument("data", type=Path, nargs="+", help="dataset folders")
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    keep_freed_memory()
    connect_ray()
    table = []
    for data in arguments.data:
        root = location(str(data.resolve()))
        manifest = build_manifest(root, data.name, ManifestSettings(), CalibrationSettings())
        for recipe in arguments.recipes:
            table += rows(manifest, data, arguments.store, recipe, arguments.seeds)
            print(pd.DataFrame(table[-len(manifest.classes) :]).round(1).to_string(index=False), flush=True)
    print(f"\n{pd.DataFrame(table).sort_values('class', kind='stable').round(1).to_string(index=False)}")


if __name__ == "__main__":
    try:
        main()
    except SprueError as error:
        sys.exit(f"parts: {error}")
