"""Reads the dataset's folders into the manifest: one row an image, with its split."""

import logging

from sprue.data.build import build_manifest
from sprue.data.manifest import Manifest
from sprue.data.splits import TEST
from sprue.stages.failures import close_stage
from sprue.stages.runtime import Context

logger = logging.getLogger(__name__)


def main(context: Context) -> None:
    """Writes ``manifest.parquet``; says which classes it refuses, and what the small ones can't promise."""
    settings = context.settings
    manifest = build_manifest(context.data, context.dataset, settings.manifest, settings.calibration)
    for file in manifest.skipped:
        logger.warning("skipped: %s: %s", file.path, file.reason)
    counts = manifest.frame.groupby(["class_name", "split"]).size().unstack(fill_value=0)
    logger.info("%s", counts.to_string())
    for class_name in manifest.classes:
        _warn_of_few(context, manifest, class_name)
    manifest.write(context.folder / "manifest.parquet")
    close_stage(context.folder, "manifest", manifest.refused, manifest.classes)


def _warn_of_few(context: Context, manifest: Manifest, class_name: str) -> None:
    """Says which false-alarm rate a class with few images can promise, if that is above the wanted one."""
    wanted = context.settings.calibration
    alpha = manifest.calibration(class_name, wanted).alpha
    if alpha == wanted.alpha:
        return
    rows = manifest.rows(class_name)
    good = rows[rows["split"] != TEST]
    calibrating = manifest.calibration_rows(class_name)["sample_id"].nunique()
    what = "images" if good["view"].eq("").all() else "samples"
    sure = f" with {100 * wanted.confidence:.3g} % confidence" if wanted.guarantee == "conditional" else ""
    logger.warning(
        "class %s: %d good %s; %d of them calibrate, so the lowest false-alarm rate that can be promised%s is %.3g %%, "
        "not %.3g %%; add good %s",
        class_name, good["sample_id"].nunique(), what, calibrating, sure, 100 * alpha, 100 * wanted.alpha, what,
    )  # fmt: skip
