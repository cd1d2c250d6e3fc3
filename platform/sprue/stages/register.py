"""Registers every evaluated detector that the registry does not hold; a class's first is champion, others challenge."""

import contextlib
import logging
import tempfile
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlencode

import mlflow
import yaml
from PIL import Image
from upath import UPath

from sprue.data.manifest import Manifest
from sprue.data.samples import views_of
from sprue.errors import SprueError
from sprue.evaluation.baseline import in_words
from sprue.evaluation.evaluate import OVERVIEW
from sprue.evaluation.report import guarantee_in_words
from sprue.inference.calibration import Calibration
from sprue.inference.detector import Detector
from sprue.release.aliases import assign_alias
from sprue.stages.class_tasks import MANY, for_each_class
from sprue.stages.failures import all_failures, failed_before, report, write_failures
from sprue.stages.runtime import Context, connect_ray
from sprue.store import digest, local_copy, read_json
from sprue.tracking.backbones import log_backbone
from sprue.tracking.lineage import Lineage
from sprue.tracking.lock import alias_lock
from sprue.tracking.packaging import log_detector
from sprue.tracking.registry import CHALLENGER, find_version, model_name, register
from sprue.tracking.runs import FitRun
from sprue.tracking.server import connect, experiment_id, use
from sprue.tracking.summary import detector_tags
from sprue.training.plan import ClassPlan, read_plans
from sprue.training.record import ClassFit

logger = logging.getLogger(__name__)

NODE_PATIENCE_S = 120.0
"""How long nodes may take to reach the tracking server; they import MLflow first."""

WIDTH = 640
"""Pixels across of an image on the registry's page."""


def main(context: Context) -> None:
    """Adds versions to the registry.

    Raises:
        SprueError: At the end, if a class has failed in this stage or before; the message has a table of all.
    """
    uri = connect(context.store)
    manifest, skipped = Manifest.read(context.folder / "manifest.parquet"), failed_before(context.folder, "register")
    plans = [plan for plan in read_plans(context.folder) if plan.class_name not in skipped]
    arguments = ((plan.class_name, (context, manifest.of_class(plan.class_name), plan, uri)) for plan in plans)
    together = _nodes_register(uri, len(plans))
    if together:  # tasks side by side would each log the backbone's weights; what is wrong with them, a class tells
        features = plans[0].first.features
        with contextlib.suppress(SprueError):
            log_backbone(features.weights_digest, context.backbone(features), context.store)
    outcomes = for_each_class(add_version, arguments, len(plans) if together else 0)
    failures = {outcome.class_name: outcome.failure for outcome in outcomes if outcome.failure}
    logger.info("the registry is at %s", uri)
    write_failures(context.folder, "register", failures)
    if failed := all_failures(context.folder):
        raise SprueError(report(context.folder, failed))


def _nodes_register(uri: str, classes: int) -> bool:
    """Whether the nodes of the cluster can register classes side by side."""
    # A database file takes one writer at a time.
    if classes < MANY or not uri.startswith(("http://", "https://")):
        return False
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if not ray.is_initialized():
        connect_ray()
    task = ray.remote(num_cpus=0)(_reach)
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    on_each = [task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)) for node in nodes]
    try:
        ray.get([on_node.remote(uri) for on_node in on_each], timeout=NODE_PATIENCE_S)
    except ray.exceptions.RayError as error:
        logger.warning(
            "nodes do not reach the tracking server %s, so that this process registers one class after the other; "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD are to be in their environment, too: %s",
            uri, str(error).strip().splitlines()[-1],
        )  # fmt: skip
        return False
    return True


def _reach(uri: str) -> None:
    """Asks the tracking server something, in a task; raises MlflowException if it does not answer."""
    use(uri)
    mlflow.MlflowClient().search_experiments(max_results=1)


def add_version(context: Context, manifest: Manifest, plan: ClassPlan, uri: str) -> None:
    """Registers a class's detector, unless the registry holds it, and gives the version its alias.

    Args:
        context: What the stage works on.
        manifest: May be that of the class alone.
        plan: The class's.
        uri: The tracking server's. Its user and password, if it asks for any, are in this process's environment.

    Raises:
        SprueError: If what earlier stages have written of the class is missing or damaged.
    """
    use(uri)
    model = model_name(context.dataset, plan.class_name)
    key = digest(context.folder / "detectors" / plan.class_name)[:12]
    # Of two jobs at once, the second would take the first one's logged model for what an interrupted one left.
    with alias_lock(model):
        if found := find_version(model, key):
            version, known = int(found.version), "was registered already, "
        else:
            logged, known = _log(context, manifest, plan, key), ""
            version = register(context.dataset, plan.class_name, *logged)
        alias = assign_alias(model, version)
    logger.info("%-24s version %d %sis %s", model, version, known, alias)
    if alias == CHALLENGER:
        logger.info("%-24s to make it champion: sprue promote %s --images FOLDER", "", model)


class _Logged(NamedTuple):
    """What `register` takes of a logged detector."""

    model_uri: str
    run_id: str
    detector_key: str
    tags: dict[str, str]
    description: str


def _log(context: Context, manifest: Manifest, plan: ClassPlan, key: str) -> _Logged:
    """Logs a class's detector, its lineage and its evaluation to the run of its fit."""
    class_name, spec = plan.class_name, plan.first
    fit = ClassFit.read(context.folder / "fits", plan)
    metrics = read_json(context.folder / "metrics" / f"{class_name}.json", made_by="evaluate")
    tags = {
        "sprue.dataset": spec.dataset,
        "sprue.fit": plan.key,
        "sprue.features": spec.features.fingerprint,
        "sprue.commit": fit.records[0].commit,
    }
    rows = manifest.calibration_rows(class_name)
    example = [(context.data / path).read_bytes() for path in rows["path"][: len(views_of(rows))]]
    run = FitRun.open(experiment_id(spec.dataset, context.store), class_name, plan.key, plan.params)
    if len(fit.records) == 1:
        run.log_epochs(fit.records[0].history)
    facts, images = tuple(record.facts for record in fit.records), manifest.rows(class_name)
    Lineage(facts, _tracked_digest(context.data), images).log(run.run_id, key)
    weights = log_backbone(spec.features.weights_digest, context.backbone(spec.features), context.store)
    with local_copy(context.folder / "detectors" / class_name) as folder:
        uri = log_detector(folder, weights, run, key, example, tags)
        calibration, detector = Detector.load(folder).calibration, detector_tags(folder)
    with local_copy(context.folder / "evaluation" / class_name) as folder:
        run.finish(metrics, folder, "evaluation", tags)
        description = _describe(metrics, calibration, plan) + _log_overview(folder, run, key)
    return _Logged(uri, run.run_id, key, tags | detector, description)


def _describe(metrics: dict[str, float], calibration: Calibration, plan: ClassPlan) -> str:
    """What a version is, in words, for the registry's page."""
    spec = plan.first
    flow = spec.flow_name if calibration.folds == 1 else f"{calibration.folds} flows, {spec.flow_name},"
    auroc = f", sample AUROC {metrics['sample_auroc']:.2%} on the test split" if "sample_auroc" in metrics else ""
    return (
        f"{flow} fitted on {plan.images} good images of {spec.dataset}, class {spec.class_name}{auroc}. "
        f"{in_words(spec.flow_name, metrics)} "
        f"{guarantee_in_words(calibration)} At most {100 * calibration.alpha:.3g} % of a good sample's pixels is "
        f"expected in the predicted mask (anomaly map above {calibration.pixel_threshold:.4g}), on average over "
        "samples and calibrations."
    )


def _log_overview(folder: Path, run: FitRun, key: str) -> str:
    """Logs a detector's overview under its key and returns the Markdown that shows it; nothing if there is none.

    Another calibration of the same fit replaces the run's evaluation, but not this image.
    """
    if not (folder / OVERVIEW).is_file():
        return ""
    with tempfile.TemporaryDirectory() as name, Image.open(folder / OVERVIEW) as overview:
        overview.thumbnail((WIDTH, overview.height))
        overview.save(Path(name) / OVERVIEW)
        path = run.log_file(Path(name) / OVERVIEW, f"overview/{key}")
    query = urlencode({"path": path, "run_uuid": run.run_id})
    return f"\n\n![Image, ground truth, anomaly map, predicted mask](get-artifact?{query})"


def _tracked_digest(data: UPath) -> str:
    """DVC's digest of the dataset's folder; empty if DVC does not track it here."""
    file = data.with_name(f"{data.name}.dvc")
    return str(yaml.safe_load(file.read_text())["outs"][0]["md5"]) if file.is_file() else ""
