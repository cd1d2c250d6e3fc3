"""One change of a model's versions and aliases at a time, by any process on any machine.

The registry has no transactions. But only one process can create a registered model of a given name: that model is
the lock. Its holder renews it. A holder that dies, by SIGKILL or with its machine, can't release it; so others break a
lock whose process they see dead, or that was not renewed for `STALE_S` while the registry answered.
"""

import logging
import os
import re
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, RESOURCE_DOES_NOT_EXIST, ErrorCode

from sprue.errors import SprueError
from sprue.tracking.names import LOCK
from sprue.tracking.user import whoami

logger = logging.getLogger(__name__)

# The second may be raised when the lock is released while the registry looks up its owner.
TAKEN = {ErrorCode.Name(RESOURCE_ALREADY_EXISTS), ErrorCode.Name(RESOURCE_DOES_NOT_EXIST)}
RENEW_S = 10.0
STALE_S = 120.0
"""After which a lock that nobody renews is a dead process's. MLflow's client, which finds no server, waits up to 64 s
until it asks again: so long a living holder may not renew although the server is back."""
PATIENCE_S = 180.0
"""How long to wait for another change: a registration takes seconds, every other one a second."""
POLL_S = 0.1
HOLDER = re.compile(r", process (\d+) of ([^,]+),")


@contextmanager
def alias_lock(model: str, patience_s: float = PATIENCE_S) -> Iterator[None]:
    """Locks the aliases of a registered model.

    Raises:
        SprueError: If another process keeps the lock; the message names it and says how to break its lock by hand.
    """
    name = f"{LOCK}{model}"
    owner = f"held by {whoami()}, process {os.getpid()} of {_machine() or 'unknown'}, {uuid.uuid4().hex}"
    _take(model, name, owner, patience_s)
    released = threading.Event()
    renewal = threading.Thread(target=_renew, args=(name, owner, released), daemon=True, name=name)
    renewal.start()
    try:
        yield
    finally:
        released.set()
        renewal.join()  # else it might renew the next holder's lock
        _release(name, owner)


def _take(model: str, name: str, owner: str, patience_s: float) -> None:
    deadline, seen, unchanged_s = time.monotonic() + patience_s, "", 0.0
    while True:
        looked = time.monotonic()
        try:
            mlflow.MlflowClient().create_registered_model(name, description=owner)
            return
        except MlflowException as error:
            if error.error_code not in TAKEN:
                raise
            found = _owner(name) or "the lock was just released; try again"
            if found.startswith(owner):  # the answer to the first request was lost, and MLflow's client sent it again
                return
            if _is_dead(found) or (found == seen and unchanged_s > STALE_S):
                logger.warning("the lock %s is broken, whose process has died: %s", name, found)
                _release(name, found)
                continue
            if time.monotonic() > deadline:
                raise SprueError(
                    f"the aliases of {model} are locked: {found}. If that process is dead, delete the registered "
                    f"model {name}"
                ) from error
        time.sleep(POLL_S)
        # Time in which the registry did not answer says nothing about the holder, which could not renew.
        unchanged_s = unchanged_s + min(time.monotonic() - looked, 1.0) if found == seen else 0.0
        seen = found


def _renew(name: str, owner: str, released: threading.Event) -> None:
    """Changes the lock's description every few seconds, as long as it is this holder's."""
    number = 0
    while not released.wait(RENEW_S):
        number += 1
        try:
            if not (_owner(name) or "").startswith(owner):
                logger.error("the lock %s was broken while this process held it", name)
                return
            mlflow.MlflowClient().update_registered_model(name, description=f"{owner}, renewed {number} times")
        except MlflowException as error:
            logger.debug("the lock %s is not renewed: %s", name, error)


def _release(name: str, owner: str) -> None:
    """Deletes the lock, if it is this holder's."""
    if not (_owner(name) or "").startswith(owner):
        return
    try:
        mlflow.MlflowClient().delete_registered_model(name)
    except MlflowException as error:
        # MLflow's client may repeat the request, which then finds nothing to delete.
        if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
            raise


def _owner(name: str) -> str | None:
    """What a lock says of its holder; None if nobody holds it."""
    try:
        return mlflow.MlflowClient().get_registered_model(name).description or "held by an unknown process"
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
            raise
        return None


def _machine() -> str:
    """Names where a process number means this process: the machine since its start, and its container."""
    boot, space = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    if not (boot.exists() and space.is_symlink()):
        return ""
    return f"{boot.read_text().strip()}/{re.sub('[^0-9]', '', str(space.readlink()))}"


def _is_dead(owner: str) -> bool:
    """Whether a lock's holder was a process of this machine, and is no more."""
    found = HOLDER.search(owner)
    if found is None or found[2] != _machine():
        return False
    try:
        os.kill(int(found[1]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's
        return False
    return False
