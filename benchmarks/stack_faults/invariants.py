"""What must hold after each fault, read from the records of the stack itself."""

import os
from collections import Counter

import mlflow
from mlflow.entities.model_registry import ModelVersion
from pipeline import CLASSES, DATASET, EPOCHS, Round
from plant import Plant

from sprue.errors import SprueError
from sprue.release import audit_log
from sprue.tracking.digests import DIGEST_TAG
from sprue.tracking.lineage import is_logged
from sprue.tracking.registry import CHAMPION, DETECTOR_TAG, find_registered, load_detector
from sprue.tracking.runs import CURVES, KEY_TAG


def connect(plant: Plant) -> None:
    """Lets this process read the stack's registry and object store."""
    os.environ.update({name: value for name, value in plant.client.items() if name.startswith(("AWS_", "MLFLOW_"))})
    os.environ["SPRUE_CACHE"] = f"{plant.cache}-check"
    mlflow.set_tracking_uri(plant.client["MLFLOW_TRACKING_URI"])


def metrics_lost(one: Round) -> list[str]:
    """Epochs of a complete round whose metrics the server lacks, or has twice."""
    client = mlflow.MlflowClient()
    experiment, found = client.get_experiment_by_name(DATASET), []
    for name in CLASSES:
        runs = client.search_runs([experiment.experiment_id], f"params.`fit.seed` = '{one.number}'")
        own = [run for run in runs if run.data.tags.get(KEY_TAG, "").startswith(f"{name}-")]
        if len(own) != 1:
            found.append(f"round {one.number}, {name}: {len(own)} runs")
            continue
        for curve in CURVES[:2]:
            steps = Counter(each.step for each in client.get_metric_history(own[0].info.run_id, curve))
            missing = set(range(1, EPOCHS + 1)) - steps.keys()
            twice = [step for step, count in steps.items() if count > 1]
            if missing or twice:
                found.append(f"round {one.number}, {name}, {curve}: missing {sorted(missing)}, twice {sorted(twice)}")
    return found


def half_registered(known: set[str]) -> list[str]:
    """Versions without digests, files or lineage, and aliases and decisions that do not fit; `known` are whole."""
    client, found = mlflow.MlflowClient(), []
    for name in CLASSES:
        model = f"{DATASET}.{name}"
        versions = client.search_model_versions(f"name = '{model}'")
        keys = Counter(version.tags.get(DETECTOR_TAG) for version in versions)
        found += [f"{model}: detector {key} has {count} versions" for key, count in keys.items() if count > 1]
        for version in versions:
            label = f"{model} version {version.version}"
            if label not in known and not (wrong := _wrong_with(version)):
                known.add(label)
            elif label not in known:
                found.append(f"{label}: {wrong}")
        found += _wrong_aliases(model, {int(version.version) for version in versions})
    return found


def _wrong_with(version: ModelVersion) -> str:
    if version.status != "READY":
        return f"status {version.status}"
    if not any(name.startswith(DIGEST_TAG) for name in version.tags):
        return "no digests"
    if not is_logged(version.run_id, version.tags.get(DETECTOR_TAG, "")):
        return "no lineage"
    try:
        load_detector(find_registered(version.name, version.version))
    except SprueError as error:
        return str(error)
    return ""


def _wrong_aliases(model: str, versions: set[int]) -> list[str]:
    """The champion has to be a version that exists, and the last decision's."""
    aliases = mlflow.MlflowClient().get_registered_model(model).aliases
    wrong = [f"{model}: {alias} is version {each}, which is not there" for alias, each in aliases.items()
             if int(each) not in versions]  # fmt: skip
    changes = [entry for entry in audit_log.entries(model) if entry.kind != "refused"]
    numbers = Counter(entry.number for entry in audit_log.entries(model))
    wrong += [f"{model}: decision {number} is there {count} times" for number, count in numbers.items() if count > 1]
    wrong += [f"{model}: a change of version {entry.before} to {entry.after} by nobody" for entry in changes
              if entry.kind == "external"]  # fmt: skip
    if changes and str(changes[-1].after) != str(aliases.get(CHAMPION)):
        wrong.append(f"{model}: the champion is {aliases.get(CHAMPION)}, the log says {changes[-1].after}")
    return wrong
