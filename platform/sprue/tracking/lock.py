"""One change of a class's aliases at a time, whoever makes it and on whatever machine.

The registry has no transactions, but of two models of one name it lets only one be made: that model is the lock.
"""

import getpass
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, RESOURCE_DOES_NOT_EXIST, ErrorCode

from sprue.errors import SprueError

# The holder may give it back while the registry looks who has it.
TAKEN = {ErrorCode.Name(RESOURCE_ALREADY_EXISTS), ErrorCode.Name(RESOURCE_DOES_NOT_EXIST)}
PATIENCE_S = 30.0
"""How long another change is waited for; one takes a second."""


def whoami() -> str:
    """This process's user, by number where it has no name, and machine."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


@contextmanager
def class_lock(class_name: str, patience_s: float = PATIENCE_S) -> Iterator[None]:
    """Holds a class's aliases.

    Raises:
        SprueError: If another change does not end; it says who holds the lock, and how to break that of a dead process.
    """
    client, name = mlflow.MlflowClient(), f"sprue-lock-{class_name}"
    holder = f"held by {whoami()}, process {os.getpid()}, {uuid.uuid4().hex}"
    deadline = time.monotonic() + patience_s
    while True:
        try:
            client.create_registered_model(name, description=holder)
            break
        except MlflowException as error:
            if error.error_code not in TAKEN:
                raise
            found = _description(name)
            if found == holder:  # the answer to the first request was lost, and MLflow's client asked again
                break
            if time.monotonic() > deadline:
                raise SprueError(
                    f"the aliases of {class_name} are being changed: {found}. If that process is dead, "
                    f"delete the registered model {name}"
                ) from error
        time.sleep(0.1)
    try:
        yield
    finally:
        # A request whose answer is lost is sent again, and finds nothing then.
        with suppress_missing():
            client.delete_registered_model(name)


@contextmanager
def suppress_missing() -> Iterator[None]:
    """Goes on where the registry has no such thing."""
    try:
        yield
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
            raise


def _description(name: str) -> str:
    try:
        return mlflow.MlflowClient().get_registered_model(name).description or "held by nobody known"
    except MlflowException:  # given back in between
        return "the lock was just given back; try again"
