"""Does something for each class of a dataset: a few in this process, many in tasks of Ray.

A class needs seconds, and a process that does one after the other is what a large cluster would wait for.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from sprue.errors import SprueError
from sprue.inference.priority import in_background
from sprue.stages.runtime import connect_ray

logger = logging.getLogger(__name__)

MANY = 8
"""Classes from which tasks are used: fewer are done before Ray's processes have imported what they need."""

AHEAD = 2
"""Tasks for each CPU that are submitted at once, at most: what they are given and what they return is in memory."""


class Done(NamedTuple):
    """A class that was done, or why it was not.

    Attributes:
        class_name: The class.
        value: What the function has returned; None if it failed.
        failure: Why it failed; empty if it did not.
    """

    class_name: str
    value: Any
    failure: str


Logged = list[tuple[int, str]]
"""Levels and messages."""


def for_each_class(
    function: Callable[..., Any], arguments: Iterable[tuple[str, tuple[Any, ...]]], count: int
) -> Iterator[Done]:
    """Calls a function for each class; a class that fails stops no other.

    Args:
        function: Fails a class with any exception, a SprueError or OSError by its words; what it logs is logged here.
        arguments: Name of each class, and what the function is called with; taken when they are needed.
        count: How many there are. From `MANY` on, the function runs in tasks of one CPU, on the cluster that
            ``$RAY_ADDRESS`` names.

    Yields:
        Each class as soon as it is done, which with tasks is in no order.
    """
    yield from (_in_tasks if count >= MANY else _here)(function, arguments)


def _here(function: Callable[..., Any], arguments: Iterable[tuple[str, tuple[Any, ...]]]) -> Iterator[Done]:
    for name, of_class in arguments:
        yield Done(name, *attempt(function, *of_class))


def _in_tasks(function: Callable[..., Any], arguments: Iterable[tuple[str, tuple[Any, ...]]]) -> Iterator[Done]:
    # Imported only now: Ray takes seconds.
    import ray

    if not ray.is_initialized():
        connect_ray()
    task = ray.remote(num_cpus=1)(in_background(_call_and_log))
    room = max(1, AHEAD * int(ray.cluster_resources().get("CPU", 1)))
    running: dict[Any, str] = {}
    for name, of_class in arguments:
        running[task.options(name=f"{function.__name__} {name}").remote(function, of_class)] = name
        if len(running) == room:
            yield _next(running)
    while running:
        yield _next(running)


def _next(running: dict[Any, str]) -> Done:
    """Waits for one of the tasks and removes it."""
    import ray

    (ended,), _ = ray.wait(list(running), num_returns=1)
    name = running.pop(ended)
    try:
        value, failure, logged = ray.get(ended)
    except ray.exceptions.RayTaskError:  # a defect of ours: the function's own errors are returned
        raise
    except ray.exceptions.RayError as error:
        return Done(name, None, f"its process died: {str(error).splitlines()[0]}")
    for level, message in logged:
        logger.log(level, "%s", message)
    return Done(name, value, failure)


def attempt(function: Callable[..., Any], *arguments: Any) -> tuple[Any, str]:
    """Calls a function for a class; returns its value, or None and why it failed."""
    try:
        return function(*arguments), ""
    except (SprueError, OSError) as error:
        return None, str(error)
    except Exception as error:  # too little memory, or a defect, which need not be in other classes' way
        logger.exception("a class failed unexpectedly")
        return None, f"{type(error).__name__}: {error}"


def _call_and_log(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, str, Logged]:
    """As `attempt`, in a task; with what was logged, which Ray does not show where the stage runs."""
    own, messages = logging.getLogger("sprue"), _Messages()
    level = own.level
    own.addHandler(messages)
    own.setLevel(logging.INFO)
    try:
        return *attempt(function, *arguments), messages.logged
    finally:
        own.removeHandler(messages)
        own.setLevel(level)


class _Messages(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: Logged = []

    def emit(self, record: logging.LogRecord) -> None:
        self.logged.append((record.levelno, self.format(record)))
