"""The model registry: a registered model for each class, whose champion is served."""

import hashlib
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import mlflow
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import (
    INVALID_PARAMETER_VALUE,
    RESOURCE_ALREADY_EXISTS,
    RESOURCE_DOES_NOT_EXIST,
    ErrorCode,
)

from sprue.errors import SprueError
from sprue.inference.detector import Detector
from sprue.inference.engines import cache_folder, keep
from sprue.tracking.lock import class_lock

logger = logging.getLogger(__name__)

CHAMPION = "champion"
"""Alias of the version that is served."""
CHALLENGER = "challenger"
"""Alias of the version that the pipeline has made last, if it is another."""
CLASS_TAG = "sprue.class"
DETECTOR_TAG = "sprue.detector"
LOGGED_MODEL = "models:/"
NOT_FOUND = {ErrorCode.Name(RESOURCE_DOES_NOT_EXIST), ErrorCode.Name(INVALID_PARAMETER_VALUE)}
"""How the registry says that there is no such version or alias."""


@dataclass(frozen=True)
class RegisteredDetector:
    """A version of a class's model."""

    class_name: str
    model_name: str
    version: int
    run_id: str


def find_version(class_name: str, detector_key: str) -> ModelVersion | None:
    """The registered version of a detector, if the registry has it and its run."""
    found = _versions_of(class_name, detector_key)
    return found[0] if found else None


def register(
    class_name: str, model_uri: str, run_id: str, detector_key: str, tags: Mapping[str, str], words: str
) -> int:
    """Registers a logged model as a new version of its class, if its detector has none.

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
    with class_lock(class_name):
        if not _versions_of(class_name, detector_key):
            tags = {**tags, DETECTOR_TAG: detector_key}
            # A server wants to be told the model besides its URI.
            model = model_uri.removeprefix(LOGGED_MODEL) if model_uri.startswith(LOGGED_MODEL) else None
            client.create_model_version(class_name, model_uri, run_id, tags=tags, description=words, model_id=model)
        first, *again = _versions_of(class_name, detector_key)
        for version in again:  # of a request whose answer was lost, and that MLflow's client has sent again
            client.delete_model_version(class_name, version.version)
    return int(first.version)


def _versions_of(class_name: str, detector_key: str) -> list[ModelVersion]:
    """The whole versions of a detector, oldest first."""
    found = mlflow.MlflowClient().search_model_versions(
        f"name = '{class_name}' and tags.`{DETECTOR_TAG}` = '{detector_key}'"
    )
    return sorted((version for version in found if version.status == "READY"), key=lambda each: int(each.version))


def registered_models() -> Iterator[RegisteredModel]:
    """The models of all classes."""
    client = mlflow.MlflowClient()
    page = client.search_registered_models(f"tags.`{CLASS_TAG}` != ''")
    while True:
        yield from page
        if not page.token:
            return
        page = client.search_registered_models(f"tags.`{CLASS_TAG}` != ''", page_token=page.token)


def class_names() -> list[str]:
    """The classes that have a model, sorted."""
    return sorted(model.tags[CLASS_TAG] for model in registered_models())


def champions() -> list[RegisteredDetector]:
    """The champions of all classes on the tracking server, by class name."""
    client, found = mlflow.MlflowClient(), []
    for model in registered_models():
        if CHAMPION in model.aliases:
            version = client.get_model_version_by_alias(model.name, CHAMPION)
            champion = RegisteredDetector(model.tags[CLASS_TAG], model.name, int(version.version), version.run_id or "")
            found.append(champion)
    return sorted(found, key=lambda champion: champion.class_name)


def find_registered(class_name: str, version: str) -> RegisteredDetector:
    """A version by its number or its alias.

    Raises:
        SprueError: If there is none.
    """
    client = mlflow.MlflowClient()
    try:
        if version.isdecimal():
            found = client.get_model_version(class_name, version)
        else:
            found = client.get_model_version_by_alias(class_name, version)
    except MlflowException as error:
        if error.error_code not in NOT_FOUND:
            raise
        raise SprueError(
            f"there is no version {version} of class {class_name!r}; registered are "
            f"{', '.join(class_names()) or 'none'}"
        ) from error
    return RegisteredDetector(class_name, class_name, int(found.version), found.run_id or "")


def load_detector(registered: RegisteredDetector) -> Detector:
    """Fetches a registered detector into the user's cache folder and loads it.

    Raises:
        SprueError: If its files can't be had.
    """
    key = f"{mlflow.get_registry_uri()} {registered.model_name} {registered.version} {registered.run_id}"
    folder = cache_folder() / "models" / hashlib.sha256(key.encode()).hexdigest()[:16]
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent))
        try:
            fetched = mlflow.artifacts.download_artifacts(f"models:/{registered.model_name}/{registered.version}")
            shutil.copytree(Path(fetched) / "artifacts" / "detector", temporary, dirs_exist_ok=True)
            keep(temporary, folder)
        except (MlflowException, OSError) as error:
            raise SprueError(
                f"the files of {registered.model_name} version {registered.version} can't be had: {error}"
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return Detector.load(folder)
