"""What all stages share: arguments, settings, the connection to Ray, and how a stage ends.

A stage runs as a DVC stage in the checkout and as a Ray job in a copy of it alike: arguments say where data and store
are.
"""

import argparse
import gc
import importlib
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from upath import UPath

from sprue.config import DatasetSettings, FeatureSettings
from sprue.errors import SprueError
from sprue.features.spec_file import FILE, read_spec
from sprue.inference import memory
from sprue.inference.priority import lower_priority
from sprue.inference.spec import FeatureSpec
from sprue.params import PARAMS, read_dataset
from sprue.store import StoreError, location

logger = logging.getLogger(__name__)

STAGES = ("manifest", "features", "search", "fit", "evaluate", "register")
"""The stages, in the order of the data."""

IN_RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray sets this variable in the driver of a job."""

INTERRUPTED = 130
"""Exit status of a command that was ended with Ctrl-C."""

RAY_STARTS = 3
"""How often a Ray of this machine is started before it is given up."""

NODE_ENVIRONMENT = {
    # Workers fit and score in threads; see the module for what this is for.
    **memory.ENVIRONMENT,
    # Scoring shares the cores with other servers; what trains lowers its own priority.
    "RAY_worker_niceness": "0",
    # On a busy machine the proxy of Ray Serve needs more than the default of five seconds.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    # One that dies is replaced as soon as this is noticed.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    # Its errors, too, are JSON.
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "sprue.serving.proxy:middlewares",
    # Ray Train's controller polls every two seconds by default.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
}
"""What each node of Ray is started with: here, by the local stack, and in containers."""

GRACE_S = 5.0
"""Seconds from Ctrl-C until a stage that has not ended is ended."""


@dataclass(frozen=True)
class Context:
    """What a stage works on.

    Attributes:
        dataset: The dataset's name.
        settings: Its settings.
        data: Folder or URL of its images.
        store: Folder or URL of all results.
    """

    dataset: str
    settings: DatasetSettings
    data: UPath
    store: UPath

    @property
    def folder(self) -> UPath:
        """The dataset's part of the store."""
        return self.store / self.dataset

    @property
    def features(self) -> UPath:
        """Folder of the dataset's features."""
        return self.folder / "features"

    def backbone(self, spec: FeatureSpec) -> UPath:
        """The file of the backbone's weights, beside its features."""
        return self.features / spec.fingerprint / "backbone.safetensors"

    def feature_spec(self) -> FeatureSpec:
        """The feature spec that the features stage has resolved.

        Raises:
            SprueError: If it has not run with these settings.
        """
        spec = read_spec(self.features)
        if spec.model_dump(include=set(FeatureSettings.model_fields)) != self.settings.features.model_dump():
            raise SprueError(
                f"{self.features / FILE} was made with other settings of `features`; run the features stage again"
            )
        return spec


def connect_ray() -> None:
    """Connects to the cluster that ``$RAY_ADDRESS`` names, or starts one on this machine for this process.

    One that it starts listens on the loopback address alone.

    Raises:
        SprueError: If nothing answers at that address, or Ray does not start here.
    """
    from ray._private import ray_constants

    # gRPC warns of every fork beside its threads, which is harmless here.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    for name, value in NODE_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Stages print their own progress, and a worker's failure reaches them as an exception.
    settings: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if "RAY_ADDRESS" not in os.environ:
        settings["address"] = "local"
        # As on systems where Ray makes no clusters by default, its ports are the loopback's: that of the metrics asks
        # for no key. The constant is of this process, the variable of those that Ray starts.
        ray_constants.ENABLE_RAY_CLUSTER = False
        os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
        # Ray Train asks the dashboard which of its controllers are alive.
        settings["include_dashboard"] = True
        # A local machine is not preempted, and the watcher is one more process for each run of Ray Train.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    try:
        init_ray(**settings)
    except ConnectionError as error:
        raise SprueError(f"there is no Ray cluster at RAY_ADDRESS={os.environ.get('RAY_ADDRESS')}: {error}") from error


def init_ray(**settings: Any) -> None:
    """Calls `ray.init`, several times where a busy machine does not start Ray in the 30 s that it gives itself.

    Raises:
        SprueError: If it still has not started.
    """
    import ray
    from ray._private import auto_init_hook

    # Else a thread that outlives its Ray would start another, or end this process if it met one that is ending.
    auto_init_hook.enable_auto_connect = False
    for _ in range(RAY_STARTS):
        try:
            ray.init(**settings)
            return
        except Exception as error:  # Ray's has no class of its own
            if "timed out during startup" not in str(error):
                raise
            logger.warning("Ray has not started in its 30 s: this machine is busy; once more")
            _end_half_started(error)
    raise SprueError(f"Ray has not started in {RAY_STARTS} attempts of 30 s: this machine is busy; see /tmp/ray")


def _end_half_started(error: Exception) -> None:
    """Ends the processes of the node in whose making Ray failed, of which only the traceback knows."""
    from ray._private.node import Node

    for frame, _ in traceback.walk_tb(error.__traceback__):
        if isinstance(node := frame.f_locals.get("self"), Node):
            node.kill_all_processes(check_alive=False, allow_graceful=False)


def run_stage(stage: str, arguments: Sequence[str] | None = None) -> None:
    """Runs a stage as a command: a `SprueError` becomes one message and exit status 1.

    Args:
        stage: One of `STAGES`.
        arguments: Of the command; those of this process if None.
    """
    parser = argparse.ArgumentParser(prog=f"sprue stage {stage}")
    parser.add_argument("--dataset", help="name in the parameter file (default: the only one there)")
    parser.add_argument("--params", type=Path, default=PARAMS, help="parameter file (default: %(default)s)")
    parser.add_argument("--data", help="folder or s3 URL of the dataset (default: data/<dataset>)")
    parser.add_argument("--store", help="folder or s3 URL of all results (default: store; a Ray job has no default)")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if IN_RAY_JOB in os.environ:
        lower_priority()
    try:
        with ended_by_interrupt(stage):
            context = read_context(given.params, given.dataset, given.data, given.store)
            _import(f"sprue.stages.{stage}").main(context)
            # DVC reads the settings after the stage, and would take the new ones for those that were used.
            if read_dataset(given.params, context.dataset)[1] != context.settings:
                raise SprueError(f"the settings in {given.params} changed while the stage ran; run it again")
    except (SprueError, StoreError) as error:
        sys.exit(f"sprue {stage}: {error}")


def _import(name: str) -> ModuleType:
    """Imports a stage, after its settings are read: bad ones are reported before the seconds that Ray and torch take.

    What imports make stays. To look for garbage in it again and again would take a quarter of that time.
    """
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        gc.freeze()
        gc.enable()


def read_context(params: Path, dataset: str | None, data: str | None, store: str | None) -> Context:
    """What the arguments of a stage name.

    Raises:
        SprueError: If the settings are wrong, there is no such dataset, or a Ray job lacks a folder.
    """
    name, settings = read_dataset(params, dataset)
    if IN_RAY_JOB in os.environ and not (data and store):
        raise SprueError(
            "a Ray job runs in a copy of the checkout that is deleted afterwards; give --data and --store, paths that "
            "all nodes see or s3 URLs"
        )
    return Context(name, settings, location(data or f"data/{name}"), location(store or "store"))


@contextmanager
def ended_by_interrupt(command: str) -> Iterator[None]:
    """Ctrl-C ends the process, even where a library swallows it, with one message and the status `INTERRUPTED`."""
    previous = signal.signal(signal.SIGINT, partial(_interrupt, command))
    try:
        yield
    except KeyboardInterrupt:
        _end_interrupted(command)
    finally:
        signal.signal(signal.SIGINT, previous)


def _interrupt(stage: str, *_: Any) -> NoReturn:
    """Raises KeyboardInterrupt, and ends the stage even where a library swallows it."""
    watch = threading.Timer(GRACE_S, _end_interrupted, [stage])
    watch.daemon = True
    watch.start()
    raise KeyboardInterrupt


def _end_interrupted(stage: str) -> NoReturn:
    try:
        print(f"sprue {stage}: interrupted; the same command resumes from what is stored", file=sys.stderr, flush=True)
    finally:
        # Threads that wait for Ray would keep the process alive; its end ends their work on the cluster.
        os._exit(INTERRUPTED)
