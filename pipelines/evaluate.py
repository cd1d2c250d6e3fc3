"""Calibrates the fitted flows on held-out good pictures and measures them once on the test split."""

import logging
import tempfile
from pathlib import Path

import pandas as pd

from sprue.data.manifest import Manifest
from sprue.errors import SprueError
from sprue.evaluation.evaluate import Evaluation, calibrate, evaluate, write_evaluation
from sprue.evaluation.report import ClassReport, class_report, overview
from sprue.features.tables import FeatureTable
from sprue.inference.backbone import resolve
from sprue.inference.detector import Detector, Scoring
from sprue.inference.memory import keep_freed_memory
from sprue.inference.spec import FeatureSpec
from sprue.pipeline import Context, run_stage
from sprue.planning import final_requests, settings_found
from sprue.store import location, replace_folder, write_bytes, write_json
from sprue.training.record import FitRecord, fit_key

logger = logging.getLogger(__name__)

CURVES = {
    "roc": ("false_positive_rate", "true_positive_rate"),
    "precision_recall": ("recall", "precision"),
    "pro": ("false_positive_rate", "overlap"),
}
"""The axes of the curves that are plotted."""

OUTPUTS = ("detectors", "evaluation", "metrics", "plots")


def origin(context: Context, manifest: Manifest, detector: Detector, fit: FitRecord, settings: str) -> dict[str, str]:
    """What was fitted on what, in words; `settings` says how they were found."""
    counts = {
        split: len(manifest.select(detector.class_name, split)) for split in ("train", "validation", "calibration")
    }
    spec = detector.spec
    return {
        "dataset": context.dataset,
        "good pictures": f"{counts['train']} to fit, {counts['validation']} to choose the epoch, "
        f"{counts['calibration']} to calibrate",
        "features": f"{spec.backbone}, blocks {list(spec.blocks)} at scales {list(spec.scales)} of "
        f"{spec.input_size} x {spec.input_size} pixels ({fit.fingerprint})",
        "flow": f"{fit.flow_name}: " + ", ".join(f"{name} {value}" for name, value in fit.flow_config.items()),
        "settings": settings,
        "published figure": str(context.params.get("published") or "no figure"),
        "fit": f"{fit.key}, epoch {fit.best_epoch} of {len(fit.history)}, seed {fit.settings['seed']}",
        "score": f"{detector.scoring.evidence}, mean of the top {detector.scoring.top or detector.flow.top:.3g} of "
        "the positions",
        "code": f"commit {fit.commit}",
    }


def publish(context: Context, detector: Detector, evaluation: Evaluation, fit: FitRecord, report: ClassReport) -> None:
    """Writes a class's part of every output."""
    name = detector.class_name
    with tempfile.TemporaryDirectory() as folder:
        detector.save(Path(folder, "detector"))
        replace_folder(Path(folder, "detector"), context.folder / "detectors" / name)
        write_evaluation(evaluation, detector, context.data, Path(folder, "evaluation"))
        Path(folder, "evaluation", "report.html").write_text(report.page, encoding="utf-8")
        replace_folder(Path(folder, "evaluation"), context.folder / "evaluation" / name)
    write_json(context.folder / "metrics" / f"{name}.json", evaluation.metrics)
    nll = pd.DataFrame(fit.history)[["epoch", "train_nll", "validation_nll"]]
    curves = {
        curve: pd.DataFrame(dict(zip(axes, evaluation.curves.get(curve, ([], [])), strict=True)))
        for curve, axes in CURVES.items()
    }
    for plot, points in {"nll": nll, **curves}.items():
        write_bytes(context.folder / "plots" / plot / f"{name}.csv", points.to_csv(index=False).encode())


def main(context: Context) -> None:
    """Writes ``detectors``, ``evaluation``, ``metrics`` and ``plots``."""
    keep_freed_memory()
    inputs = {name: context.folder / name for name in ("manifest.parquet", "features", "fits")}
    manifest = Manifest.read(inputs["manifest.parquet"])
    requests = final_requests(context, manifest)
    spec = resolve(context.settings(FeatureSpec, "features"))
    scoring = context.settings(Scoring, "scoring")
    reports: list[ClassReport] = []
    for request in requests:
        class_name = request.class_name
        fit = FitRecord.read(inputs["fits"] / class_name)
        if fit.key != fit_key(request):
            raise SprueError(
                f"class {class_name}: what is in {inputs['fits'] / class_name} was fitted on other pictures or with "
                "other parameters than there are now; run the fit stage again"
            )
        table = FeatureTable(location(request.table))
        rows = manifest.select(class_name, "calibration")
        detector = calibrate(class_name, spec, fit.flow_name, fit.build_flow(), scoring, context.alpha, table, rows)
        evaluation = evaluate(detector, table, manifest.select(class_name, "test"), context.data)
        facts = origin(context, manifest, detector, fit, settings_found(context, class_name))
        reports.append(class_report(evaluation, detector, facts, context.data))
        publish(context, detector, evaluation, fit, reports[-1])
        logger.info("%-20s %s", class_name, evaluation.headline)
    page = overview(context.dataset, reports, context.alpha)
    write_bytes(context.folder / "evaluation" / "index.html", page.encode())
    context.leave_receipt(inputs, {name: context.folder / name for name in OUTPUTS})


if __name__ == "__main__":
    run_stage("evaluate", main)
