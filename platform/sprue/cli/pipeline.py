"""Commands that run the pipeline or a part of it, and compute its metrics."""

import logging
from pathlib import Path

import click

from sprue.cli.group import EXISTING_FILE, FOLDER, main


@main.command()
@click.argument("folder", type=FOLDER)
@click.option("--name", help="The dataset's name.  [default: the folder's]")
@click.option(
    "--recipe", help="A file, or a name in models/recipes.  [default: the dataset's; fusion-cpu if it is new]"
)
@click.option("--layout", type=click.Choice(["mvtec", "mvtec-views"]), help="Of its folders.")
@click.option("--trials", type=click.IntRange(0), help="Settings that a search tries for each class.")
def run(folder: Path, name: str | None, recipe: str | None, layout: str | None, trials: int | None) -> None:
    """Run the pipeline on a FOLDER of images: from images to registered detectors.

    FOLDER holds a folder for each class: CLASS/train/good with images of good parts and, to measure with,
    CLASS/test/good, CLASS/test/DEFECT and CLASS/ground_truth/DEFECT.
    """
    from sprue.stages import dvc

    dvc.run(name or folder.resolve().name, folder, recipe, layout, trials)


@main.command()
@click.option("--views", is_flag=True, help="Samples of three views, with Multi-Flow.")
def demo(views: bool) -> None:
    """Run the pipeline on an embedded dataset and score images over HTTP; leaves nothing running."""
    from sprue.stages.demo import run_demo, run_views_demo

    logging.getLogger().setLevel(logging.WARNING)
    (run_views_demo if views else run_demo)()


@main.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True}, add_help_option=False)
@click.argument("name", metavar="NAME")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def stage(name: str, arguments: tuple[str, ...]) -> None:
    """Run one stage: manifest, features, search, fit, evaluate or register.

    `sprue stage NAME --help` lists its arguments.
    """
    from sprue.stages.runtime import STAGES, run_stage

    if name not in STAGES:
        raise click.UsageError(f"there is no stage {name!r}; there are: {', '.join(STAGES)}")
    run_stage(name, arguments)


@main.command()
@click.argument("dataset")
@click.option("--trials", type=click.IntRange(1), required=True, help="Settings that are tried for each class.")
def search(dataset: str, trials: int) -> None:
    """Search the settings of each class of a DATASET, and write its plan."""
    from sprue.params import PARAMS, read_dataset, set_dataset
    from sprue.stages.dvc import run_pipeline

    read_dataset(PARAMS, dataset)
    set_dataset(dataset, trials=trials)
    run_pipeline(dataset, last_stage="search")


@main.command()
@click.argument("file", type=EXISTING_FILE)
def figures(file: Path) -> None:
    """Print all metrics of scores and maps in an .npz FILE, as JSON.

    It holds scores_N and labels_N (0 or 1), and may hold maps_NHW and masks_NHW (anomalous where not 0). Metrics that
    do not exist are null.
    """
    from sprue.evaluation.metrics_file import as_json, metrics_of_file

    click.echo(as_json(metrics_of_file(file)))
