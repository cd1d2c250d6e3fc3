"""Searches the flow of each class by the detection of drawn defects; a class whose inputs are unchanged is left."""

import logging
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import ray
import torch

from sprue.data.manifest import Manifest
from sprue.errors import SprueError
from sprue.inference.backbone import resolve
from sprue.inference.detector import Scoring
from sprue.inference.spec import FeatureSpec
from sprue.pipeline import Context, commit, connect_ray, run_stage
from sprue.planning import recipe_requests
from sprue.search.drawn import code_digest, extract_drawn
from sprue.search.progress import Place, Progress, open_trial_run
from sprue.search.record import SearchRecord
from sprue.search.report import importances, parallel_coordinates, trials_table
from sprue.search.search import search_class, search_key, search_name
from sprue.search.space import SearchConfig, at_point, search_space
from sprue.store import digest, remove_folder, write_bytes, write_json
from sprue.tracking.provenance import provenance
from sprue.tracking.runs import FitRun
from sprue.tracking.server import connect, experiment_id
from sprue.training.fit import place_fits
from sprue.training.record import FitRecord
from sprue.training.worker import FitRequest

logger = logging.getLogger(__name__)


def search(context: Context, request: FitRequest, rows: pd.DataFrame, config: SearchConfig, scoring: Scoring) -> None:
    """Searches a class, and writes ``search/<class>``."""
    name, spec = request.class_name, resolve(context.settings(FeatureSpec, "features"))
    folder = context.folder / "search" / name
    space = search_space(request, config)
    experiment = experiment_id(context.dataset, context.store)
    key = search_key(request, config, scoring)
    varied = {f"search.{each}": distribution for each, distribution in space.items()}
    tags = provenance(commit(), digest(context.folder / "manifest.parquet"), request.fingerprint)
    parent = FitRun.open(experiment, f"search-{name}", key, varied, tags)
    place = Place(experiment, parent.run_id, tags)
    drawn = folder / "drawn" / f"{spec.fingerprint}-{code_digest()}"
    try:
        count = ray.get(ray.remote(num_cpus=1)(extract_drawn).remote(spec, rows, context.data, drawn))
    except ray.exceptions.RayTaskError as error:
        # Ray adds the traceback to the message.
        raise (error.cause if isinstance(error.cause, SprueError) else error) from error
    logger.info("%-20s %d trials, judged by %d drawn defects", name, config.trials, count)
    progress = Progress(request, config.epochs, config.trials, place)
    runs = context.folder / "runs"
    outcome = search_class(request, config, scoring, drawn, runs, [progress])
    for trial in outcome.trials:
        run = open_trial_run(request, trial.point, config.epochs, place)
        run.log_epochs(trial.history)
        if trial is not outcome.best:
            run.end("FAILED" if trial.failure else "FINISHED" if trial.whole else "KILLED")
    record = SearchRecord.of(outcome)
    table, shares = trials_table(record), importances(record, space)
    with tempfile.TemporaryDirectory() as files:
        Path(files, "trials.png").write_bytes(parallel_coordinates(record, space))
        table.to_csv(Path(files, "trials.csv"), index=False)
        for file in Path(files).iterdir():
            write_bytes(folder / file.name, file.read_bytes())
        figures = {f"importance.{each}": share for each, share in shares.items()}
        figures["objective"] = outcome.best.objective
        parent.finish(figures, Path(files), "search", {})
    fit = at_point(request, outcome.best.point, config.epochs)
    kept, cpus = outcome.checkpoint(outcome.best.number), place_fits(config.trials, request.settings.workers).cpus
    record.write(folder, FitRecord.of(fit, kept, outcome.best.history, commit(), cpus))
    remove_folder(runs / search_name(request, config, scoring))
    logger.info("\n%s\n\n%s\n", table.to_string(index=False), _in_words(record, shares))


def _in_words(record: SearchRecord, shares: Mapping[str, float]) -> str:
    best, recipe = record.trials[record.best - 1], record.trials[0]
    lines = [
        f"{record.class_name}: trial {best.number} finds drawn defects with an AUROC of {best.objective:.1%}, the "
        f"recipe's own settings with {recipe.objective:.1%}"
    ]
    if shares:
        lines.append("what mattered: " + ", ".join(f"{name} {share:.0%}" for name, share in shares.items()))
    return "\n".join(lines)


def main(context: Context) -> None:
    """Writes ``search``."""
    config, scoring = context.settings(SearchConfig, "search"), context.settings(Scoring, "scoring")
    folder, path = context.folder / "search", context.folder / "manifest.parquet"
    if config.trials:
        connect(context.store)
        manifest = Manifest.read(path)
        requests = recipe_requests(context, manifest)
        for request in requests:
            request.check()
            search_space(request, config)
        waiting = [
            request
            for request in requests
            if not SearchRecord.is_current(folder / request.class_name, search_key(request, config, scoring))
        ]
        logger.info("%d of %d classes are to be searched", len(waiting), len(requests))
        if waiting:
            connect_ray()
        failures = []
        for request in waiting:
            try:
                search(context, request, manifest.select(request.class_name, "validation"), config, scoring)
            except SprueError as error:
                failures.append(f"{request.class_name}: {error}")
        if failures:
            raise SprueError(
                f"{len(failures)} of {len(waiting)} searches failed, the others are kept\n" + "\n".join(failures)
            )
    write_json(folder / "config.json", asdict(config))
    context.leave_receipt(inputs={"manifest": path}, outputs={"search": folder})


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_stage("search", main)
