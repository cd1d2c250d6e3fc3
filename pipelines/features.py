"""Runs the frozen backbone over the pictures whose features are not stored yet."""

import logging

from sprue.data.manifest import Manifest
from sprue.features.extraction import extract
from sprue.inference.backbone import resolve
from sprue.inference.spec import FeatureSpec
from sprue.pipeline import Context, connect_ray, run_stage
from sprue.planning import check_parameters

logger = logging.getLogger(__name__)


def main(context: Context) -> None:
    """Adds to the feature tables."""
    check_parameters(context)
    path = context.folder / "manifest.parquet"
    manifest = Manifest.read(path)
    spec = resolve(context.settings(FeatureSpec, "features"))
    connect_ray()
    features = context.folder / "features"
    done = extract(spec, manifest.frame, context.data, features)
    rate = done.extracted / done.seconds
    logger.info(
        "features %s: %d extracted, %d were there (%.1f pictures/s)",
        spec.fingerprint,
        done.extracted,
        done.stored,
        rate,
    )
    context.leave_receipt(inputs={"manifest": path}, outputs={"features": features})


if __name__ == "__main__":
    run_stage("features", main)
