"""One change of a model's aliases at a time, by any process on any machine.

The registry has no transactions. But only one process can create a registered model of a given name: that model is
the lock.
"""

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, RESOURCE_DOES_NOT_EXIST, ErrorCode

from sprue.errors import SprueError
from sprue.tracking.names import LOCK
from sprue.tracking.user import whoami

# The second may be raised when the lock is released while the registry looks up its owner.
TAKEN = {ErrorCode.Name(RESOURCE_ALREADY_EXISTS), ErrorCode.Name(RESOURCE_DOES_NOT_EXIST)}
PATIENCE_S = 30.0
"""How long to wait for another change; one takes a second."""


@contextmanager
def alias_lock(model: str, patience_s: float = PATIENCE_S) -> Iterator[None]:
    """Locks the aliases of a registered model.

    Raises:
        SprueError: If another process keeps the lock; the message names it and says how to break a dead one's lock.
    """
    client, name = mlflow.MlflowClient(), f"{LOCK}{model}"
    owner = f"held by {whoami()}, process {os.getpid()}, {uuid.uuid4().hex}"
    deadline = time.monotonic() + patience_s
    while True:
        try:
            client.create_registered_model(name, description=owner)
            break
        except MlflowException as error:
            if error.error_code not in TAKEN:
                raise
            found = _owner(name)
            if found == owner:  # the answer to the first request was lost, and MLflow's client sent it again
                break
            if time.monotonic() > deadline:
                raise SprueError(
                    f"the aliases of {model} are locked: {found}. If that process is dead, delete the registered "
                    f"model {name}"
                ) from error
        time.sleep(0.1)
    try:
        yield
    finally:
        try:
            client.delete_registered_model(name)
        except MlflowException as error:
            # MLflow's client may repeat the request, which then finds nothing to delete.
            if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
                raise


def _owner(name: str) -> str:
    try:
        return mlflow.MlflowClient().get_registered_model(name).description or "held by an unknown process"
    except MlflowException:  # released in between
        return "the lock was just released; try again"
