"""The checkout as a DVC workspace: tracks datasets, runs the pipeline, and tabulates its metrics.

Ray and MLflow are imported when they are needed, so that mistakes are reported at once.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
from ruamel.yaml import YAML

from sprue.errors import SprueError
from sprue.params import FIRST_RECIPE, find_recipe, set_dataset
from sprue.stages.failures import all_failures, forget_failures, is_complete, report
from sprue.stages.runtime import STAGES, connect_ray
from sprue.store import location

DVC = (sys.executable, "-m", "dvc", "--wait-for-lock")
"""Waits while another pipeline in this checkout holds DVC's lock."""

SHOWN = ("sample_auroc", "image_auroc", "pixel_auroc", "pixel_aupro", "false_alarm_rate", "detection_rate")
"""Metrics in the table of results, in their order."""


def track_dataset(source: Path, name: str) -> None:
    """Puts a folder of images under DVC as ``data/<name>``; a second time updates it.

    A folder outside of the checkout is imported: DVC remembers where it came from.

    Args:
        source: The folder.
        name: The dataset's name.

    Raises:
        SprueError: If the folder is missing, the name is not valid, or ``data/<name>`` has another source or was
            changed by hand.
    """
    _require_dataset(source, name)
    target = Path("data") / name
    target.parent.mkdir(exist_ok=True)
    if source.resolve() == target.resolve():
        dvc("add", "--quiet", str(target))
    elif Path(f"{target}.dvc").exists() and _source_of(target) == source.resolve():
        _require_unchanged(target, source)
        dvc("update", "--quiet", f"{target}.dvc")
    elif target.exists() or Path(f"{target}.dvc").exists():
        raise SprueError(f"{target} exists already and is not from {source}; give another --name, or delete it")
    else:
        dvc("import-url", "--quiet", "--force", str(source.resolve()), str(target))


def _require_dataset(source: Path, name: str) -> None:
    if not source.is_dir():
        raise SprueError(f"there is no folder {source}")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise SprueError(f"{name!r} can't name a dataset; use letters, digits, '_' and '-' (--name)")


def _source_of(target: Path) -> Path | None:
    dependencies = YAML(typ="safe").load(Path(f"{target}.dvc")).get("deps", [])
    # The path of a source inside of the checkout is relative to data/.
    return (target.parent / dependencies[0]["path"]).resolve() if dependencies else None


def _require_unchanged(target: Path, source: Path) -> None:
    """Refuses an update that would overwrite changes made by hand."""
    if not target.exists():
        return
    command = [*DVC, "status", "--quiet", f"{target}.dvc"]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        raise SprueError(
            f"{target} is a copy of {source} and has been changed; make the change in {source}, and restore the copy "
            f"with: dvc checkout --force {target}.dvc"
        )


def run(
    name: str,
    source: Path,
    recipe: str | None = None,
    layout: str | None = None,
    trials: int | None = None,
    first_recipe: str = FIRST_RECIPE,
) -> None:
    """From images to registered detectors, and a table of metrics; see `sprue.params.set_dataset`.

    Raises:
        SprueError: If a stage fails; or at the end, with a table, if classes have failed.
    """
    if recipe is not None:
        find_recipe(recipe)
    _require_dataset(source, name)
    # Imported only now, for it takes seconds.
    from sprue.tracking.server import connect

    connect(location("store"))
    track_dataset(source, name)
    set_dataset(name, recipe, layout, trials, first_recipe)
    failed = _reproduce(name, STAGES[-1])
    print(f"\n{results(Path('store') / name)}\n")
    print(f"the report, for a browser   store/{name}/evaluation/index.html")
    print("runs and registered models  make mlflow")
    print("scoring over HTTP           sprue serve")
    print("metrics of all datasets     dvc metrics show")
    if failed:
        raise SprueError(failed)


def run_pipeline(dataset: str, last_stage: str = STAGES[-1]) -> None:
    """Brings a dataset's stages up to date, with one Ray for all that need it; classes that failed are tried again.

    Raises:
        SprueError: If a stage fails, which has printed why; or at the end, with a table, if classes have failed.
    """
    if failed := _reproduce(dataset, last_stage):
        raise SprueError(failed)


def _reproduce(dataset: str, last_stage: str) -> str:
    """As `run_pipeline`, but returns what there is to say of the classes that failed."""
    import ray

    connect_ray()
    folder = location("store") / dataset
    forget_failures(folder)
    try:
        dvc("repro", f"{last_stage}@{dataset}", env={"RAY_ADDRESS": ray.get_runtime_context().gcs_address})
    except SprueError:
        # The last stage of all fails if a class has failed, but only after it has done the others.
        if not is_complete(folder):
            raise
    failures = all_failures(folder, last_stage)
    return report(folder, failures) if failures else ""


def dvc(*arguments: str, env: dict[str, str] | None = None) -> None:
    """Runs a DVC command in the checkout, with this Python first on the path of its stages.

    Raises:
        SprueError: If it fails.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run([*DVC, *arguments], env=os.environ | {"PATH": path} | (env or {}), check=False)
    if done.returncode:
        raise SprueError(f"dvc {' '.join(arguments)} failed; the reason is printed above")


def results(folder: Path) -> str:
    """The metrics of a dataset's classes as a table, with their mean."""
    metrics = {path.stem: json.loads(path.read_text()) for path in sorted((folder / "metrics").glob("*.json"))}
    table = pd.DataFrame.from_dict(metrics, orient="index")
    counts = [name for name in ("test_good", "test_defective") if name in table]
    rates = [name for name in SHOWN if name in table]
    if "image_auroc" in rates and table["image_auroc"].equals(table["sample_auroc"]):
        rates.remove("image_auroc")  # samples of one image
    table = table[counts + rates]
    if len(table) > 1:
        table.loc["mean"] = table[rates].mean()
    text = table[counts].map(lambda value: "" if pd.isna(value) else f"{value:.0f}")
    for name in rates:
        text[name] = table[name].map(lambda value: "" if pd.isna(value) else f"{value:.2%}")
    return text.to_string()
