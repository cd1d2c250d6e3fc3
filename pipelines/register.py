"""Registers every evaluated detector that the registry does not hold yet, and makes it its class's champion."""

import logging

from upath import UPath

from sprue.data.manifest import Manifest
from sprue.data.samples import views_of
from sprue.inference.detector import Detector
from sprue.pipeline import Context, run_stage
from sprue.store import digest, local_copy, read_json
from sprue.tracking.packaging import log_detector
from sprue.tracking.registry import find_version, make_champion, register
from sprue.tracking.runs import FitRun
from sprue.tracking.server import connect, experiment_id
from sprue.training.record import FitRecord

logger = logging.getLogger(__name__)


def describe(figures: dict[str, float], fit: FitRecord) -> str:
    """What a version is, in words, for the registry's page."""
    auroc = f", image AUROC {figures['image_auroc']:.2%} on the test split" if "image_auroc" in figures else ""
    return (
        f"{fit.flow_name} fitted on {fit.pictures} good pictures of {fit.class_name}{auroc}. Calls at most "
        f"{figures['alpha']:.1%} of exchangeable good pictures anomalous, on average over calibrations "
        f"(score above {figures['threshold']:.4g})."
    )


def register_class(context: Context, class_name: str, example: list[UPath]) -> tuple[int, bool]:
    """The version of a class's detector, and whether it has become champion."""
    key = digest(context.folder / "detectors" / class_name)[:12]
    found = find_version(class_name, key)
    version = int(found.version) if found else log_version(context, class_name, key, example)
    return version, make_champion(class_name, version, key)


def log_version(context: Context, class_name: str, key: str, example: list[UPath]) -> int:
    """Logs a class's detector with its run, and registers it."""
    fit = FitRecord.read(context.folder / "fits" / class_name)
    figures = read_json(context.folder / "metrics" / f"{class_name}.json", made_by="evaluate")
    tags = {
        "sprue.dataset": context.dataset,
        "sprue.fit": fit.key,
        "sprue.features": fit.fingerprint,
        "sprue.commit": fit.commit,
    }
    run = FitRun.open(experiment_id(context.dataset, context.store), class_name, fit.key, fit.params())
    run.log_epochs(fit.history)
    with local_copy(context.folder / "detectors" / class_name) as folder:
        uri = log_detector(Detector.load(folder), run.run_id, [path.read_bytes() for path in example], tags)
    with local_copy(context.folder / "evaluation" / class_name) as folder:
        run.finish(figures, folder, "evaluation", tags)
    return register(class_name, uri, run.run_id, key, tags, describe(figures, fit))


def main(context: Context) -> None:
    """Adds versions to the registry."""
    uri = connect(context.store)
    manifest = Manifest.read(context.folder / "manifest.parquet")
    for class_name in manifest.classes:
        rows = manifest.select(class_name, "calibration")
        example = [context.data / path for path in rows["path"][: len(views_of(rows))]]
        version, is_champion = register_class(context, class_name, example)
        logger.info(
            "%-20s version %d %s", class_name, version, "is champion" if is_champion else "was registered already"
        )
    logger.info("the registry is at %s", uri)


if __name__ == "__main__":
    run_stage("register", main)
