"""Who waits where processes share cores: training waits for scoring, for a line waits for its score.

Nodes of Ray start all workers with niceness 0 (``RAY_worker_niceness``) instead of Ray's own 15, so that scoring shares
the cores as other servers of a machine do.
"""

import os
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

BACKGROUND = 15
"""Niceness of processes that nobody waits for."""


def lower_priority() -> None:
    """Lets other processes go first; for this thread, and threads that it starts."""
    if os.getpriority(os.PRIO_PROCESS, 0) < BACKGROUND:
        os.setpriority(os.PRIO_PROCESS, 0, BACKGROUND)


def in_background(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """The function for a worker process, which lets others go first."""

    @wraps(function)
    def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        lower_priority()
        return function(*args, **kwargs)

    return call
