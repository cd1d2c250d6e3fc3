"""The classes that a stage could not do, and why. The others go on; the last stage reports all of them.

A stage that can do a class writes ``failures/<stage>.json`` in the dataset's part of the store, and later stages skip
the classes in it. DVC runs a stage again whose output is missing, so `forget_failures` is what it takes to try again.
"""

import logging
from collections.abc import Collection, Mapping
from typing import NamedTuple

from upath import UPath

from sprue.errors import SprueError
from sprue.stages.runtime import STAGES
from sprue.store import read_json, write_json

logger = logging.getLogger(__name__)


class Failure(NamedTuple):
    """A class that failed, the first stage in which it did, and why."""

    class_name: str
    stage: str
    reason: str


def write_failures(folder: UPath, stage: str, failures: Mapping[str, str]) -> None:
    """Writes a stage's ``failures/<stage>.json``, also if there are none: the reason for each class that failed.

    `folder` is the dataset's part of the store.
    """
    write_json(_file(folder, stage), dict(sorted(failures.items())))


def read_failures(folder: UPath, stage: str) -> dict[str, str]:
    """The reason for each class that failed in a stage; empty if the stage has not run."""
    path = _file(folder, stage)
    return dict(read_json(path, made_by=stage)) if path.is_file() else {}


def failed_before(folder: UPath, stage: str) -> set[str]:
    """Names of the classes that failed in the stages before this one, which skips them."""
    return {name for each in STAGES[: STAGES.index(stage)] for name in read_failures(folder, each)}


def close_stage(folder: UPath, stage: str, failures: Mapping[str, str], left: Collection[str]) -> None:
    """Writes and logs a stage's failures; the stage fails if it has left no class for the next.

    Args:
        folder: The dataset's part of the store.
        stage: The stage.
        failures: The reason for each class that failed in it.
        left: The classes that it has done.

    Raises:
        SprueError: If no class is left; the message has the reason for each.
    """
    write_failures(folder, stage, failures)
    if not left:
        raise SprueError(f"no class is left\n{as_table(all_failures(folder, stage))}")
    for name, reason in sorted(failures.items()):
        logger.warning("%-20s failed, the others go on: %s", name, reason)


def all_failures(folder: UPath, last_stage: str = STAGES[-1]) -> list[Failure]:
    """The classes that failed in any stage up to the last, by name."""
    first: dict[str, Failure] = {}
    for stage in STAGES[: STAGES.index(last_stage) + 1]:
        for name, reason in read_failures(folder, stage).items():
            first.setdefault(name, Failure(name, stage, reason))
    return sorted(first.values())


def as_table(failures: Collection[Failure]) -> str:
    """The failed classes in aligned columns: class, stage, reason."""
    rows = [Failure("class", "stage", "reason"), *failures]
    width = max(len(row.class_name) for row in rows)
    lines = (f"{row.class_name:<{width}}  {row.stage:<8}  {'; '.join(row.reason.splitlines())}" for row in rows)
    return "\n".join(lines)


def report(folder: UPath, failures: Collection[Failure]) -> str:
    """What failed and how it is done again, for the end of a command; `folder` is the dataset's part of the store."""
    count = f"{len(failures)} {'class' if len(failures) == 1 else 'classes'} of {folder.name} failed"
    files = [str(_file(folder, stage)) for stage in STAGES[1:-1] if any(each.stage == stage for each in failures)]
    by_dvc = f" With DVC alone, first type: rm {' '.join(files)}" if files else ""
    return (
        f"{count}, the others are done\n{as_table(failures)}\n"
        f"Remove the cause; the same command then does these classes alone.{by_dvc}"
    )


def forget_failures(folder: UPath) -> None:
    """Deletes the files that name a class, so that DVC runs these stages again; what they have done is kept.

    What the manifest refuses depends on the images alone, so that it is not asked again. The last stage's file is
    always deleted; see `is_complete`.
    """
    for stage in STAGES[1:-1]:
        if read_failures(folder, stage):
            _file(folder, stage).unlink()
    _file(folder, STAGES[-1]).unlink(missing_ok=True)


def is_complete(folder: UPath) -> bool:
    """Whether the last stage has come to its end since `forget_failures`."""
    return _file(folder, STAGES[-1]).is_file()


def _file(folder: UPath, stage: str) -> UPath:
    return folder / "failures" / f"{stage}.json"
