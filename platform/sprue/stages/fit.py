"""Fits one flow per class on the stored features; a class whose plan has not changed is kept as it is."""

import logging
from contextlib import closing

import torch

from sprue.stages.failures import close_stage, failed_before
from sprue.stages.fit_runs import FitRuns
from sprue.stages.runtime import Context, connect_ray
from sprue.store import remove_folder
from sprue.tracking.provenance import commit
from sprue.tracking.server import connect
from sprue.training.loop import Epoch
from sprue.training.metrics import FitMetrics
from sprue.training.placement import placement_of
from sprue.training.plan import ClassPlan, read_plans
from sprue.training.record import FitRecord
from sprue.training.run import FitOutcome, fit_classes
from sprue.training.spec import FitSpec

logger = logging.getLogger(__name__)


def main(context: Context) -> None:
    """Writes ``fits/<class>``, or a folder in it for each fold, and a run for each on the tracking server."""
    torch.set_num_threads(1)
    connect(context.store)
    skipped, fits = failed_before(context.folder, "fit"), context.folder / "fits"
    plans = [plan for plan in read_plans(context.folder) if plan.class_name not in skipped]
    specs = [spec for plan in plans for spec in plan.fits]
    for spec in specs:
        _take_searched_fit(context, spec)
    waiting = [spec for spec in specs if not FitRecord.is_current(fits / spec.name, spec.key)]
    logger.info("%d of %d classes are to be fitted", len({spec.class_name for spec in waiting}), len(plans))
    failures = fit(context, plans, waiting) if waiting else {}
    done = [plan.class_name for plan in plans if plan.class_name not in failures]
    close_stage(context.folder, "fit", failures, done)


def _take_searched_fit(context: Context, spec: FitSpec) -> None:
    """Keeps the fit of a search's best trial, if it is the one that the plan asks for."""
    searched, kept = context.folder / "search" / spec.class_name / "fit", context.folder / "fits" / spec.name
    if FitRecord.is_current(searched, spec.key) and not FitRecord.is_current(kept, spec.key):
        FitRecord.read(searched).write(kept)
        logger.info("%-20s is kept as the search fitted it", spec.name)


def fit(context: Context, plans: list[ClassPlan], specs: list[FitSpec]) -> dict[str, str]:
    """Does some of the plans' fits, and stores each as soon as it is done; returns why the classes that failed did."""
    connect_ray()
    placement, code = placement_of(specs), commit()
    failures: dict[str, str] = {}
    metrics = FitMetrics(context.dataset, specs)

    def on_epoch(name: str, epoch: Epoch) -> None:
        logger.info("%-20s %s", name, epoch)
        metrics.epoch(name, epoch)
        runs.log_epoch(name, epoch)

    def on_outcome(spec: FitSpec, outcome: FitOutcome) -> None:
        best = outcome.best
        metrics.outcome(spec.name, failed=best is None)
        if best is None:
            failures.setdefault(spec.class_name, f"{spec.name}: {outcome.failure}" if spec.fold else outcome.failure)
            runs.fail(spec)
            return
        record = FitRecord(spec, best.epoch, outcome.history, code, placement.cpus, best.flow)
        record.write(context.folder / "fits" / spec.name)
        remove_folder(context.folder / "runs" / spec.checkpoints)
        runs.complete(spec, outcome.history)

    with closing(FitRuns(context, plans, specs)) as runs:
        fit_classes(specs, context.features, context.folder / "runs", on_epoch, on_outcome, placement)
    return failures
