"""Registers every evaluated detector that the registry does not hold; a class's first is champion, others challenge."""

import logging
import tempfile
from pathlib import Path
from urllib.parse import urlencode

import yaml
from PIL import Image
from upath import UPath

from sprue.data.manifest import Manifest
from sprue.data.samples import views_of
from sprue.evaluation.evaluate import OVERVIEW
from sprue.inference.backbone import resolve
from sprue.inference.detector import Detector
from sprue.inference.spec import FeatureSpec
from sprue.pipeline import Context, run_stage
from sprue.planning import final_requests, settings_found
from sprue.store import digest, local_copy, read_json
from sprue.tracking.aliases import enter
from sprue.tracking.lineage import Lineage, is_logged
from sprue.tracking.packaging import log_detector
from sprue.tracking.registry import CHALLENGER, find_version, register
from sprue.tracking.runs import FitRun
from sprue.tracking.server import connect, experiment_id
from sprue.training.record import FitRecord
from sprue.training.worker import FitRequest

logger = logging.getLogger(__name__)

WIDTH = 640
"""Pixels across that the registry's page has room for."""


def describe(figures: dict[str, float], fit: FitRecord) -> str:
    """What a version is, in words, for the registry's page."""
    auroc = f", image AUROC {figures['image_auroc']:.2%} on the test split" if "image_auroc" in figures else ""
    words = (
        f"{fit.flow_name} fitted on {fit.pictures} good pictures of {fit.class_name}{auroc}. Calls at most "
        f"{figures['alpha']:.1%} of exchangeable good pictures anomalous, on average over calibrations "
        f"(score above {figures['threshold']:.4g})."
    )
    if "pixel_threshold" not in figures:  # of an earlier release's evaluation
        return words
    return (
        f"{words} Of such a picture's pixels at most that share are to be expected marked (map above "
        f"{figures['pixel_threshold']:.4g}), on average over parts and calibrations."
    )


def log_picture(folder: Path, run: FitRun, key: str) -> str:
    """Logs a detector's overview for good, and shows it, in Markdown; nothing if there is none.

    A fit that is calibrated anew has another detector and the same run, whose evaluation is then replaced.
    """
    if not (folder / OVERVIEW).is_file():
        return ""
    with tempfile.TemporaryDirectory() as name, Image.open(folder / OVERVIEW) as overview:
        overview.thumbnail((WIDTH, overview.height))
        overview.save(Path(name) / OVERVIEW)
        path = run.log_file(Path(name) / OVERVIEW, f"overview/{key}")
    query = urlencode({"path": path, "run_uuid": run.run_id})
    return f"\n\n![Pictures, what is there, what was found](get-artifact?{query})"


def tracked_digest(data: UPath) -> str:
    """DVC's digest of the dataset's folder; empty if DVC does not track it here."""
    file = data.with_name(f"{data.name}.dvc")
    return str(yaml.safe_load(file.read_text())["outs"][0]["md5"]) if file.is_file() else ""


def log_lineage(context: Context, manifest: Manifest, request: FitRequest, run_id: str, key: str) -> None:
    """Logs where a class's current detector comes from, unless its run has it."""
    if is_logged(run_id, key):
        return
    fit = FitRecord.read(context.folder / "fits" / request.class_name)
    spec = resolve(context.settings(FeatureSpec, "features"))
    facts = {
        "dataset": context.dataset,
        "dvc": tracked_digest(context.data),
        "manifest": digest(context.folder / "manifest.parquet"),
        "fingerprint": fit.fingerprint,
        "spec": spec.to_mapping(),
        "flow_name": fit.flow_name,
        "flow_config": request.flow_config,
        "settings": fit.settings,
        "found": settings_found(context, fit.class_name),
        "fit": fit.key,
        "commit": fit.commit,
        "cpus": fit.cpus,
    }
    frame = manifest.frame
    Lineage(facts, frame[frame["class_name"] == fit.class_name]).log(run_id, key)


def log_version(context: Context, manifest: Manifest, request: FitRequest, key: str) -> int:
    """Logs a class's detector and its lineage with its run, and registers it."""
    class_name = request.class_name
    fit = FitRecord.read(context.folder / "fits" / class_name)
    figures = read_json(context.folder / "metrics" / f"{class_name}.json", made_by="evaluate")
    tags = {
        "sprue.dataset": context.dataset,
        "sprue.fit": fit.key,
        "sprue.features": fit.fingerprint,
        "sprue.commit": fit.commit,
    }
    rows = manifest.select(class_name, "calibration")
    example = [(context.data / path).read_bytes() for path in rows["path"][: len(views_of(rows))]]
    run = FitRun.open(experiment_id(context.dataset, context.store), class_name, fit.key, fit.params())
    run.log_epochs(fit.history)
    log_lineage(context, manifest, request, run.run_id, key)
    with local_copy(context.folder / "detectors" / class_name) as folder:
        detector = Detector.load(folder)
        uri = log_detector(detector, run.run_id, key, example, tags)
    with local_copy(context.folder / "evaluation" / class_name) as folder:
        run.finish(figures, folder, "evaluation", tags)
        words = describe(figures, fit) + log_picture(folder, run, key)
    return register(class_name, uri, run.run_id, key, tags, words)


def main(context: Context) -> None:
    """Adds versions to the registry."""
    uri = connect(context.store)
    manifest = Manifest.read(context.folder / "manifest.parquet")
    for request in final_requests(context, manifest):
        class_name = request.class_name
        key = digest(context.folder / "detectors" / class_name)[:12]
        found = find_version(class_name, key)
        if found is not None and found.run_id:
            log_lineage(context, manifest, request, found.run_id, key)  # for one that an earlier release has registered
        version = int(found.version) if found else log_version(context, manifest, request, key)
        alias = enter(class_name, version)
        known = "was registered already, " if found else ""
        logger.info("%-20s version %d %sis %s", class_name, version, known, alias)
        if alias == CHALLENGER:
            logger.info("%-20s to make it champion: sprue promote %s --pictures FOLDER", "", class_name)
    logger.info("the registry is at %s", uri)


if __name__ == "__main__":
    run_stage("register", main)
