"""The connection to the tracking server."""

import logging
import os
from pathlib import Path
from urllib.parse import unquote, urlparse

import mlflow
import requests
from filelock import FileLock
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, ErrorCode
from upath import UPath

from sprue.errors import SprueError
from sprue.tracking.locations import ARTIFACTS, left_behind, own_database

PATIENCE_S = 5.0
"""How long a tracking server may take to answer."""


def connect(store: UPath) -> str:
    """Points MLflow to ``$MLFLOW_TRACKING_URI``, by default to the store's own database.

    Returns:
        The URI.

    Raises:
        SprueError: If the server does not answer within seconds, or the store was moved and its database names the
            old place.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or own_database(store)
    if uri.startswith("sqlite:///"):
        _create_database(uri)
        _require_location(Path(uri.removeprefix("sqlite:///")), store)
    elif uri.startswith(("http://", "https://")):
        try:
            requests.get(f"{uri.rstrip('/')}/health", timeout=PATIENCE_S).raise_for_status()
        except requests.RequestException as error:
            raise SprueError(
                f"the tracking server {uri} does not answer: start it, or unset MLFLOW_TRACKING_URI to use the store"
            ) from error
    elif urlparse(uri).scheme in ("", "file"):
        raise SprueError(
            f"MLFLOW_TRACKING_URI={uri} is a folder, which has no model registry: use a server or sqlite:///FILE"
        )
    use(uri)
    return uri


def use(uri: str) -> None:
    """Points MLflow to a tracking server that `connect` has found."""
    # MLflow's progress bars and notices would hide a stage's own output.
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)


def _create_database(uri: str) -> None:
    """Creates MLflow's tables in a new SQLite file, one process at a time: MLflow itself does not lock."""
    file = Path(uri.removeprefix("sqlite:///"))
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock"):
        if not file.exists():
            mlflow.MlflowClient(uri, uri).search_experiments(max_results=1)


def _require_location(database: Path, store: UPath) -> None:
    """Checks that the files of a store that was moved are looked for where they are now.

    A copy whose original is still there is let through: it may be the same folder under another path.
    """
    for location in left_behind(database, store):
        path = Path(unquote(urlparse(location).path))
        if urlparse(location).scheme in ("", "file") and not path.exists() and (store / ARTIFACTS).exists():
            raise SprueError(
                f"the registry of {store} names files in {path}, which is not there: the store was moved; run "
                "`sprue relocate`"
            )


def experiment_id(name: str, store: UPath) -> str:
    """The experiment of a name, created if there is none; without a server its artifacts go into the store."""
    client, location = mlflow.MlflowClient(), None
    if mlflow.get_tracking_uri().startswith("sqlite:///"):
        location = (store / ARTIFACTS).as_uri()
    found = client.get_experiment_by_name(name)
    if found is not None:
        return found.experiment_id
    try:
        return client.create_experiment(name, location)
    except MlflowException as error:
        found = client.get_experiment_by_name(name)
        if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS) or found is None:
            raise
        return found.experiment_id  # another job has created it meanwhile
