"""The checkout as a DVC workspace: which dataset is worked on, and bringing everything up to date."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import ray
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from sprue.errors import SprueError
from sprue.store import location, write_bytes

PARAMS = Path("params.yaml")

FIRST_LAYOUT = "mvtec"

RECIPES = Path("models/recipes")

RECIPE_SECTIONS = ("features", "flow", "fit", "scoring")
"""Sections of the parameter file that a recipe is made of."""

PUBLISHED = "published"
"""What a recipe may say besides: the figure of its paper, which the report shows beside its own."""


def track_dataset(source: Path, name: str) -> None:
    """Puts a folder of pictures under DVC as ``data/<name>``; a second time takes what has changed.

    A folder outside of the checkout is imported: DVC remembers where it came from.

    Args:
        source: The folder.
        name: The dataset's name.

    Raises:
        SprueError: If the folder is missing, the name can't be a file name, or ``data/<name>`` is of another source
            or has been changed by hand.
    """
    if not source.is_dir():
        raise SprueError(f"there is no folder {source}; give DATA=/path/to/folder")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise SprueError(f"{name!r} can't name a dataset; give NAME= with letters, digits, '_', '.' and '-'")
    target = Path("data") / name
    target.parent.mkdir(exist_ok=True)
    if source.resolve() == target.resolve():
        dvc("add", "--quiet", str(target))
    elif Path(f"{target}.dvc").exists() and _imported_from(target) == source.resolve():
        _require_unchanged(target, source)
        dvc("update", "--quiet", f"{target}.dvc")
    elif target.exists():
        raise SprueError(f"{target} is there already and not from {source}; give another NAME=, or delete it")
    else:
        dvc("import-url", "--quiet", "--force", str(source.resolve()), str(target))


def _imported_from(target: Path) -> Path | None:
    entry = YAML(typ="safe").load(Path(f"{target}.dvc"))
    dependencies = entry.get("deps", [])
    # A source inside of the checkout is written down as seen from data/.
    return (target.parent / dependencies[0]["path"]).resolve() if dependencies else None


def _require_unchanged(target: Path, source: Path) -> None:
    """An update replaces the folder, and with it what was put there by hand."""
    if not target.exists():
        return
    command = [sys.executable, "-m", "dvc", "status", "--quiet", f"{target}.dvc"]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        raise SprueError(
            f"{target} is a copy of {source} and has been changed; make the change in {source}, and take it back here "
            f"with: dvc checkout --force {target}.dvc"
        )


def choose(dataset: str, recipe: str | None, layout: str | None, first_recipe: str, trials: int | None = None) -> None:
    """Writes the dataset's name and layout, and a recipe's sections, to the parameter file; leaves the rest as it is.

    A dataset that the file is not about yet begins with the layout `FIRST_LAYOUT` and the recipe `first_recipe`, unless
    told otherwise; one that it is about keeps what stands there, so that what was set by hand stays.

    Args:
        dataset: The dataset's name.
        recipe: A file, or a name in `RECIPES`; its sections take the place of those of the parameter file.
        layout: A key of `sprue.data.layouts.LAYOUTS`.
        first_recipe: As `recipe`, for a dataset that is new.
        trials: How many settings a search tries for each class.

    Raises:
        SprueError: If there is no such recipe, or it has other sections than `RECIPE_SECTIONS`.
    """
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 4096
    params = yaml.load(PARAMS)
    before = dumped(yaml, params)
    if params["dataset"] != dataset:
        recipe, layout = recipe or first_recipe, layout or FIRST_LAYOUT
    params["dataset"] = dataset
    if layout is not None:
        params["manifest"]["layout"] = layout
    if recipe is not None:
        params.update({PUBLISHED: ""} | yaml.load(find_recipe(recipe)))
    if trials is not None:
        params["search"]["trials"] = trials
    after = dumped(yaml, params)
    if after != before:
        write_bytes(location(str(PARAMS)), after)


def find_recipe(recipe: str) -> Path:
    """The file of a recipe.

    Raises:
        SprueError: As `choose`.
    """
    known = {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}
    path = known.get(recipe, Path(recipe))
    try:
        sections = YAML(typ="safe").load(path)
    except (OSError, YAMLError) as error:
        raise SprueError(
            f"there is no recipe {recipe!r} ({error}); give a file or one of {', '.join(known)}"
        ) from error
    if not isinstance(sections, dict) or set(sections) - {PUBLISHED} != set(RECIPE_SECTIONS):
        raise SprueError(
            f"the recipe {path} must have the sections {', '.join(RECIPE_SECTIONS)}, and no others but {PUBLISHED}"
        )
    return path


def dumped(yaml: YAML, params: object) -> bytes:
    """A parameter file's text."""
    stream = io.BytesIO()
    yaml.dump(params, stream)
    return stream.getvalue()


def reproduce() -> None:
    """Runs ``dvc repro``, with one Ray for all stages that need it.

    Raises:
        SprueError: If a stage fails; it has said why.
    """
    dvc("repro", env={"RAY_ADDRESS": ray.get_runtime_context().gcs_address})


def dvc(*arguments: str, env: dict[str, str] | None = None) -> None:
    """Runs a DVC command in the checkout, with this Python first on the path of its stages.

    Raises:
        SprueError: If it fails.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *arguments], env=os.environ | {"PATH": path} | (env or {}), check=False
    )
    if done.returncode:
        raise SprueError(f"dvc {' '.join(arguments)} failed; the reason stands above")


def results(folder: Path) -> str:
    """The metrics of a dataset's classes as a table, with their mean."""
    figures = {path.stem: json.loads(path.read_text()) for path in sorted((folder / "metrics").glob("*.json"))}
    table = pd.DataFrame.from_dict(figures, orient="index")
    shown = [name for name in ("test_good", "test_defective") if name in table]
    rates = [
        name
        for name in ("image_auroc", "picture_auroc", "pixel_auroc", "pixel_aupro", "false_alarm_rate", "detection_rate")
        if name in table
    ]
    table = table[shown + rates]
    if len(table) > 1:
        table.loc["mean"] = table[rates].mean()
    text = table[shown].map(lambda value: "" if pd.isna(value) else f"{value:.0f}")
    for name in rates:
        text[name] = table[name].map(lambda value: "" if pd.isna(value) else f"{value:.2%}")
    return text.to_string()
