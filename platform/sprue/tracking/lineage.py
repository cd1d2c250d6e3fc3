"""From a registered version to the images, settings and machine that made it, and back from an image."""

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import mlflow
import pandas as pd
from mlflow.entities.model_registry import ModelVersion

from sprue.errors import SprueError
from sprue.formats import LINEAGE
from sprue.tracking.registry import DETECTOR_TAG, RegisteredDetector, registered_models

FOLDER = "lineage"
COLUMNS = ["split", "sample_id", "view", "sha256", "path"]
ENVIRONMENT = ("sprue.packages", "sprue.machine", "sprue.cluster", "sprue.job")


class NoRecordError(SprueError):
    """A version that was not registered by the pipeline, and so has no record."""


def is_logged(run_id: str, detector_key: str) -> bool:
    """Whether a run has the record of a detector."""
    return len(mlflow.MlflowClient().list_artifacts(run_id, f"{FOLDER}/{detector_key}")) == 2


@dataclass(frozen=True)
class Lineage:
    """The record of a version, kept with its run, in a folder for each detector that was made of the run's fit.

    Attributes:
        fits: The facts of each `sprue.training.record.FitRecord`: settings, commit, threads, metrics.
        dvc: DVC's digest of the dataset's folder; empty if DVC does not track it.
        images: The class's images in the manifest's order: split, sample_id, view, sha256, path.
    """

    fits: tuple[dict[str, Any], ...]
    dvc: str
    images: pd.DataFrame

    @property
    def spec(self) -> dict[str, Any]:
        """The `sprue.training.spec.FitSpec` of the first fit, as JSON; the others differ in their samples."""
        return dict(self.fits[0]["spec"])

    def log(self, run_id: str, detector_key: str) -> None:
        """Logs the record to a run."""
        client, folder = mlflow.MlflowClient(), f"{FOLDER}/{detector_key}"
        facts = LINEAGE.stamped({"fits": self.fits, "dvc": self.dvc})
        client.log_text(run_id, self.images[COLUMNS].to_csv(index=False), f"{folder}/images.csv")
        client.log_text(run_id, json.dumps(facts, indent=1), f"{folder}/facts.json")

    @classmethod
    def read(cls, registered: RegisteredDetector) -> Self:
        """The record of a version.

        Raises:
            NoRecordError: If it has none.
        """
        version = mlflow.MlflowClient().get_model_version(registered.model_name, str(registered.version))
        return cls._of(version)

    @classmethod
    def _of(cls, version: ModelVersion) -> Self:
        if not (version.run_id and is_logged(version.run_id, version.tags.get(DETECTOR_TAG, ""))):
            raise NoRecordError(f"{version.name} version {version.version} was not registered by the pipeline")
        folder = f"runs:/{version.run_id}/{FOLDER}/{version.tags[DETECTOR_TAG]}"
        facts = LINEAGE.current(json.loads(mlflow.artifacts.load_text(f"{folder}/facts.json")), f"{folder}/facts.json")
        images = io.StringIO(mlflow.artifacts.load_text(f"{folder}/images.csv"))
        return cls(tuple(facts["fits"]), facts["dvc"], pd.read_csv(images, dtype=str, keep_default_na=False))


@dataclass(frozen=True)
class Use:
    """What a version used an image for."""

    model_name: str
    version: int
    aliases: tuple[str, ...]
    split: str
    path: str

    def __str__(self) -> str:
        """The use on a line."""
        return f"{self.model_name} version {self.version} {' '.join(self.aliases):<10} {self.split:<12} {self.path}"


def versions() -> Iterator[ModelVersion]:
    """Every version of every model."""
    for model in registered_models():
        found = mlflow.MlflowClient().search_model_versions(f"name = '{model.name}'")
        yield from sorted(found, key=lambda version: int(version.version))


def uses(image: Path) -> tuple[list[Use], list[str]]:
    """The versions that were made with an image file, and those that have no record of their images."""
    sha256 = hashlib.sha256(image.read_bytes()).hexdigest()
    found, without_record = [], []
    for version in versions():
        try:
            images = Lineage._of(version).images
        except NoRecordError:
            without_record.append(f"{version.name} version {version.version}")
            continue
        for row in images[images["sha256"] == sha256].itertuples():
            aliases = mlflow.MlflowClient().get_model_version(version.name, version.version).aliases
            found.append(Use(version.name, int(version.version), tuple(aliases), str(row.split), str(row.path)))
    return found, without_record


def describe(registered: RegisteredDetector) -> dict[str, str]:
    """A version's lineage in words, by headings."""
    client = mlflow.MlflowClient()
    version = client.get_model_version(registered.model_name, str(registered.version))
    lineage = Lineage._of(version)
    fits, spec, counts = lineage.fits, lineage.spec, lineage.images["split"].value_counts()
    run = client.get_run(registered.run_id)
    return {
        "version": f"{version.name} version {version.version} {' '.join(version.aliases)}".rstrip(),
        "dataset": f"{spec['dataset']}, DVC {lineage.dvc or 'does not track it'}, manifest {spec['manifest']}",
        "images": ", ".join(f"{counts[split]} {split}" for split in counts.index),
        "features": _listed(spec["features"]),
        "flow": f"{spec['flow_name']}: {_listed(spec['flow_config'])}",
        "fit": f"{', '.join(fit['key'] for fit in fits)} with {fits[0]['cpus']} CPU threads: {_listed(spec['fit'])}",
        "settings": spec["origin"],
        "code": f"commit {', '.join(sorted({fit['commit'] for fit in fits}))}",
        **{name.removeprefix("sprue."): run.data.tags.get(name, "not recorded") for name in ENVIRONMENT},
        "run": f"{registered.run_id} in experiment {run.info.experiment_id}",
        "detector": str(version.tags.get(DETECTOR_TAG)),
    }


def _listed(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())
