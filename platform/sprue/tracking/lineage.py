"""From a registered version to the pictures, settings and machine that it comes from, and back from a picture."""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import mlflow
import pandas as pd
from mlflow.entities.model_registry import ModelVersion

from sprue.errors import SprueError
from sprue.tracking.registry import DETECTOR_TAG, RegisteredDetector, registered_models

FOLDER = "lineage"
COLUMNS = ["split", "sample_id", "view", "sha256", "path"]
ENVIRONMENT = ("sprue.packages", "sprue.machine", "sprue.cluster", "sprue.job")


class NoRecordError(SprueError):
    """A version of an earlier release, which kept no record."""


def is_logged(run_id: str, detector_key: str) -> bool:
    """Whether a run has the record of a detector."""
    return len(mlflow.MlflowClient().list_artifacts(run_id, f"{FOLDER}/{detector_key}")) == 2


@dataclass(frozen=True)
class Lineage:
    """Where a version comes from. It is kept with its run, in a folder for each detector that the run's fit became.

    Attributes:
        facts: Dataset, feature spec, flow, settings and code: all that is needed to fit the same again.
        pictures: The class's pictures in the manifest's order: split, sample_id, view, sha256, path.
    """

    facts: dict[str, Any]
    pictures: pd.DataFrame

    def log(self, run_id: str, detector_key: str) -> None:
        """Logs it to a run."""
        client, folder = mlflow.MlflowClient(), f"{FOLDER}/{detector_key}"
        client.log_text(run_id, self.pictures[COLUMNS].to_csv(index=False), f"{folder}/pictures.csv")
        client.log_text(run_id, json.dumps(self.facts, indent=2, sort_keys=True), f"{folder}/facts.json")

    @classmethod
    def read(cls, registered: RegisteredDetector) -> Self:
        """That of a version.

        Raises:
            SprueError: If it has none.
        """
        version = mlflow.MlflowClient().get_model_version(registered.model_name, str(registered.version))
        return cls._of(version)

    @classmethod
    def _of(cls, version: ModelVersion) -> Self:
        if not (version.run_id and is_logged(version.run_id, version.tags.get(DETECTOR_TAG, ""))):
            raise NoRecordError(
                f"{version.name} version {version.version} has no record of where it comes from; the register stage "
                "adds it while the version's detector is the current one"
            )
        folder = f"runs:/{version.run_id}/{FOLDER}/{version.tags[DETECTOR_TAG]}"
        pictures = io.StringIO(mlflow.artifacts.load_text(f"{folder}/pictures.csv"))
        return cls(
            json.loads(mlflow.artifacts.load_text(f"{folder}/facts.json")),
            pd.read_csv(pictures, dtype=str, keep_default_na=False),
        )

    def digests(self, split: str) -> tuple[tuple[str, ...], ...]:
        """Digests of the samples of a split, each those of its views, as fits are given them."""
        rows = self.pictures[self.pictures["split"] == split]
        return tuple(tuple(group) for _, group in rows.groupby("sample_id", sort=False)["sha256"])


@dataclass(frozen=True)
class Use:
    """What a version used a picture for."""

    class_name: str
    version: int
    aliases: tuple[str, ...]
    split: str
    path: str


def versions() -> Iterator[ModelVersion]:
    """Every version of every class."""
    for model in registered_models():
        found = mlflow.MlflowClient().search_model_versions(f"name = '{model.name}'")
        yield from sorted(found, key=lambda version: int(version.version))


def uses(sha256: str) -> tuple[list[Use], list[str]]:
    """Which versions were made with a picture, and which have no record of their pictures."""
    found, silent = [], []
    for version in versions():
        try:
            pictures = Lineage._of(version).pictures
        except NoRecordError:
            silent.append(f"{version.name} version {version.version}")
            continue
        for row in pictures[pictures["sha256"] == sha256].itertuples():
            aliases = mlflow.MlflowClient().get_model_version(version.name, version.version).aliases
            found.append(Use(version.name, int(version.version), tuple(aliases), str(row.split), str(row.path)))
    return found, silent


def describe(registered: RegisteredDetector) -> list[tuple[str, str]]:
    """A version's lineage in words, a heading for each."""
    client = mlflow.MlflowClient()
    version = client.get_model_version(registered.model_name, str(registered.version))
    lineage = Lineage._of(version)
    facts, counts = lineage.facts, lineage.pictures["split"].value_counts()
    spec, run = facts["spec"], client.get_run(registered.run_id)
    settings = [f"{name} {value}" for name, value in facts["settings"].items()]
    return [
        ("version", f"{version.name} version {version.version} {' '.join(version.aliases)}".rstrip()),
        ("dataset", f"{facts['dataset']}, DVC {facts['dvc'] or 'does not track it'}, manifest {facts['manifest']}"),
        ("pictures", ", ".join(f"{counts[split]} {split}" for split in counts.index)),
        ("features", f"{facts['fingerprint']}: " + ", ".join(f"{name} {value}" for name, value in spec.items())),
        (
            "flow",
            f"{facts['flow_name']}: " + ", ".join(f"{name} {value}" for name, value in facts["flow_config"].items()),
        ),
        ("fit", f"{facts['fit']} with {facts['cpus'] or 'an unknown number of'} CPU threads: " + ", ".join(settings)),
        ("settings", facts["found"]),
        ("code", f"commit {facts['commit']}"),
        *((name.removeprefix("sprue."), run.data.tags.get(name, "not recorded")) for name in ENVIRONMENT),
        ("run", f"{registered.run_id} in experiment {run.info.experiment_id}"),
        ("detector", str(version.tags.get(DETECTOR_TAG))),
    ]
