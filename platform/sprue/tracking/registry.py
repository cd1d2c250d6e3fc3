"""The model registry: a model for each class of each dataset. `sprue.stages.register` fills it."""

import hashlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

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
from sprue.inference.cache import cache_folder, cached
from sprue.tracking.digests import altered_files, combined_digest, require_digests, require_tags
from sprue.tracking.names import resolve_name

if TYPE_CHECKING:
    from sprue.inference.detector import Detector

CHAMPION = "champion"
"""Alias of the version that is served."""
CHALLENGER = "challenger"
"""Alias of the version that the pipeline has registered last, if it is not the champion."""
DATASET_TAG = "sprue.dataset"
CLASS_TAG = "sprue.class"
DETECTOR_TAG = "sprue.detector"
LOGGED_MODEL = "models:/"
PAGE = 1000
"""Models that the registry names at once, which is the most that it does."""
NOT_FOUND = {ErrorCode.Name(RESOURCE_DOES_NOT_EXIST), ErrorCode.Name(INVALID_PARAMETER_VALUE)}
"""The registry's error codes for a version or an alias that does not exist."""


@dataclass(frozen=True)
class RegisteredDetector:
    """A version of a registered model; its tags hold, among others, the digests of its files.

    In a backup that is restored, a version's number may stand for another calibration of the same run; the two are not
    equal.

    Attributes:
        digest: Of its files' digests.
    """

    dataset: str
    class_name: str
    version: int
    run_id: str
    tags: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    digest: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "digest", combined_digest(self.tags))

    @property
    def model_name(self) -> str:
        """The registered model's name."""
        return model_name(self.dataset, self.class_name)

    def __str__(self) -> str:
        """Model and version, for messages."""
        return f"{self.model_name} version {self.version}"


def model_name(dataset: str, class_name: str) -> str:
    """The name of a class's registered model.

    >>> model_name("textures", "brick")
    'textures.brick'
    """
    return f"{dataset}.{class_name}"


def find_version(model: str, detector_key: str) -> ModelVersion | None:
    """The registered version of a detector, if there is one."""
    found = _versions_of(model, detector_key)
    return found[0] if found else None


def register(
    dataset: str,
    class_name: str,
    model_uri: str,
    run_id: str,
    detector_key: str,
    tags: Mapping[str, str],
    description: str,
) -> int:
    """Registers a logged model as a new version of its class, if its detector has none.

    The caller holds the model's lock. The key names the detector by its inputs, the description is Markdown. Returns
    the version's number.
    """
    client, name = mlflow.MlflowClient(), model_name(dataset, class_name)
    own = {DATASET_TAG: dataset, CLASS_TAG: class_name}
    try:
        client.create_registered_model(name, tags=own)
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
            raise
        # Somebody may have made it on MLflow's pages, to give permissions.
        for tag in own.items() - client.get_registered_model(name).tags.items():
            client.set_registered_model_tag(name, *tag)
    if not _versions_of(name, detector_key):
        tags = {**tags, DETECTOR_TAG: detector_key}
        # A server wants the model's identifier besides its URI.
        model = model_uri.removeprefix(LOGGED_MODEL) if model_uri.startswith(LOGGED_MODEL) else None
        client.create_model_version(name, model_uri, run_id, tags=tags, description=description, model_id=model)
    first, *duplicates = _versions_of(name, detector_key)
    for version in duplicates:  # made when MLflow's client repeats a request whose answer was lost
        client.delete_model_version(name, version.version)
    return int(first.version)


def _versions_of(model: str, detector_key: str) -> list[ModelVersion]:
    """The complete versions of a detector, oldest first."""
    found = mlflow.MlflowClient().search_model_versions(
        f"name = '{model}' and tags.`{DETECTOR_TAG}` = '{detector_key}'"
    )
    return sorted((version for version in found if version.status == "READY"), key=lambda each: int(each.version))


def registered_models() -> Iterator[RegisteredModel]:
    """The models of all classes of all datasets; one question for each `PAGE` of them."""
    client, token = mlflow.MlflowClient(), None
    while True:
        page = client.search_registered_models(f"tags.`{CLASS_TAG}` != ''", max_results=PAGE, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def model_names() -> list[str]:
    """The names of all models, sorted."""
    return sorted(model.name for model in registered_models())


def find_model(name: str) -> str:
    """The full name of a model.

    Args:
        name: ``<dataset>.<class>``, or the class alone where only one dataset has it.

    Raises:
        SprueError: If there is none, or the name is ambiguous.
    """
    return resolve_name(name, model_names())


def champions() -> list[RegisteredDetector]:
    """The champions of all models on the tracking server, by name; see `with_aliases`."""
    (found,) = with_aliases(CHAMPION)
    return found


def with_aliases(*aliases: str) -> list[list[RegisteredDetector]]:
    """The versions of all models on the tracking server that have an alias, by name; a list for each alias.

    One question for each `PAGE` of models, which comes with each model's newest version, and one more for each distinct
    number of versions that are older.
    """
    models = {model.name: model for model in registered_models()}
    numbers = {
        alias: {name: int(model.aliases[alias]) for name, model in models.items() if alias in model.aliases}
        for alias in aliases
    }
    wanted = {each for of_alias in numbers.values() for each in of_alias.items()}
    newest = (version for model in models.values() for version in model.latest_versions)
    versions = {(each.name, int(each.version)): each for each in newest}
    for number in sorted({number for name, number in wanted - versions.keys()}):
        versions |= {(each.name, number): each for each in _versions_numbered(number)}
    # A version may have been deleted between the questions.
    return [
        [_detector(models[name], versions[name, number]) for name, number in sorted(of_alias.items())
         if (name, number) in versions]
        for of_alias in numbers.values()
    ]  # fmt: skip


def _versions_numbered(number: int) -> Iterator[ModelVersion]:
    """The versions of all models that have a number."""
    client, token = mlflow.MlflowClient(), None
    while True:
        page = client.search_model_versions(f"version_number = {number}", page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def find_registered(name: str, version: str) -> RegisteredDetector:
    """A version by its number or its alias.

    Args:
        name: As for `find_model`.
        version: A number, or an alias such as ``champion``.

    Raises:
        SprueError: If there is none, or the name is ambiguous.
    """
    client, name = mlflow.MlflowClient(), find_model(name)
    try:
        if version.isdecimal():
            found = client.get_model_version(name, version)
        else:
            found = client.get_model_version_by_alias(name, version)
    except MlflowException as error:
        if error.error_code not in NOT_FOUND:
            raise
        raise SprueError(f"{name} has no version {version!r}; `sprue audit {name}` lists its champions") from error
    return _detector(client.get_registered_model(name), found)


def _detector(model: RegisteredModel, version: ModelVersion) -> RegisteredDetector:
    return RegisteredDetector(
        model.tags[DATASET_TAG], model.tags[CLASS_TAG], int(version.version), version.run_id or "", version.tags
    )


def load_detector(registered: RegisteredDetector) -> "Detector":
    """Downloads a registered detector into the user's cache folder and loads it, if its files are those registered.

    Raises:
        SprueError: If its files can't be had, or are others than those that were registered.
    """
    from sprue.inference.detector import Detector  # here: who only reads the registry needs no torch

    require_tags(registered.tags, registered)
    return Detector.load(
        cached(
            _cache_name(registered),
            lambda folder: _download(registered, folder),
            lambda folder: not altered_files(folder, registered.tags),
        )
    )


def require_registered_files(registered: RegisteredDetector) -> None:
    """Checks that the registry still has the files that were registered, whatever the user's cache folder has.

    Raises:
        SprueError: If they can't be had, or are others.
    """
    with tempfile.TemporaryDirectory() as folder:
        _download(registered, Path(folder))


def is_downloaded(registered: RegisteredDetector) -> bool:
    """Whether the user's cache folder has a registered detector; its files may be damaged."""
    return (cache_folder() / _cache_name(registered)).exists()


def _cache_name(registered: RegisteredDetector) -> str:
    key = f"{mlflow.get_registry_uri()} {registered} {registered.run_id} {registered.digest}"
    return f"models/{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def _download(registered: RegisteredDetector, folder: Path) -> None:
    source = f"models:/{registered.model_name}/{registered.version}/artifacts/detector"
    try:
        with tempfile.TemporaryDirectory() as temporary:
            downloaded = mlflow.artifacts.download_artifacts(source, dst_path=temporary)
            shutil.copytree(downloaded, folder, dirs_exist_ok=True)
    except (MlflowException, OSError) as error:
        raise SprueError(f"the files of {registered} can't be had: {error}") from error
    require_digests(folder, registered.tags, registered)
