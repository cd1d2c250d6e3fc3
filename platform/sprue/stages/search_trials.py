"""The trials of a search: what the search stage does beyond the recipe's own plan."""

import logging
import tempfile
from pathlib import Path

import ray

from sprue.errors import SprueError
from sprue.features.synthetic import plan_defects
from sprue.search.progress import Progress, TrialRuns
from sprue.search.record import SearchRecord
from sprue.search.report import importances, parallel_coordinates, trials_table
from sprue.search.run import SearchOutcome, search_class, search_key, search_name
from sprue.search.space import search_space
from sprue.stages.class_tasks import attempt
from sprue.stages.runtime import Context, connect_ray
from sprue.store import remove_folder, write_bytes
from sprue.tracking.provenance import commit, provenance
from sprue.tracking.runs import FitRun
from sprue.tracking.server import connect, experiment_id
from sprue.training.placement import fit_placement
from sprue.training.plan import ClassPlan
from sprue.training.record import FitRecord
from sprue.training.spec import FitSpec

logger = logging.getLogger(__name__)


def search(context: Context, plans: list[ClassPlan]) -> tuple[list[ClassPlan], dict[str, str]]:
    """Searches the classes that have not been searched with these settings; of several fits, the first.

    Returns:
        The plans with the settings that were found, and why the classes that failed did.
    """
    connect(context.store)
    settings, specs = context.settings.search, [plan.first for plan in plans]
    failures = {}
    for spec in specs:
        try:
            search_space(spec, settings)  # a mistake is found before the first search
        except SprueError as error:
            failures[spec.class_name] = str(error)
    waiting = [
        spec
        for spec in specs
        if spec.class_name not in failures
        and not SearchRecord.is_current(context.folder / "search" / spec.class_name, search_key(spec, settings))
    ]
    logger.info("%d of %d classes are to be searched", len(waiting), len(specs))
    if waiting and not ray.is_initialized():
        connect_ray()
    for spec in waiting:
        _, failure = attempt(_search_class, context, spec)
        if failure:
            failures[spec.class_name] = failure
    found = []
    for plan in plans:
        if plan.class_name not in failures:
            record = SearchRecord.read(context.folder / "search" / plan.class_name)
            found.append(ClassPlan(fits=tuple(record.plan(spec, settings) for spec in plan.fits)))
    return found, failures


def _search_class(context: Context, spec: FitSpec) -> None:
    """Searches a class, and writes ``search/<class>``."""
    name, settings = spec.class_name, context.settings.search
    folder, runs = context.folder / "search" / name, context.folder / "runs"
    experiment, key = experiment_id(context.dataset, context.store), search_key(spec, settings)
    space = {f"search.{each}": distribution for each, distribution in search_space(spec, settings).items()}
    tags = provenance(spec.manifest, spec.features.fingerprint)
    parent = FitRun.open(experiment, f"search-{name}", key, space, tags)
    logger.info(
        "%-20s %d trials, judged by %d synthetic defects", name, settings.trials, len(plan_defects(spec.validation))
    )
    trial_runs = TrialRuns(spec, settings.epochs, experiment, parent.run_id, tags)
    progress = Progress(trial_runs, settings.trials)
    outcome = search_class(spec, settings, context.features, runs, [progress])
    for trial in outcome.trials:
        run = trial_runs.open(trial.point)
        run.log_epochs(trial.history)
        # The fit stage goes on with the best trial's run, and of several fits with a run of the class.
        if trial is not outcome.best or spec.fold:
            run.end("FAILED" if trial.failure else "FINISHED" if trial.completed else "KILLED")
    record = _report(context, spec, outcome, parent)
    best = outcome.checkpoint(outcome.best.number)
    cpus = fit_placement(settings.trials, spec.fit).cpus
    fit = record.plan(spec, settings)
    record.write(folder, FitRecord(fit, best.epoch, outcome.best.history, commit(), cpus, best.flow))
    remove_folder(runs / search_name(spec, settings))


def _report(context: Context, spec: FitSpec, outcome: SearchOutcome, parent: FitRun) -> SearchRecord:
    """Writes the table and the chart of the trials, logs them to the search's run, and prints them."""
    record, space = SearchRecord.of(outcome), search_space(spec, context.settings.search)
    table, fractions = trials_table(record), importances(record, space)
    with tempfile.TemporaryDirectory() as files:
        Path(files, "trials.png").write_bytes(parallel_coordinates(record, space))
        table.to_csv(Path(files, "trials.csv"), index=False)
        for file in Path(files).iterdir():
            write_bytes(context.folder / "search" / spec.class_name / file.name, file.read_bytes())
        metrics = {f"importance.{each}": fraction for each, fraction in fractions.items()}
        parent.finish(metrics | {"objective": outcome.best.objective}, Path(files), "search", {})
    logger.info("\n%s\n\n%s: %s", table.to_string(index=False), record.class_name, record.origin)
    if fractions:
        logger.info("importance: %s", ", ".join(f"{name} {fraction:.0%}" for name, fraction in fractions.items()))
    return record
