"""Runs the frozen backbone over the images whose features are not stored yet, and looks for foreign images."""

import logging

from upath import UPath

from sprue.data.manifest import Manifest
from sprue.features.extraction import extract
from sprue.features.screening import screen
from sprue.features.screening_page import write_page
from sprue.features.spec_file import write_spec
from sprue.features.tables import FeatureTable
from sprue.stages.failures import close_stage
from sprue.stages.runtime import Context, connect_ray
from sprue.store import write_bytes

logger = logging.getLogger(__name__)


def main(context: Context) -> None:
    """Adds to the feature tables; writes the resolved feature spec, the backbone's weights and the screening.

    A class with images that look foreign is recorded as failed, until the user has decided about each of them.
    """
    manifest = Manifest.read(context.folder / "manifest.parquet")
    # Imported only now: a missing manifest is reported before the seconds that torch and timm take.
    from sprue.inference.backbone import backbone_state, resolve

    spec = resolve(context.settings.features)
    connect_ray()
    result = extract(spec, manifest.frame, context.data, context.features)
    backbone = context.backbone(spec)
    if not backbone.is_file():
        write_bytes(backbone, backbone_state(spec))
    write_spec(context.features, spec)
    logger.info("features %s: %d extracted, %d were stored already", spec.fingerprint, result.extracted, result.stored)
    _screen(context, manifest, context.features / spec.fingerprint)


def _screen(context: Context, manifest: Manifest, tables: UPath) -> None:
    """Writes the page of images that look foreign, and records their classes as failed."""
    of_class = {name: FeatureTable(tables / name) for name in manifest.classes}
    screenings = screen(manifest.frame, of_class, manifest.settings.keep)
    page = context.features / "screening.html"
    write_page(page, context.dataset, context.data, screenings)
    failures = {
        name: screening.reason(context.dataset, name) for name, screening in screenings.items() if screening.suspicious
    }
    if failures:
        logger.warning("images that look foreign: %s", page)
    close_stage(context.folder, "features", failures, [name for name in manifest.classes if name not in failures])
