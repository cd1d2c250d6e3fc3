"""Runs the frozen backbone over the images whose features are not stored yet, and looks for foreign images."""

import logging

from upath import UPath

from sprue.data.manifest import Manifest
from sprue.features.extraction import extract
from sprue.features.screening import Group, describe, screen
from sprue.features.screening_page import write_page
from sprue.features.spec_file import write_spec
from sprue.features.tables import FeatureTable
from sprue.stages.class_tasks import for_each_class
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


def describe_class(manifest: Manifest, class_name: str, folder: UPath) -> list[Group]:
    """What the screening has to know of a class; `manifest` may be that of the class alone, `folder` is its table.

    Raises:
        SprueError: If the table lacks an image or can't be read.
    """
    return describe(class_name, manifest.rows(class_name), FeatureTable(folder))


def _screen(context: Context, manifest: Manifest, tables: UPath) -> None:
    """Writes the page of images that look foreign, and records their classes as failed."""
    arguments = ((name, (manifest.of_class(name), name, tables / name)) for name in manifest.classes)
    described = {done.class_name: done for done in for_each_class(describe_class, arguments, len(manifest.classes))}
    failures = {name: done.failure for name, done in described.items() if done.failure}
    groups = [group for name in manifest.classes for group in described[name].value or ()]
    screenings = screen(groups, manifest.settings.keep)
    page = context.features / "screening.html"
    write_page(page, context.dataset, context.data, screenings)
    foreign = {
        name: screening.reason(context.dataset, name) for name, screening in screenings.items() if screening.suspicious
    }
    if foreign:
        logger.warning("images that look foreign: %s", page)
    failures |= foreign
    close_stage(context.folder, "features", failures, [name for name in manifest.classes if name not in failures])
