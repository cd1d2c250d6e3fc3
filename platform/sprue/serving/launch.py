"""Starts and stops the scoring service on the Ray cluster that the process is connected to."""

import contextlib
import errno
import logging
import math
import socket
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import mlflow
import ray
import requests
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.schema import ApplicationStatus, LoggingConfig
from urllib3.exceptions import InsecureRequestWarning

from sprue.errors import SprueError
from sprue.serving.admission import AdmissionLimits
from sprue.serving.app import CLOSE_S, ScoringService, ServiceConfig
from sprue.serving.certificates import Certificate, served_certificate
from sprue.serving.champions import CacheSettings
from sprue.serving.coordinator import CoordinatorSettings, find_coordinator, require_champions, stop_coordinators
from sprue.serving.decision_log import DecisionLogSettings
from sprue.serving.hosts import AllowedHosts, is_loopback
from sprue.serving.keys import read_keys
from sprue.serving.parsing import ServiceLimits
from sprue.serving.rates import Rate
from sprue.tracking.webhook import read_secret

logger = logging.getLogger(__name__)

APPLICATION = "sprue"
STARTUP_S = 180.0
"""Time for the replicas to download, convert and load the champions."""

PROXY_GRACE_S = 5.0
"""Time for Ray Serve's proxy beyond the longest deadline."""

SHUTDOWN_S = 90.0
"""Time for Ray Serve to stop its replicas: it waits for their requests and last decisions."""


@dataclass(frozen=True)
class ServeSettings:
    """How champions are served.

    Attributes:
        host: The address to listen on; 0.0.0.0 for all.
        port: The port.
        limits: The largest request.
        admission: How many requests each replica takes on, and for how long.
        cache: How much memory loaded champions may take in each replica, and which stay.
        refresh_s: Seconds between two looks into the registry for new champions.
        replicas: Processes among which requests are distributed. Each loads champions by itself and reserves a CPU
            and, where there are GPUs, one or a fraction of one.
        keys: A file of keys, one of which each request needs; it is followed. Every node that runs a replica has it.
        without_keys: Serve everybody who reaches an address other than the loopback's.
        allowed_hosts: Names under which requests may come, besides the loopback's and the address.
        decisions: Where decisions are kept, and how long; nowhere if None.
        shadow: Fraction of the samples that challengers score, too, behind the answers; needs `decisions`.
        allow_empty: Start although the registry has no champion yet; the first is served when it is there.
        certificate: Speaks TLS under it, and answers under its names; plain HTTP if None. It is read once: another one
            needs another start.
        rate: How many requests a key without a rate of its own may make, or an address where there are no keys, of all
            replicas together; as many as admission takes on if None.
        access_log: Folder or s3 URL of the access log; nothing is logged if None.
        webhook_secret: File of the secret with which the tracking server signs its webhooks; none are taken if None.
            Every node that runs a replica has it.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    limits: ServiceLimits = field(default_factory=ServiceLimits)
    admission: AdmissionLimits = field(default_factory=AdmissionLimits)
    cache: CacheSettings = field(default_factory=CacheSettings)
    refresh_s: float = 15.0
    replicas: int = 1
    keys: Path | None = None
    without_keys: bool = False
    allowed_hosts: tuple[str, ...] = ()
    decisions: DecisionLogSettings | None = None
    shadow: float = 0.0
    allow_empty: bool = False
    certificate: Certificate | None = None
    rate: Rate | None = None
    access_log: str | None = None
    webhook_secret: Path | None = None

    def of_replica(self) -> ServiceConfig:
        """The settings of each replica, which follows MLflow's current tracking server."""
        names = self.certificate.names if self.certificate else ()
        return ServiceConfig(
            coordinator=CoordinatorSettings(mlflow.get_tracking_uri(), self.refresh_s, self.shadow > 0),
            limits=self.limits,
            admission=self.admission,
            cache=self.cache,
            keys=self.keys.resolve() if self.keys else None,
            hosts=AllowedHosts.of(self.host, [*self.allowed_hosts, *names]),
            decisions=self.decisions,
            shadow=self.shadow,
            allow_empty=self.allow_empty,
            rate=self.rate,
            access_log=self.access_log,
            webhook_secret=self.webhook_secret.resolve() if self.webhook_secret else None,
        )


def serve_champions(settings: ServeSettings) -> str:
    """Serves the champions of MLflow's current tracking server, and waits until the service is healthy.

    Returns the service's URL. A service that already runs on this cluster is replaced without downtime.

    Raises:
        SprueError: If others than this machine reach the address and there are no keys, the port is busy, the registry
            has no champions and may not be empty, or the service does not start.
    """
    running = _require_startable(settings)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        _deploy(settings)
        _wait_until_running()
        url = _url(settings.host, settings.port, settings.certificate)
        _wait_until_healthy(url)
    except BaseException:
        if not running:
            stop_serving()
        raise
    return url


def require_serving() -> None:
    """Checks that the cluster still has Ray Serve, which restarts what dies of the service by itself.

    Raises:
        SprueError: If it has not: the cluster's head has died, and another one knows nothing of the service; or this
            machine's node has died, without which the service is not watched.
    """
    here = ray.get_runtime_context().get_node_id()
    try:
        # Ray remembers the actor also where another head has taken the place of its own, which knows no such node.
        is_there = any(node["NodeID"] == here and node["Alive"] for node in ray.nodes())
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:
        is_there = False
    except ray.exceptions.RayError as error:  # a head that is only busy answers the next time
        logger.warning("Ray's head does not answer: %s", error)
        return
    if not is_there:
        raise SprueError("Ray has lost the scoring service: its head, or this machine's node, has died; start it again")


def _require_startable(settings: ServeSettings) -> bool:
    """Checks what can be checked before anything starts; says whether Ray Serve runs already."""
    host, port, certificate = settings.host, settings.port, settings.certificate
    require_keys(host, settings.keys, settings.without_keys)
    if settings.webhook_secret:
        read_secret(settings.webhook_secret)
    _warn(host, settings.keys, certificate)
    running = bool(serve.status().proxies)
    if running:
        _require_listening(host, port, certificate)
        # Ray Serve keeps the address that it was started with, which may be another than the loopback's.
        if _listens(node := ray.util.get_node_ip_address(), port):
            require_keys(node, settings.keys, settings.without_keys)
    else:
        require_free_port(host, port)
    if not settings.allow_empty:
        require_champions()
    return running


def _deploy(settings: ServeSettings) -> None:
    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    config, certificate, timeout_s = settings.of_replica(), settings.certificate, settings.admission.max_timeout_s
    find_coordinator(config.coordinator)  # it starts while Ray Serve does
    # Replicas keep the deadlines; the proxy ends what reaches none.
    http = HTTPOptions(
        host=settings.host,
        port=settings.port,
        request_timeout_s=timeout_s + PROXY_GRACE_S,
        ssl_keyfile=str(certificate.key) if certificate else None,
        ssl_certfile=str(certificate.chain) if certificate else None,
    )
    serve.start(http_options=http, logging_config=quiet)
    gpus = gpu_fraction(settings.replicas, int(ray.cluster_resources().get("GPU", 0)))
    options = {
        "num_replicas": settings.replicas,
        "ray_actor_options": {"num_cpus": 1, "num_gpus": gpus},
        # A replica that has answered its requests writes its last decisions.
        "graceful_shutdown_timeout_s": timeout_s + CLOSE_S + PROXY_GRACE_S,
    }
    service = ScoringService.options(**options).bind(config)  # type: ignore[attr-defined]
    target = serve.RunTarget(service, name=APPLICATION, route_prefix="/", logging_config=quiet)
    serve.run_many([target], wait_for_applications_running=False)


def gpu_fraction(replicas: int, gpus: int) -> float:
    """The GPUs that each replica reserves, so that all of them fit.

    >>> gpu_fraction(2, 0), gpu_fraction(2, 4), gpu_fraction(3, 2)
    (0.0, 1.0, 0.5)
    """
    return 1 / math.ceil(replicas / gpus) if gpus else 0.0


def stop_serving() -> None:
    """Stops the service and Ray Serve, if they run."""
    # `serve.shutdown` calls the controller, whose death ends the call. Since the controller allows retries, Ray then
    # reports a failed task that it would repeat. So the same call is made without retries. A controller that has just
    # died counts as unavailable until this process has learned of its death; only then is `serve.shutdown` silent.
    with contextlib.suppress(ValueError, ray.exceptions.ActorDiedError, ray.exceptions.GetTimeoutError):
        controller = ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
        deadline = time.monotonic() + SHUTDOWN_S
        while (left := deadline - time.monotonic()) > 0:
            with contextlib.suppress(ray.exceptions.ActorUnavailableError):
                ray.get(controller.graceful_shutdown.options(max_task_retries=0).remote(), timeout=left)
            time.sleep(0.05)
    stop_coordinators()
    serve.shutdown()  # closes this process's connection to the controller


def require_keys(host: str, keys: Path | None, without_keys: bool) -> None:
    """Checks that a service which others reach has keys, or is meant to have none.

    Raises:
        SprueError: If not, or if the file of keys can't be read.
    """
    if keys is not None:
        read_keys(keys)
    elif not (is_loopback(host) or without_keys):
        raise SprueError(
            f"everybody who reaches {host} could score: make a key with `sprue keys add NAME --scope score` and serve "
            "with --keys keys.json, or say --without-keys"
        )


def require_free_port(host: str, port: int) -> None:
    """Checks that this process can listen on an address.

    Raises:
        SprueError: If the port is out of range or in use, or the address is not this machine's.
    """
    if not 1 <= port <= 65535:
        raise SprueError(f"port {port} is not between 1 and 65535")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        # A port whose last connections are still closing counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise SprueError(f"port {port} of {host} is busy: stop its user, or choose another") from error
            raise SprueError(f"can't listen on {host}:{port}: {error}") from error


def _reachable(host: str) -> str:
    """An address to connect to what listens on `host`."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def _url(host: str, port: int, certificate: Certificate | None) -> str:
    name, scheme = _reachable(host), "https" if certificate else "http"
    return f"{scheme}://[{name}]:{port}" if ":" in name else f"{scheme}://{name}:{port}"


def _warn(host: str, keys: Path | None, certificate: Certificate | None) -> None:
    if certificate and certificate.warning:
        logger.warning("%s", certificate.warning)
    if keys and not certificate and not is_loopback(host):
        message = "keys travel in clear text to %s: give --tls-cert and --tls-key, or put a proxy with TLS in front"
        logger.warning(message, host)


def _require_listening(host: str, port: int, certificate: Certificate | None) -> None:
    if not _listens(_reachable(host), port):
        raise SprueError(
            f"Ray Serve already runs on this cluster, but not at {host}:{port}: give its address, or stop it first"
        )
    if served_certificate(_reachable(host), port) != (certificate.der if certificate else None):
        raise SprueError(
            f"Ray Serve already runs at {host}:{port}, with another certificate or without one: stop it first"
        )


def _listens(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=2.0).close()
    except OSError:
        return False
    return True


def _wait_until_running() -> None:
    deadline = time.monotonic() + STARTUP_S
    reported = ""
    while True:
        application = serve.status().applications[APPLICATION]
        if application.status == ApplicationStatus.RUNNING:
            return
        reasons = [application.message, *(each.message for each in application.deployments.values())]
        if application.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
            raise SprueError(f"the scoring service does not start: {_culprit(reasons)}")
        if any(reasons) and _culprit(reasons) != reported:
            reported = _culprit(reasons)
            logger.warning("%s", reported)
        if time.monotonic() > deadline:
            raise SprueError(f"the scoring service has not started in {STARTUP_S:.0f} s: {_culprit(reasons)}")
        time.sleep(0.2)


def _culprit(reasons: list[str]) -> str:
    """The line of Ray Serve's messages, usually tracebacks, that states the error."""
    lines = [line.strip() for reason in reasons for line in reason.splitlines() if line.strip()]
    own = [line.partition("SprueError: ")[2] for line in lines if "SprueError: " in line]
    return (own or lines or ["Ray Serve gives no reason; see its logs"])[-1]


def _wait_until_healthy(url: str) -> None:
    failure = ""
    for _ in range(50):
        try:
            # The certificate need not hold for this address, and only what strangers may know is asked.
            with warnings.catch_warnings(category=InsecureRequestWarning, action="ignore"):
                response = requests.get(f"{url}/readyz", timeout=5.0, verify=False)
            if response.status_code == 200:
                for reason in response.json().get("failures", {}).values():
                    logger.warning("not served: %s", reason)
                return
            failure = f"status {response.status_code}"
        except requests.RequestException as error:
            failure = type(error).__name__
        time.sleep(0.2)
    raise SprueError(f"the scoring service does not respond at {url}: {failure}; see Ray Serve's logs")
