"""Runs the whole pipeline on a folder of pictures: puts it under DVC, then brings every stage up to date."""

import argparse
import logging
import sys
from pathlib import Path

from sprue.data.layouts import LAYOUTS
from sprue.errors import SprueError
from sprue.pipeline import connect_ray
from sprue.store import location
from sprue.tracking.server import connect
from sprue.workspace import choose, find_recipe, reproduce, results, track_dataset

FIRST_RECIPE = "csflow-cpu"


def run(
    source: Path,
    name: str,
    recipe: str | None = None,
    layout: str | None = None,
    first_recipe: str = FIRST_RECIPE,
    trials: int | None = None,
) -> None:
    """From pictures to registered detectors, and a table of figures; see `sprue.workspace.choose`."""
    if recipe is not None:
        find_recipe(recipe)
    connect(location("store"))
    track_dataset(source, name)
    choose(name, recipe, layout, first_recipe, trials)
    connect_ray()
    reproduce()
    print(f"\n{results(Path('store') / name)}\n")
    print(f"the report, for a browser   store/{name}/evaluation/index.html")
    print("runs and registered models  make mlflow")
    print("scoring over HTTP           make serve")
    print("figures of this version     .venv/bin/dvc metrics show")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with a folder for each class, as in MVTec AD")
    parser.add_argument("--name", help="the dataset's name (default: the folder's)")
    parser.add_argument(
        "--recipe",
        help="a file, or a name in models/recipes (default: what params.yaml says of this dataset, "
        f"{FIRST_RECIPE} if it is about another)",
    )
    parser.add_argument("--layout", choices=sorted(LAYOUTS), help="of its folders (default likewise, or mvtec)")
    parser.add_argument(
        "--trials", type=int, help="settings that a search tries for each class (default likewise, or 0)"
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        name = arguments.name or arguments.data.resolve().name
        run(arguments.data, name, arguments.recipe, arguments.layout, trials=arguments.trials)
    except SprueError as error:
        sys.exit(f"sprue: {error}")
