"""Which tracking server is used, and whether it answers."""

import os
from urllib.parse import urlparse

import mlflow
import requests
from upath import UPath

from sprue.errors import SprueError

PATIENCE_S = 5.0
"""How long a tracking server may take to say that it is there."""


def tracking_uri(store: UPath) -> str:
    """``$MLFLOW_TRACKING_URI``, by default an SQLite file in a local store.

    Raises:
        SprueError: If the store is remote and no server is named: a file on s3 can't be a database.
    """
    named = os.environ.get("MLFLOW_TRACKING_URI")
    if named:
        return named
    if store.protocol not in ("", "file"):
        raise SprueError(f"the store {store} can't hold the tracking database; set MLFLOW_TRACKING_URI to a server")
    return f"sqlite:///{store / 'mlflow' / 'mlflow.db'}"


def connect(store: UPath) -> str:
    """Points MLflow to the tracking server and makes sure that it answers.

    Returns:
        The URI.

    Raises:
        SprueError: If it does not answer within seconds.
    """
    uri = tracking_uri(store)
    if uri.startswith("sqlite:///"):
        UPath(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    elif uri.startswith(("http://", "https://")):
        try:
            requests.get(f"{uri.rstrip('/')}/health", timeout=PATIENCE_S).raise_for_status()
        except requests.RequestException as error:
            raise SprueError(
                f"the tracking server {uri} does not answer: start it, or unset MLFLOW_TRACKING_URI to track in the store"
            ) from error
    elif urlparse(uri).scheme in ("", "file"):
        raise SprueError(
            f"MLFLOW_TRACKING_URI={uri} is a folder, which has no model registry: use a server or sqlite:///FILE"
        )
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    return uri


def experiment_id(name: str, store: UPath) -> str:
    """The experiment of that name, made if there is none; artifacts of a store's own database go into the store."""
    client = mlflow.MlflowClient()
    found = client.get_experiment_by_name(name)
    if found is not None:
        return found.experiment_id
    own = tracking_uri(store).startswith("sqlite:///") and "MLFLOW_TRACKING_URI" not in os.environ
    return client.create_experiment(name, artifact_location=(store / "mlflow" / "artifacts").as_uri() if own else None)
