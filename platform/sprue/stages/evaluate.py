"""Calibrates the fitted flows on held-out good images and measures them once on the test split."""

import hashlib
import json
import logging
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path

import pandas as pd
from upath import UPath

from defectflow import Gaussian
from sprue.data.layouts import COPY
from sprue.data.manifest import Manifest
from sprue.data.splits import TEST
from sprue.evaluation import evaluate as evaluation
from sprue.evaluation.baseline import baseline_maps
from sprue.evaluation.calibrate import HeldOut, calibrate
from sprue.evaluation.evaluate import Evaluation, evaluate, write_evaluation
from sprue.evaluation.metrics import Estimate
from sprue.evaluation.outliers import Outlier, outlying_samples, undecided, warn_of_outliers
from sprue.evaluation.overview import ClassResult, FailedClass, overview
from sprue.evaluation.report import class_report
from sprue.evaluation.summary import Summary, write_summary
from sprue.inference import calibration
from sprue.inference.detector import Detector
from sprue.inference.memory import keep_freed_memory
from sprue.stages.class_tasks import for_each_class
from sprue.stages.failures import all_failures, close_stage, failed_before, write_failures
from sprue.stages.runtime import Context
from sprue.store import digest, read_json, remove_folder, replace_folder, write_bytes, write_json
from sprue.training.dataloader import build_dataloader
from sprue.training.plan import ClassPlan, read_plans
from sprue.training.record import ClassFit

logger = logging.getLogger(__name__)

CURVES = {
    "roc": ("false_positive_rate", "true_positive_rate"),
    "precision_recall": ("recall", "precision"),
    "pro": ("false_positive_rate", "overlap"),
}
"""The axes of the plotted curves."""

PLOTS = ("nll", *CURVES)

BASELINE_MEMORY = 1.0
"""GiB of training features in memory at once, at most, while the baseline is fitted; more are streamed."""

MARKER = "evaluation.json"
"""Holds the key of a complete evaluation."""


def main(context: Context) -> None:
    """Writes ``detectors``, ``evaluation``, ``metrics`` and ``plots``; keeps what is up to date."""
    keep_freed_memory()
    manifest = Manifest.read(context.folder / "manifest.parquet")
    skipped = failed_before(context.folder, "evaluate")
    plans = [plan for plan in read_plans(context.folder) if plan.class_name not in skipped]
    arguments = ((plan.class_name, (context, manifest.of_class(plan.class_name), plan)) for plan in plans)
    outcomes = list(for_each_class(bring_up_to_date, arguments, len(plans)))
    failures = {outcome.class_name: outcome.failure for outcome in outcomes if outcome.failure}
    done = [plan.class_name for plan in plans if plan.class_name not in failures]
    _remove_others(context, done)
    write_failures(context.folder, "evaluate", failures)
    _write_overview(context, manifest, done)
    close_stage(context.folder, "evaluate", failures, done)


def _write_overview(context: Context, manifest: Manifest, done: Sequence[str]) -> None:
    results = {class_name: _result(context, class_name) for class_name in done}
    failed = [FailedClass(*failure) for failure in all_failures(context.folder, "evaluate")]
    copies = [entry for entry in manifest.skipped if entry.reason.startswith(COPY)]
    keep = manifest.settings.keep
    page = overview(context.dataset, results, context.settings.calibration, failed, copies, keep)
    write_bytes(context.folder / "evaluation" / "index.html", page.encode())


def bring_up_to_date(context: Context, manifest: Manifest, plan: ClassPlan) -> None:
    """Evaluates a class, unless that has been done; `manifest` may be that of the class alone.

    Raises:
        SprueError: If its fits are not those that are planned, or can't be evaluated.
    """
    fit = ClassFit.read(context.folder / "fits", plan)
    key = _key(context, manifest, fit)
    file = context.folder / "evaluation" / plan.class_name / MARKER
    if not (file.is_file() and read_json(file, made_by="evaluate").get("key") == key):
        _evaluate(context, manifest, fit, key)


def _key(context: Context, manifest: Manifest, fit: ClassFit) -> str:
    """Names an evaluation by everything that it depends on, versions of the code included."""
    name = fit.plan.class_name
    rows = pd.concat([manifest.calibration_rows(name), manifest.select(name, TEST)])
    masks = [hashlib.sha256((context.data / path).read_bytes()).hexdigest() for path in rows["mask_path"] if path]
    facts = {
        "fit": fit.plan.key,
        "weights": [digest(context.folder / "fits" / spec.name / "flow.safetensors") for spec in fit.plan.fits],
        "scoring": fit.plan.first.scoring.model_dump(mode="json"),
        "calibration": manifest.calibration(name, context.settings.calibration).model_dump(mode="json"),
        "published": context.settings.published,
        "images": rows.to_csv(index=False),
        "masks": masks,
        "versions": {
            "calibration": calibration.VERSION,
            "evaluation": evaluation.VERSION,
            "baseline": Gaussian.version,
        },
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _evaluate(context: Context, manifest: Manifest, fit: ClassFit, key: str) -> None:
    """Evaluates a class and writes its part of every output."""
    spec, name = fit.plan.first, fit.plan.class_name
    detector, outliers = _calibrate(context, manifest, fit)
    table = spec.table(context.features)
    limit = int(min(BASELINE_MEMORY, spec.fit.memory) * 2**30)
    training = build_dataloader(table, fit.plan.training_samples, spec.views, baseline_maps(spec.features), limit)
    measured = evaluate(detector, table, manifest.select(name, TEST), context.data, training.ordered)
    page = class_report(measured, detector, _origin(context, manifest, detector, fit), context.data)
    with tempfile.TemporaryDirectory() as temporary:
        (context.folder / "evaluation" / name / MARKER).unlink(missing_ok=True)
        detector.save(Path(temporary, "detector"))
        replace_folder(Path(temporary, "detector"), context.folder / "detectors" / name)
        folder = Path(temporary, "evaluation")
        write_evaluation(measured, detector, context.data, folder)
        write_summary(measured, detector, outliers, context.data, folder)
        Path(folder, "report.html").write_text(page, encoding="utf-8")
        _write_metrics(context, measured, fit)
        replace_folder(folder, context.folder / "evaluation" / name)
    # Last, for its presence means that the rest is complete.
    write_json(context.folder / "evaluation" / name / MARKER, {"key": key})
    logger.info("%-20s %s", name, measured.headline)


def _calibrate(context: Context, manifest: Manifest, fit: ClassFit) -> tuple[Detector, list[Outlier]]:
    """A class's detector, and the outliers among its calibration scores; warns of those that are not decided."""
    spec, name = fit.plan.first, fit.plan.class_name
    settings, table = manifest.calibration(name, context.settings.calibration), spec.table(context.features)
    rows = manifest.folds(name) or [manifest.calibration_rows(name)]
    held_out = [HeldOut(record.build_flow(), of_fit) for record, of_fit in zip(fit.records, rows, strict=True)]
    detector = calibrate(
        spec.dataset, name, spec.features, spec.flow_name, held_out, spec.scoring, settings, table
    )  # fmt: skip
    found = outlying_samples(detector, table, held_out)
    others_end = detector.calibration.scores[-len(found) - 1]
    warn_of_outliers(name, undecided(found, manifest.settings.keep), others_end)
    return detector, found


def _write_metrics(context: Context, measured: Evaluation, fit: ClassFit) -> None:
    name = fit.plan.class_name
    write_json(context.folder / "metrics" / f"{name}.json", measured.metrics)
    curves = {
        curve: pd.DataFrame(dict(zip(axes, measured.curves.get(curve, ([], [])), strict=True)))
        for curve, axes in CURVES.items()
    }
    for plot, points in {"nll": fit.history, **curves}.items():
        write_bytes(_plot(context, plot, name), points.to_csv(index=False).encode())


def _plot(context: Context, plot: str, class_name: str) -> UPath:
    return context.folder / "plots" / plot / f"{class_name}.csv"


def _result(context: Context, class_name: str) -> ClassResult:
    """What a class's evaluation has stored."""
    folder = context.folder / "evaluation" / class_name
    stored = read_json(folder / "estimates.json", made_by="evaluate")["estimates"]
    estimates = {name: Estimate(**each) for name, each in stored.items()}
    metrics = read_json(context.folder / "metrics" / f"{class_name}.json", made_by="evaluate")
    return ClassResult(estimates, metrics, Summary.read(folder))


def _remove_others(context: Context, class_names: Collection[str]) -> None:
    """Removes the outputs of other classes: the manifest no longer has them, or they have failed."""
    folders = [context.folder / name for name in ("evaluation", "detectors")]
    found = {path.name for folder in folders if folder.is_dir() for path in folder.iterdir() if path.is_dir()}
    for name in found.difference(class_names):
        files = [context.folder / "metrics" / f"{name}.json", *(_plot(context, plot, name) for plot in PLOTS)]
        for file in files:
            file.unlink(missing_ok=True)
        for folder in folders:
            remove_folder(folder / name)


def _origin(context: Context, manifest: Manifest, detector: Detector, fit: ClassFit) -> dict[str, str]:
    """What was fitted on what, in words, for the report."""
    spec, records = fit.plan.first, fit.records
    calibrating, features = len(manifest.calibration_rows(spec.class_name)), spec.features
    validating = len(spec.validation) * spec.views
    used = (
        f"{spec.images} to fit, {validating} to choose the epoch, {calibrating} to calibrate"
        if len(records) == 1
        else f"{calibrating} in {len(records)} folds: each calibrates a flow that was fitted without it, the first on "
        f"{spec.images} images, with {validating} to choose the epoch"
    )
    return {
        "dataset": spec.dataset,
        "good images": used,
        "features": f"{features.backbone}, blocks {list(features.blocks)} at scales {list(features.scales)} of "
        f"{features.input_size} x {features.input_size} pixels ({features.fingerprint})",
        "flow": f"{spec.flow_name}: " + ", ".join(f"{name} {value}" for name, value in spec.flow_config.items()),
        "settings": spec.origin,
        "published metric": context.settings.published or "none",
        "fit": "; ".join(
            f"{record.spec.key}, epoch {record.best_epoch} of {len(record.history)}, seed {record.spec.fit.seed}"
            for record in records
        ),
        "score": f"{spec.scoring.score_type}, mean of the highest {spec.scoring.top or detector.flow.top:.3g} of the "
        "positions",
        "code": f"commit {', '.join(sorted({record.commit for record in records}))}",
    }
