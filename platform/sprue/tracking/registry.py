"""The model registry: a registered model for each class, whose champion is served."""

import hashlib
import logging
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import mlflow
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, ErrorCode

from sprue.errors import SprueError
from sprue.inference.detector import Detector
from sprue.inference.engines import cache_folder, keep

logger = logging.getLogger(__name__)

CHAMPION = "champion"
CLASS_TAG = "sprue.class"
DETECTOR_TAG = "sprue.detector"
CURRENT_TAG = "sprue.current"


@dataclass(frozen=True)
class Champion:
    """The version of a class's model that is served."""

    class_name: str
    model_name: str
    version: int
    run_id: str


def find_version(class_name: str, detector_key: str) -> ModelVersion | None:
    """The registered version of a detector, if the registry has it and its run."""
    client = mlflow.MlflowClient()
    found = client.search_model_versions(f"name = '{class_name}' and tags.`{DETECTOR_TAG}` = '{detector_key}'")
    for version in sorted(found, key=lambda each: -int(each.version)):
        if version.status == "READY":
            return version
    return None


def register(
    class_name: str, model_uri: str, run_id: str, detector_key: str, tags: Mapping[str, str], words: str
) -> int:
    """Registers a logged model as a new version of its class.

    Args:
        class_name: The class, whose name the registered model has.
        model_uri: The logged model.
        run_id: Its run.
        detector_key: Names the detector by its inputs; see `find_version`.
        tags: More tags of the version.
        words: The version's description.

    Returns:
        The version's number.
    """
    client = mlflow.MlflowClient()
    try:
        client.create_registered_model(class_name, tags={CLASS_TAG: class_name})
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
            raise
    version = client.create_model_version(
        class_name, model_uri, run_id, tags={**tags, DETECTOR_TAG: detector_key}, description=words
    )
    return int(version.version)


def make_champion(class_name: str, version: int, detector_key: str) -> bool:
    """Gives a version the alias that the scoring service follows, once for each time that its detector becomes current.

    So a promotion by hand stays until the pipeline has another detector.

    Returns:
        Whether the alias was given; not if this detector was the last that this function gave it to.
    """
    client = mlflow.MlflowClient()
    if client.get_registered_model(class_name).tags.get(CURRENT_TAG) == detector_key:
        return False
    client.set_registered_model_alias(class_name, CHAMPION, str(version))
    client.set_registered_model_tag(class_name, CURRENT_TAG, detector_key)
    return True


def champions() -> list[Champion]:
    """The champions of all classes on the tracking server, by class name."""
    client = mlflow.MlflowClient()
    found = []
    page = client.search_registered_models(f"tags.`{CLASS_TAG}` != ''")
    while True:
        for model in page:
            if CHAMPION in model.aliases:
                version = client.get_model_version_by_alias(model.name, CHAMPION)
                found.append(Champion(model.tags[CLASS_TAG], model.name, int(version.version), version.run_id or ""))
        if not page.token:
            return sorted(found, key=lambda champion: champion.class_name)
        page = client.search_registered_models(f"tags.`{CLASS_TAG}` != ''", page_token=page.token)


def load_detector(champion: Champion) -> Detector:
    """Fetches a registered detector into the user's cache folder and loads it.

    Raises:
        SprueError: If its files can't be had.
    """
    key = f"{mlflow.get_registry_uri()} {champion.model_name} {champion.version} {champion.run_id}"
    folder = cache_folder() / "models" / hashlib.sha256(key.encode()).hexdigest()[:16]
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent))
        try:
            fetched = mlflow.artifacts.download_artifacts(f"models:/{champion.model_name}/{champion.version}")
            shutil.copytree(Path(fetched) / "artifacts" / "detector", temporary, dirs_exist_ok=True)
            keep(temporary, folder)
        except (MlflowException, OSError) as error:
            raise SprueError(
                f"the files of {champion.model_name} version {champion.version} can't be had: {error}"
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return Detector.load(folder)
