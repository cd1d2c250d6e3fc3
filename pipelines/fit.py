"""Fits one flow per class on the stored features; a class whose inputs are unchanged is left as it is."""

import logging
from dataclasses import asdict

import torch

from sprue.data.manifest import Manifest
from sprue.errors import SprueError
from sprue.pipeline import Context, commit, connect_ray, run_stage
from sprue.planning import final_requests
from sprue.store import digest, remove_folder
from sprue.tracking.provenance import provenance
from sprue.tracking.runs import FitRun
from sprue.tracking.server import connect, experiment_id
from sprue.training.fit import FitOutcome, fit_classes, place_fits, run_name
from sprue.training.loop import Epoch
from sprue.training.record import FitRecord, fit_key
from sprue.training.worker import FitRequest

logger = logging.getLogger(__name__)


def take_winner(context: Context, request: FitRequest) -> None:
    """Keeps the fit of a search's best trial, should it be the one that is asked for."""
    searched, kept = (context.folder / folder / request.class_name for folder in ("search", "fits"))
    if FitRecord.is_current(searched / "fit", fit_key(request)) and not FitRecord.is_current(kept, fit_key(request)):
        FitRecord.read(searched / "fit").write(kept)
        logger.info("%-20s is kept as the search fitted it", request.class_name)


def fit(context: Context, requests: list[FitRequest]) -> list[str]:
    """Fits classes, and keeps each as soon as it is fitted; says why those that failed did."""
    connect_ray()
    tags = provenance(commit(), digest(context.folder / "manifest.parquet"), requests[0].fingerprint)
    experiment = experiment_id(context.dataset, context.store)
    slots = place_fits(len(requests), max(request.settings.workers for request in requests))
    runs = {
        request.class_name: FitRun.open(experiment, request.class_name, fit_key(request), request.params(), tags)
        for request in requests
    }
    seen: dict[str, list[dict[str, object]]] = {name: [] for name in runs}
    failures = []

    def on_epoch(class_name: str, epoch: Epoch) -> None:
        logger.info("%-20s %s", class_name, epoch)
        seen[class_name].append(asdict(epoch))
        runs[class_name].log_epochs(seen[class_name])

    def on_outcome(request: FitRequest, outcome: FitOutcome) -> None:
        if outcome.best is None:
            failures.append(f"{outcome.class_name}: {outcome.failure}")
            runs[outcome.class_name].end("FAILED")
            return
        FitRecord.of(request, outcome.best, outcome.history, commit(), slots.cpus).write(
            context.folder / "fits" / outcome.class_name
        )
        remove_folder(context.folder / "runs" / run_name(request))
        runs[outcome.class_name].log_epochs(outcome.history)

    fit_classes(requests, context.folder / "runs", on_epoch, on_outcome, slots)
    return failures


def main(context: Context) -> None:
    """Writes ``fits/<class>`` and a run for each on the tracking server."""
    connect(context.store)
    path, fits = context.folder / "manifest.parquet", context.folder / "fits"
    requests = final_requests(context, Manifest.read(path))
    for request in requests:
        request.check()
        take_winner(context, request)
    waiting = [request for request in requests if not FitRecord.is_current(fits / request.class_name, fit_key(request))]
    logger.info("%d of %d classes are to be fitted", len(waiting), len(requests))
    failures = fit(context, waiting) if waiting else []
    if failures:
        raise SprueError(f"{len(failures)} of {len(waiting)} fits failed, the others are kept\n" + "\n".join(failures))
    context.leave_receipt(inputs={"manifest": path}, outputs={"fits": fits})


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_stage("fit", main)
