"""Fits one flow per class on the stored features; a class whose inputs are unchanged is left as it is."""

import logging
from dataclasses import asdict

import torch

from sprue.data.manifest import Manifest
from sprue.errors import SprueError
from sprue.features.tables import FeatureTable
from sprue.inference.backbone import resolve
from sprue.inference.spec import FeatureSpec
from sprue.pipeline import Context, commit, connect_ray, run_stage
from sprue.store import location
from sprue.tracking.runs import FitRun
from sprue.tracking.server import connect, experiment_id
from sprue.training.fit import FitOutcome, fit_classes
from sprue.training.loop import Epoch, FitSettings
from sprue.training.record import FitRecord, fit_key
from sprue.training.requests import fit_requests
from sprue.training.worker import FitRequest

logger = logging.getLogger(__name__)


def requests_of(context: Context, manifest: Manifest) -> list[FitRequest]:
    """One request for each class of the manifest, by the parameter file."""
    spec = resolve(context.settings(FeatureSpec, "features"))
    settings = context.settings(FitSettings, "fit")
    return fit_requests(manifest, spec, context.folder / "features", context.section("flow"), settings)


def record_of(request: FitRequest, outcome: FitOutcome) -> FitRecord:
    """What is kept of a fit that went well."""
    assert outcome.best is not None
    return FitRecord(
        class_name=request.class_name,
        key=fit_key(request),
        fingerprint=request.fingerprint,
        flow_name=request.flow_name,
        flow_config=request.whole_config(FeatureTable(location(request.table))),
        settings=asdict(request.settings),
        pictures=request.pictures,
        best_epoch=outcome.best.epoch,
        history=outcome.history,
        commit=commit(),
        state=outcome.best.flow,
    )


def main(context: Context) -> None:
    """Writes ``fits/<class>`` and a run for each on the tracking server."""
    connect(context.store)
    path, fits = context.folder / "manifest.parquet", context.folder / "fits"
    requests = requests_of(context, Manifest.read(path))
    for request in requests:
        request.check()
    waiting = [request for request in requests if not FitRecord.is_current(fits / request.class_name, fit_key(request))]
    logger.info("%d of %d classes are to be fitted", len(waiting), len(requests))
    experiment = experiment_id(context.dataset, context.store)
    runs = {
        request.class_name: FitRun.open(experiment, request.class_name, fit_key(request), request.params())
        for request in waiting
    }
    seen: dict[str, list[dict[str, object]]] = {name: [] for name in runs}

    def on_epoch(class_name: str, epoch: Epoch) -> None:
        logger.info("%-20s %s", class_name, epoch)
        seen[class_name].append(asdict(epoch))
        runs[class_name].log_epochs(seen[class_name])

    failures = []
    if waiting:
        connect_ray()
        outcomes = fit_classes(waiting, context.folder / "runs", on_epoch)
        for request, outcome in zip(waiting, outcomes, strict=True):
            if outcome.best is None:
                failures.append(f"{outcome.class_name}: {outcome.failure}")
                runs[outcome.class_name].fail()
            else:
                record_of(request, outcome).write(fits / outcome.class_name)
                runs[outcome.class_name].log_epochs(outcome.history)
    if failures:
        raise SprueError(f"{len(failures)} of {len(waiting)} fits failed, the others are kept\n" + "\n".join(failures))
    context.leave_receipt(inputs={"manifest": path}, outputs={"fits": fits})


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_stage("fit", main)
