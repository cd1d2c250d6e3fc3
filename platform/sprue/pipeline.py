"""What the stages share: their parameters, where they read and write, and their receipts.

A stage runs as a DVC stage in the checkout and as a Ray job in a copy of it alike: it is told where the data and
the store are, and leaves a receipt with the digests of what it read and wrote.
"""

import argparse
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import ray
import yaml
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from upath import UPath

from sprue.errors import SprueError
from sprue.inference import memory
from sprue.store import digest, location, write_json

Settings = TypeVar("Settings")

INTERRUPTED = 130
"""The exit status of a command that was ended with Ctrl-C."""

GRACE = 5.0
"""Seconds from Ctrl-C until a stage that has not ended is ended."""


@dataclass(frozen=True)
class Context:
    """A stage's surroundings.

    Attributes:
        stage: The stage's name.
        params: The parameter file.
        data: Folder or URL of the dataset.
        store: Folder or URL of everything that is made.
    """

    stage: str
    params: Mapping[str, Any]
    data: UPath
    store: UPath

    @property
    def dataset(self) -> str:
        """The dataset's name."""
        return str(self.params["dataset"])

    @property
    def folder(self) -> UPath:
        """The dataset's part of the store."""
        return self.store / self.dataset

    def section(self, name: str) -> dict[str, Any]:
        """A section of the parameter file.

        Raises:
            SprueError: If it is missing or not a mapping.
        """
        section = self.params.get(name)
        if not isinstance(section, dict):
            raise SprueError(f"the parameter file has no section {name!r}")
        return dict(section)

    @property
    def alpha(self) -> float:
        """The false-alarm rate that is wanted.

        Raises:
            SprueError: If it is missing or not a number.
        """
        alpha = self.section("calibration").get("alpha")
        if isinstance(alpha, bool) or not isinstance(alpha, int | float):
            raise SprueError(f"calibration.alpha: {alpha!r} is not a number between 0 and 1")
        return float(alpha)

    def settings(self, kind: type[Settings], section: str, besides: Collection[str] = ()) -> Settings:
        """A section as a dataclass, which checks the ranges.

        Args:
            kind: The dataclass.
            section: The section's name.
            besides: Settings of the section that are not the dataclass's.

        Raises:
            SprueError: If a setting is unknown or of the wrong type.
        """
        values = {name: value for name, value in self.section(section).items() if name not in besides}
        known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
        for name in values:
            if name not in known:
                raise SprueError(f"{section}: there is no setting {name!r}; there are: {', '.join([*besides, *known])}")
        try:
            return kind(**values)
        except (TypeError, ValueError) as error:
            raise SprueError(f"{section}: {error}") from error

    def leave_receipt(self, inputs: Mapping[str, UPath], outputs: Mapping[str, UPath]) -> None:
        """Writes which digests the stage read and wrote, and the code's commit, to ``receipts/<stage>.json``."""
        write_json(
            self.folder / "receipts" / f"{self.stage}.json",
            {
                "stage": self.stage,
                "commit": commit(),
                "inputs": {name: digest(path) for name, path in inputs.items()},
                "outputs": {name: digest(path) for name, path in outputs.items()},
            },
        )


def commit() -> str:
    """The code's commit: ``$SPRUE_COMMIT`` where there is no repository, as in a Ray job; ``unknown`` without both."""
    named = os.environ.get("SPRUE_COMMIT")
    if named:
        return named
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:  # a node without git
        return "unknown"
    return found.stdout.strip() if found.returncode == 0 else "unknown"


def connect_ray() -> None:
    """Connects to the cluster that ``$RAY_ADDRESS`` names, or starts one on this machine for this process.

    Raises:
        SprueError: If nothing answers at that address.
    """
    # gRPC tells of every fork beside its threads, which is harmless here.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    # Workers fit and score in threads; see the module for what this is for.
    for name, value in memory.ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # On a busy machine the proxy of Ray Serve needs more than the five seconds that it is given.
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
    # Ray Train's controller looks for the end every two seconds else.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")
    # Stages say themselves how far they are, and a worker's failure reaches them as an exception.
    settings: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if "RAY_ADDRESS" not in os.environ:
        settings["address"] = "local"
        # Ray Train asks the dashboard which of its controllers live.
        settings["include_dashboard"] = True
        # For each run of Ray Train a process would wait for word that a machine is about to be taken away.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    try:
        ray.init(**settings)
    except ConnectionError as error:
        raise SprueError(f"there is no Ray cluster at RAY_ADDRESS={os.environ.get('RAY_ADDRESS')}: {error}") from error


def run_stage(stage: str, main: Callable[[Context], None]) -> None:
    """Runs a stage as a command: reads its arguments, and turns a `SprueError` into one line and exit status 1.

    Args:
        stage: The stage's name.
        main: Does the work.
    """
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument(
        "--params", type=Path, default=Path("params.yaml"), help="parameter file (default: %(default)s)"
    )
    parser.add_argument("--data", help="folder or s3 URL of the dataset (default: data/<dataset>)")
    parser.add_argument("--store", help="folder or s3 URL of all results (default: store; a Ray job has no default)")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    signal.signal(signal.SIGINT, partial(_interrupt, stage))
    try:
        params = read_params(arguments.params)
        if RAY_JOB_CONFIG_JSON_ENV_VAR in os.environ and not (arguments.data and arguments.store):
            raise SprueError(
                "a Ray job runs in a copy of the checkout that is deleted afterwards; give --data and --store, paths "
                "that all nodes see or s3 URLs"
            )
        data = location(arguments.data or f"data/{params['dataset']}")
        main(Context(stage, params, data, location(arguments.store or "store")))
    except SprueError as error:
        sys.exit(f"sprue {stage}: {error}")
    except KeyboardInterrupt:
        _end_interrupted(stage)


def _interrupt(stage: str, *_: Any) -> NoReturn:
    """Raises what Ctrl-C raises, and ends the stage even where a library swallows it."""
    watch = threading.Timer(GRACE, _end_interrupted, [stage])
    watch.daemon = True
    watch.start()
    raise KeyboardInterrupt


def _end_interrupted(stage: str) -> NoReturn:
    try:
        print(f"sprue {stage}: interrupted; the same command goes on from what is stored", file=sys.stderr, flush=True)
    finally:
        # Threads that wait for Ray would keep the process; its end is what ends their work on the cluster.
        os._exit(INTERRUPTED)


def read_params(path: Path) -> dict[str, Any]:
    """Reads the parameter file.

    Raises:
        SprueError: If it is missing, not YAML, or names no dataset.
    """
    try:
        params = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise SprueError(f"the parameter file {path} can't be read: {error}") from error
    if not isinstance(params, dict) or not params.get("dataset"):
        raise SprueError(f"the parameter file {path} names no dataset")
    return params
