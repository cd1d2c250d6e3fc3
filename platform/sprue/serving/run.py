"""Starts and stops the scoring service on the Ray cluster that the process is connected to."""

import errno
import logging
import math
import socket
import time

import mlflow
import ray
import requests
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.schema import ApplicationStatus, LoggingConfig

from sprue.errors import SprueError
from sprue.serving.app import ServiceConfig, build_app
from sprue.serving.lineup import require_champions
from sprue.serving.upload import ServiceLimits

logger = logging.getLogger(__name__)

APPLICATION = "sprue"
STARTUP_S = 180.0
"""How long replicas may take to fetch, convert and load the champions."""


def serve_champions(
    host: str = "127.0.0.1",
    port: int = 8000,
    limits: ServiceLimits | None = None,
    refresh_s: float = 15.0,
    replicas: int = 1,
) -> str:
    """Serves the champions of the tracking server that MLflow points to, and waits until they answer.

    A service that runs already on this cluster is replaced while it answers.

    Args:
        host: The address that is listened on: 0.0.0.0 for all.
        port: The port.
        limits: What a request may cost.
        refresh_s: How often the registry is asked for new champions, in seconds.
        replicas: How many processes share the requests; each reserves one CPU and, where there are GPUs, one or a
            share of one.

    Returns:
        The service's URL.

    Raises:
        SprueError: If the port is busy, the registry has no champions, or the service does not start.
    """
    running = bool(serve.status().proxies)
    if running:
        _require_listening(host, port)
    else:
        require_free_port(host, port)
    require_champions()
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    config = ServiceConfig(mlflow.get_tracking_uri(), limits or ServiceLimits(), refresh_s)
    try:
        serve.start(http_options=HTTPOptions(host=host, port=port), logging_config=quiet)
        target = serve.RunTarget(
            build_app(config, replicas, gpu_share(replicas, int(ray.cluster_resources().get("GPU", 0)))),
            name=APPLICATION,
            route_prefix="/",
            logging_config=quiet,
        )
        serve.run_many([target], wait_for_applications_running=False)
        _wait_until_running()
        url = _url(host, port)
        _wait_until_healthy(url)
    except BaseException:
        if not running:
            stop_serving()
        raise
    return url


def gpu_share(replicas: int, gpus: int) -> float:
    """What each replica reserves of a GPU, so that all of them find a place.

    >>> gpu_share(2, 0), gpu_share(2, 4), gpu_share(3, 2)
    (0.0, 1.0, 0.5)
    """
    return 1 / math.ceil(replicas / gpus) if gpus else 0.0


def stop_serving() -> None:
    """Stops the service, and Ray Serve with it."""
    serve.shutdown()


def require_free_port(host: str, port: int) -> None:
    """Makes sure that an address can be listened on.

    Raises:
        SprueError: If there is no such port, something else listens there, or the address is not this machine's.
    """
    if not 1 <= port <= 65535:
        raise SprueError(f"port {port} is none: give a number from 1 to 65535")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        # A port whose last connections are still closing is free; one that is listened on is not.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise SprueError(f"port {port} of {host} is busy: stop its user, or choose another port") from error
            raise SprueError(f"{host}:{port} can't be listened on: {error}") from error


def _reachable(host: str) -> str:
    """An address at which what listens on `host` is found."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def _url(host: str, port: int) -> str:
    name = _reachable(host)
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"


def _require_listening(host: str, port: int) -> None:
    try:
        socket.create_connection((_reachable(host), port), timeout=2.0).close()
    except OSError as error:
        raise SprueError(
            f"Ray Serve runs on this cluster already, and not at {host}:{port}: name its address, or stop it first"
        ) from error


def _wait_until_running() -> None:
    deadline = time.monotonic() + STARTUP_S
    told = ""
    while True:
        application = serve.status().applications[APPLICATION]
        if application.status == ApplicationStatus.RUNNING:
            return
        reasons = [application.message, *(each.message for each in application.deployments.values())]
        if application.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
            raise SprueError(f"the scoring service does not start: {_culprit(reasons)}")
        if any(reasons) and _culprit(reasons) != told:
            told = _culprit(reasons)
            logger.warning("%s", told)
        if time.monotonic() > deadline:
            raise SprueError(f"the scoring service has not started in {STARTUP_S:.0f} s: {_culprit(reasons)}")
        time.sleep(0.2)


def _culprit(reasons: list[str]) -> str:
    """The line of Serve's message, usually a traceback, that says what happened."""
    lines = [line.strip() for reason in reasons for line in reason.splitlines() if line.strip()]
    own = [line.partition("SprueError: ")[2] for line in lines if "SprueError: " in line]
    return (own or lines or ["Ray Serve gives no reason; see its logs"])[-1]


def _wait_until_healthy(url: str) -> None:
    failure = ""
    for _ in range(50):
        try:
            answer = requests.get(f"{url}/healthz", timeout=5.0)
            if answer.status_code == 200:
                for reason in answer.json()["failures"].values():
                    logger.warning("not served: %s", reason)
                return
            failure = f"status {answer.status_code}"
        except requests.RequestException as error:
            failure = type(error).__name__
        time.sleep(0.2)
    raise SprueError(f"the scoring service does not answer at {url}: {failure}; see Ray Serve's logs")
