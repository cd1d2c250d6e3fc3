"""Reads the dataset's folders into the manifest: a row a picture, with its split."""

import logging

from sprue.data.manifest import build_manifest
from sprue.data.splits import SplitConfig
from sprue.pipeline import Context, run_stage

logger = logging.getLogger(__name__)


def main(context: Context) -> None:
    """Writes ``manifest.parquet``."""
    splits = context.settings(SplitConfig, "manifest", besides=["layout"])
    layout = context.section("manifest").get("layout", "mvtec")
    manifest = build_manifest(context.data, context.dataset, splits, context.alpha, layout)
    for left_out in manifest.left_out:
        logger.warning("left out: %s: %s", left_out.path, left_out.reason)
    counts = manifest.frame.groupby(["class_name", "split"]).size().unstack(fill_value=0)
    logger.info("%s", counts.to_string())
    path = context.folder / "manifest.parquet"
    manifest.write(path)
    context.leave_receipt(inputs={}, outputs={"manifest": path})


if __name__ == "__main__":
    run_stage("manifest", main)
