"""Writes the plan of each class: the recipe's settings, or the best that a search finds."""

import logging

import ray
import torch

from sprue.data.manifest import Manifest
from sprue.errors import SprueError
from sprue.features.synthetic import extract_synthetic, has_synthetic
from sprue.features.tables import FeatureTable
from sprue.inference.priority import in_background
from sprue.stages.class_tasks import attempt
from sprue.stages.failures import close_stage, failed_before
from sprue.stages.runtime import Context, connect_ray
from sprue.store import digest, remove_folder, write_json
from sprue.training.plan import ClassPlan, recipe_plan

logger = logging.getLogger(__name__)


def main(context: Context) -> None:
    """Writes ``plan/<class>.json`` and, with trials, ``search/<class>``."""
    torch.set_num_threads(1)
    path, spec = context.folder / "manifest.parquet", context.feature_spec()
    manifest, manifest_digest = Manifest.read(path), digest(path)
    skipped, settings = failed_before(context.folder, "search"), context.settings.search
    plans, failures = [], {}
    for name in manifest.classes:
        if name in skipped:
            continue
        try:
            plans.append(recipe_plan(manifest, manifest_digest, name, spec, context.settings, context.features))
        except SprueError as error:
            failures[name] = str(error)
    failures |= extract(context, manifest, plans)
    plans = [plan for plan in plans if plan.class_name not in failures]
    if settings.trials and plans:
        # Imported only now: Ray Tune and MLflow take seconds.
        from sprue.stages.search_trials import search

        plans, failed = search(context, plans)
        failures |= failed
    # DVC expects the folder without trials, too.
    write_json(context.folder / "search" / "settings.json", settings.model_dump(mode="json"))
    remove_folder(context.folder / "plan")
    for plan in plans:
        plan.write(context.folder / "plan")
        logger.info("%-20s %s: %s", plan.class_name, plan.key, plan.first.origin)
    close_stage(context.folder, "search", failures, [plan.class_name for plan in plans])


def extract(context: Context, manifest: Manifest, plans: list[ClassPlan]) -> dict[str, str]:
    """Extracts the synthetic defects of classes whose fits or search need them; returns why those that failed did."""
    needed = [spec for plan in plans for spec in plan.fits if spec.weighted]
    if context.settings.search.trials:
        needed += [plan.first for plan in plans if not plan.first.weighted]
    waiting = {
        spec.name: spec
        for spec in needed
        if not has_synthetic(FeatureTable(spec.synthetic_folder(context.features)), spec.validation)
    }
    if not waiting:
        return {}
    connect_ray()
    logger.info("synthetic defects for %d fits", len(waiting))
    task = ray.remote(num_cpus=1)(in_background(attempt))
    running = {
        name: task.remote(
            extract_synthetic,
            spec.features,
            manifest.rows_of(spec.class_name, spec.validation),
            context.data,
            spec.synthetic_folder(context.features),
        )
        for name, spec in waiting.items()
    }
    failures = {}
    for name, task_of_fit in running.items():
        try:
            _, failure = ray.get(task_of_fit)
        except ray.exceptions.RayError as error:
            failure = f"the process that made synthetic defects died: {str(error).splitlines()[0]}"
        if failure:
            failures[waiting[name].class_name] = failure
    return failures
