"""Fits one flow per class on the stored features; a class whose plan has not changed is kept as it is."""

import logging
from dataclasses import asdict

import torch

from sprue.stages.failures import close_stage, failed_before
from sprue.stages.runtime import Context, connect_ray
from sprue.store import remove_folder
from sprue.tracking.provenance import commit, provenance
from sprue.tracking.runs import FitRun
from sprue.tracking.server import connect, experiment_id
from sprue.training.loop import Epoch
from sprue.training.record import FitRecord
from sprue.training.run import FitOutcome, fit_classes, fit_placement
from sprue.training.spec import FitSpec, read_plan

logger = logging.getLogger(__name__)


def main(context: Context) -> None:
    """Writes ``fits/<class>`` and a run for each on the tracking server."""
    torch.set_num_threads(1)
    connect(context.store)
    skipped, fits = failed_before(context.folder, "fit"), context.folder / "fits"
    specs = [spec for spec in read_plan(context.folder) if spec.class_name not in skipped]
    for spec in specs:
        _take_searched_fit(context, spec)
    waiting = [spec for spec in specs if not FitRecord.is_current(fits / spec.class_name, spec.key)]
    logger.info("%d of %d classes are to be fitted", len(waiting), len(specs))
    failures = fit(context, waiting) if waiting else {}
    done = [spec.class_name for spec in specs if spec.class_name not in failures]
    close_stage(context.folder, "fit", failures, done)


def _take_searched_fit(context: Context, spec: FitSpec) -> None:
    """Keeps the fit of a search's best trial, if it is the one that the plan asks for."""
    searched, kept = context.folder / "search" / spec.class_name / "fit", context.folder / "fits" / spec.class_name
    if FitRecord.is_current(searched, spec.key) and not FitRecord.is_current(kept, spec.key):
        FitRecord.read(searched).write(kept)
        logger.info("%-20s is kept as the search fitted it", spec.class_name)


def fit(context: Context, specs: list[FitSpec]) -> dict[str, str]:
    """Fits classes, and stores each as soon as it is fitted; returns why those that failed did."""
    connect_ray()
    experiment = experiment_id(context.dataset, context.store)
    placement = fit_placement(len(specs), max(spec.fit.workers for spec in specs))
    runs = {
        spec.class_name: FitRun.open(
            experiment, spec.class_name, spec.key, spec.params, provenance(spec.manifest, spec.features.fingerprint)
        )
        for spec in specs
    }
    history: dict[str, list[dict[str, object]]] = {name: [] for name in runs}
    failures = {}

    def on_epoch(class_name: str, epoch: Epoch) -> None:
        logger.info("%-20s %s", class_name, epoch)
        history[class_name].append(asdict(epoch))
        runs[class_name].log_epochs(history[class_name])

    def on_outcome(spec: FitSpec, outcome: FitOutcome) -> None:
        run, best = runs[spec.class_name], outcome.best
        if best is None:
            failures[spec.class_name] = outcome.failure
            run.end("FAILED")
            return
        record = FitRecord(spec, best.epoch, outcome.history, commit(), placement.cpus, best.flow)
        record.write(context.folder / "fits" / spec.class_name)
        remove_folder(context.folder / "runs" / spec.name)
        run.log_epochs(outcome.history)

    fit_classes(specs, context.features, context.folder / "runs", on_epoch, on_outcome, placement)
    return failures
