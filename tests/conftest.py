"""What several packages' tests share: a cache of their own, an object store (SeaweedFS) and a Ray cluster."""

import os

# Test files run side by side: threads that wait by spinning would take the cores from one another. Read by libraries
# when they are imported, and by every process that a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
# As on every cluster of one machine that sprue starts: it is not preempted, and the watcher is a process for each run.
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")
# A driver that leaves a Ray goes on to send its metrics; where many Rays follow one another, it may die of SIGSEGV.
os.environ.setdefault("RAY_enable_metrics_collection", "0")
# Ray's workers would otherwise wait for every other test: Ray gives them the lowest priority but four.
os.environ.setdefault("RAY_worker_niceness", "0")
# Else each of the many processes that tests start would compile all of sprue anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import contextlib
import gc
import json
import logging
import random
import secrets
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import ray
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from sprue.stages.runtime import init_ray

S3_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "sprue",
    "AWS_SECRET_ACCESS_KEY": "sprue-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
}
"""Credentials of `s3_server`, as boto3, s3fs and DVC read them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the files that use Ray first: they take longest, and none is to be left for one process at the end."""
    on_ray = {item.path for item in items if {"ray_head", "cluster"}.intersection(getattr(item, "fixturenames", ()))}
    items.sort(key=lambda item: item.path not in on_ray)


def pytest_collection() -> None:
    """Does not look for garbage among modules and tests, which stay: that would take half of the collection's time."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Looks for garbage again, but not in what was collected."""
    gc.freeze()
    gc.enable()


DIED = pytest.StashKey[bool]()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Remembers that one of the processes that run tests has died; the tests that it was to run were not run."""
    node.config.stash[DIED] = node.config.stash.get(DIED, False) or bool(error)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Ends with another status than that of tests that failed, for these alone are run once more."""
    if session.config.stash.get(DIED, False):
        session.exitstatus = pytest.ExitCode.INTERRUPTED


@pytest.fixture(autouse=True)
def log_levels() -> None:
    """Sets Python's own levels again: commands that tests call in their process have others."""
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("sprue").setLevel(logging.NOTSET)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Converted backbones and fetched models of all processes of a session; the user's own cache is left alone."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPRUE_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> dict[str, str]:
    """A user's environment: nothing of this machine's but the path, and the session's caches."""
    folder = tmp_path_factory.mktemp("user")
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("AWS_", "MLFLOW_", "PYTHON", "RAY_", "SPRUE_"))
    }
    user = {f"GIT_{role}_{part}": "test@example.org" for role in ("AUTHOR", "COMMITTER") for part in ("NAME", "EMAIL")}
    return kept | user | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "DVC_SITE_CACHE_DIR": str(folder / "dvc"),
        "DVC_NO_ANALYTICS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        "RAY_worker_niceness": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "SPRUE_CACHE": str(cache),
    }  # fmt: skip


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a Ray of two cores, for one module; the dashboard answers Ray Train's questions."""
    init_ray(address="local", num_cpus=2, include_dashboard=True, log_to_driver=False, logging_level="ERROR")
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture(scope="session")
def panels() -> Callable[[str, str], dict[str, list[str]]]:
    """The queries of each panel of a board in ``infra/grafana``, of all datasets and models, with a rate's interval."""

    def queries(board: str, interval: str) -> dict[str, list[str]]:
        text = (Path(__file__).parents[1] / "infra" / "grafana" / board).read_text()
        for variable, value in (("$__rate_interval", interval), ("$dataset", ".*"), ("$model", ".*")):
            text = text.replace(variable, value)
        return {panel["title"]: [target["expr"] for target in panel["targets"]] for panel in json.loads(text)["panels"]}

    return queries


@pytest.fixture(scope="session")
def ports() -> Callable[[int], list[int]]:
    """Finds ports; see `free_ports`."""
    return free_ports


def _own_ports() -> list[int]:
    """Ports that neither the kernel nor Ray gives away by itself, and that no other process of these tests takes."""
    kernels_lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    ports = range(20_000, kernels_lowest)[worker :: int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))]
    return random.SystemRandom().sample(ports, len(ports))


OWN_PORTS = iter(_own_ports())


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on, each found once."""
    free: list[int] = []
    while len(free) < count:
        port = next(OWN_PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            free.append(port)
    return free


def _command(folder: Path) -> tuple[list[str], str]:
    """The server's command line, and its endpoint."""
    services = ("master", "volume", "filer", "s3")
    ports = iter(free_ports(2 * len(services)))
    listen = {service: (next(ports), next(ports)) for service in services}
    command = [
        str(Path(sys.executable).parent / "weed"),
        "server",
        f"-dir={folder}",
        "-s3",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        "-master.telemetry=false",
        # Every bucket takes several volumes.
        "-volume.max=1000",
        "-master.volumeSizeLimitMB=64",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        f"-filer.localSocket={folder}/filer.sock",
        f"-s3.localSocket={folder}/s3.sock",
        *(f"-{service}.port={http}" for service, (http, _) in listen.items()),
        *(f"-{service}.port.grpc={grpc}" for service, (_, grpc) in listen.items()),
    ]
    return command, f"http://127.0.0.1:{listen['s3'][0]}"


def s3_client(endpoint: str):
    """A client that gives up soon."""
    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id=S3_ENVIRONMENT["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=S3_ENVIRONMENT["AWS_SECRET_ACCESS_KEY"],
        region_name=S3_ENVIRONMENT["AWS_DEFAULT_REGION"],
        config=Config(connect_timeout=1, read_timeout=5, retries={"max_attempts": 0}),
    )


def _wait_until_it_stores(server: subprocess.Popen[bytes], endpoint: str, log: Path) -> None:
    """Waits for a put to work: the gateway answers before a volume can take anything."""
    client = s3_client(endpoint)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and server.poll() is None:
        try:
            client.create_bucket(Bucket="probe")
            client.put_object(Bucket="probe", Key="probe", Body=b"probe")
            return
        except (BotoCoreError, ClientError):
            time.sleep(0.2)
    pytest.fail(f"the S3 server did not start:\n{log.read_text()[-3000:]}")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The endpoint's URL; `S3_ENVIRONMENT` holds the credentials. Bucket names have at least three characters."""
    folder = tmp_path_factory.mktemp("s3")
    log = folder.parent / "s3.log"
    command, endpoint = _command(folder)
    environment = os.environ | {name: S3_ENVIRONMENT[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output, env=environment) as server:
        try:
            _wait_until_it_stores(server, endpoint, log)
            yield endpoint
        finally:
            server.kill()  # a graceful stop takes ten seconds, and nothing is kept


@pytest.fixture
def s3_bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty bucket's name; for the test, the environment leads every S3 library to the server."""
    for name, value in ({"AWS_ENDPOINT_URL": s3_server} | S3_ENVIRONMENT).items():
        monkeypatch.setenv(name, value)
    bucket = f"test-{uuid.uuid4().hex[:12]}"
    s3_client(s3_server).create_bucket(Bucket=bucket)
    return bucket
