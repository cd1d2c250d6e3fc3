"""Calibrates the fitted flows on held-out good pictures and measures them once on the test split."""

import logging
import tempfile
from pathlib import Path

import pandas as pd

from sprue.data.manifest import Manifest
from sprue.evaluation.evaluate import Evaluation, calibrate, evaluate, roc_points, write_evaluation
from sprue.features.tables import FeatureTable
from sprue.inference.backbone import resolve
from sprue.inference.detector import Detector, Scoring
from sprue.inference.memory import keep_freed_memory
from sprue.inference.spec import FeatureSpec
from sprue.pipeline import Context, run_stage
from sprue.store import replace_folder, write_bytes, write_json
from sprue.training.record import FitRecord

logger = logging.getLogger(__name__)

OUTPUTS = ("detectors", "evaluation", "metrics", "plots")


def publish(context: Context, detector: Detector, evaluation: Evaluation, fit: FitRecord) -> None:
    """Writes a class's part of every output."""
    name = detector.class_name
    with tempfile.TemporaryDirectory() as folder:
        detector.save(Path(folder, "detector"))
        replace_folder(Path(folder, "detector"), context.folder / "detectors" / name)
        write_evaluation(evaluation, detector, context.data, Path(folder, "evaluation"))
        replace_folder(Path(folder, "evaluation"), context.folder / "evaluation" / name)
    write_json(context.folder / "metrics" / f"{name}.json", evaluation.metrics)
    nll = pd.DataFrame(fit.history)[["epoch", "train_nll", "validation_nll"]]
    for plot, points in (("nll", nll), ("roc", roc_points(evaluation))):
        write_bytes(context.folder / "plots" / plot / f"{name}.csv", points.to_csv(index=False).encode())


def main(context: Context) -> None:
    """Writes ``detectors``, ``evaluation``, ``metrics`` and ``plots``."""
    keep_freed_memory()
    inputs = {name: context.folder / name for name in ("manifest.parquet", "features", "fits")}
    manifest = Manifest.read(inputs["manifest.parquet"])
    spec = resolve(context.settings(FeatureSpec, "features"))
    scoring = context.settings(Scoring, "scoring")
    for class_name in manifest.classes:
        fit = FitRecord.read(inputs["fits"] / class_name)
        table = FeatureTable(inputs["features"] / spec.fingerprint / class_name)
        rows = manifest.select(class_name, "calibration")
        detector = calibrate(class_name, spec, fit.flow_name, fit.build_flow(), scoring, context.alpha, table, rows)
        evaluation = evaluate(detector, table, manifest.select(class_name, "test"), context.data)
        publish(context, detector, evaluation, fit)
        logger.info("%-20s %s", class_name, evaluation.headline)
    context.leave_receipt(inputs, {name: context.folder / name for name in OUTPUTS})


if __name__ == "__main__":
    run_stage("evaluate", main)
