"""Writes to the tracking server in a thread of its own, so that no fit waits for it."""

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mlflow.exceptions import MlflowException

logger = logging.getLogger(__name__)

PAUSE_S = 60.0
"""How long a server that did not answer is left alone: MLflow's client tries for minutes, and each epoch would wait."""


class TrackingWriter:
    """Calls functions one after the other; skips those for a server that does not answer.

    What is skipped is lost unless a later call makes up for it, as `sprue.tracking.runs.FitRun.log_epochs` does.
    """

    def __init__(self) -> None:
        """Starts the thread."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tracking")
        self._silent_until = 0.0

    def submit(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Calls a function soon, and returns at once."""
        self._thread.submit(self._call, function, arguments)

    def close(self) -> None:
        """Waits until everything is written."""
        self._thread.shutdown(wait=True)

    def _call(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        if time.monotonic() < self._silent_until:
            return
        try:
            function(*arguments)
        except MlflowException as error:
            self._silent_until = time.monotonic() + PAUSE_S
            logger.warning("the tracking server did not answer (%s); what it lacks is sent again later", error)
        except Exception:  # a defect, which would vanish with the thread's result
            logger.exception("the tracking server was not written to")
