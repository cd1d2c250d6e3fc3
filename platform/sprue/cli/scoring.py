"""The command that scores images without the service."""

import logging
from dataclasses import asdict
from pathlib import Path

import click

from sprue.cli.group import as_json, connect, main, show


@main.command()
@click.argument("images", nargs=-1, required=True)
@click.option("--class", "name", metavar="CLASS", required=True, help="The class whose detector scores.")
@click.option("--version", default="champion", show_default=True, help="Its number or alias.")
@click.option(
    "--output", metavar="FOLDER", help="Folder or s3 URL for the scores of all images of one folder, as Parquet."
)
@click.option("--heatmaps", is_flag=True, help="Also write heat maps to the output.")
@as_json
@click.pass_obj
def score(
    store: str, images: tuple[str, ...], name: str, version: str, output: str | None, heatmaps: bool, as_json: bool
) -> None:
    """Score IMAGES with a registered detector.

    Without --output, IMAGES are files, which are scored in this process. Where samples have several views, give a
    folder with an image of each view for each sample.

    With --output, IMAGES is a folder or s3 URL, and all images below it are scored on Ray: on this machine, or on the
    cluster that RAY_ADDRESS names. An interrupted run resumes. Exit status 1 says that some could not be read.
    """
    if output is None and heatmaps:
        raise click.UsageError("--heatmaps needs --output FOLDER")
    if output is None and any("://" in image for image in images):
        raise click.UsageError("images of an s3 URL are scored with --output FOLDER")
    if output is not None and len(images) > 1:
        raise click.UsageError("with --output give one folder or s3 URL of images")
    connect(store)
    if output is None:
        import pandas as pd

        from sprue.stages.score import score_files
        from sprue.tracking.registry import find_registered

        rows = score_files(find_registered(name, version), [Path(image) for image in images])
        show(rows, pd.DataFrame(rows).to_string(index=False), as_json)
        return
    from sprue.stages.runtime import ended_by_interrupt
    from sprue.stages.score_folder import require_all, score_on_ray

    logging.getLogger("sprue").setLevel(logging.INFO)
    with ended_by_interrupt("score"):
        summary = score_on_ray(name, version, images[0], output, heatmaps)
    show(asdict(summary), str(summary), as_json)
    require_all(summary)
