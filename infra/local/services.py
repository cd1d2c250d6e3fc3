"""The services of the stack: how each is started, how it ends, and what it waits for."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from credentials import PEOPLE, give, machine_environment, write_private
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from ruamel.yaml import YAML
from settings import LOOPBACK, ROOT, Settings, StackError, program

from sprue.stages.runtime import NODE_ENVIRONMENT

POSTGRES_USER, PROXY_USER = "postgres", "www-data"
"""Postgres does not run as root, and the proxy's workers should not; where the stack does, they run as these."""
ARTIFACTS, BUCKET = "sprue-mlflow", "sprue"
"""Buckets: MLflow's files, and everybody else's."""
DRAIN_S = 150
"""How long the scoring service may take to answer its requests, write its decisions and end."""


@dataclass(frozen=True)
class Service:
    """A process that the supervisor keeps running.

    Attributes:
        name: Its name.
        address: Where it listens; empty if nobody has to know.
        command: Its command line.
        after: Services that have to answer before it is started; it ends before them.
        environment: Variables beside the supervisor's own.
        user: As whom it runs if the supervisor is root; None for root.
        stop_signal: What ends it in good order.
        stop_s: How long that may take.
    """

    name: str
    address: str
    command: tuple[str, ...]
    after: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    user: str | None = None
    stop_signal: str = "TERM"
    stop_s: int = 30


def all_services(settings: Settings, known: Mapping[str, str]) -> list[Service]:
    """In the order in which they are started."""
    folder, port, machines = settings.folder, settings.ports, machine_environment(settings, dict(known))
    postgres = (
        program("postgres"), "-D", f"{folder}/postgres", "-p", str(port["postgres"]), "-c",
        f"listen_addresses={LOOPBACK}", "-c", "unix_socket_directories=",
    )  # fmt: skip
    prometheus = (
        program("prometheus"), f"--config.file={folder}/conf/prometheus.yaml",
        f"--storage.tsdb.path={folder}/prometheus", "--storage.tsdb.retention.time=30d",
        f"--web.listen-address={settings.address('prometheus')}", f"--web.external-url={settings.url}/prometheus",
        "--web.route-prefix=/prometheus", "--log.level=warn",
    )  # fmt: skip
    head, workers = ("ray-head",), ("ray-worker-1", "ray-worker-2")
    s3 = {name: machines[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    services = [
        # A fast shutdown, which does not wait for clients.
        Service("postgres", settings.address("postgres"), postgres, user=POSTGRES_USER, stop_signal="INT"),
        Service("seaweedfs", settings.address("s3"), _seaweedfs(settings), environment=s3),
        Service("ray-head", settings.address("ray_dashboard"), _ray_head(settings), environment=_ray(settings, known)),
        Service("prometheus", settings.address("prometheus"), prometheus),
        Service("proxy", settings.listen, (program("nginx"), "-c", f"{folder}/conf/nginx.conf",
                "-e", "stderr"), stop_signal="QUIT"),
        Service("mlflow", settings.address("mlflow"), _mlflow(settings), ("postgres", "seaweedfs"),
                _mlflow_environment(settings, known)),
        # In turn: of two nodes that join at once, one waits for the head in vain, and starts anew after 30 s.
        *(Service(name, "", _ray_worker(settings, number), after, _ray(settings, known))
          for number, (name, after) in enumerate(zip(workers, (head, workers[:1]), strict=True), 1)),
        Service("scoring", settings.address("scoring"), _scoring(settings), ("mlflow", *workers),
                _ray(settings, known) | {"RAY_ADDRESS": settings.address("ray"), "RAY_LOGGING_CONFIG_ENCODING": "JSON"},
                stop_s=DRAIN_S),
    ]  # fmt: skip
    if grafana_home() is not None:
        services.insert(4, Service("grafana", settings.address("grafana"), _grafana(settings)))
    return services


def _command(settings: Settings, service: Service) -> tuple[str, ...]:
    """What the supervisor starts; a service that was killed ends what it has left first.

    Postgres' processes end with their first one, and its user may not look into this folder.
    """
    if service.user:
        return service.command
    start = (sys.executable, "-I", "-S", str(Path(__file__).parent / "start.py"))
    return (*start, str(settings.sockets / f"{service.name}.group"), service.stop_signal, *service.command)


def grafana_home() -> Path | None:
    """Where Grafana's package is installed, if it is."""
    home = Path("/usr/share/grafana")
    return home if (home / "bin" / "grafana").exists() else None


def _own(name: str) -> str:
    """A program of this virtual environment."""
    return str(Path(sys.executable).parent / name)


def _seaweedfs(settings: Settings) -> tuple[str, ...]:
    port, data = settings.ports, settings.folder / "s3"
    names = ("master", "volume", "filer")
    return (
        _own("weed"), f"-config_dir={settings.folder}/conf", "server", f"-dir={data}", "-s3", f"-ip={LOOPBACK}",
        f"-ip.bind={LOOPBACK}", "-master.telemetry=false", "-volume.max=1000", "-master.volumeSizeLimitMB=64",
        "-volume.preStopSeconds=1", "-s3.port.iceberg=0", "-s3.port.lance=0", f"-s3.port={port['s3']}",
        f"-s3.port.grpc={port['s3_grpc']}", f"-filer.localSocket={settings.sockets}/filer.sock",
        f"-s3.localSocket={settings.sockets}/s3.sock",
        *(f"-{name}.port={port[f's3_{name}']}" for name in names),
        *(f"-{name}.port.grpc={port[f's3_{name}_grpc']}" for name in names),
    )  # fmt: skip


def _mlflow(settings: Settings) -> tuple[str, ...]:
    return (
        _own("mlflow"), "server", "--app-name", "basic-auth", "--host", LOOPBACK, "--port",
        str(settings.ports["mlflow"]), "--artifacts-destination", f"s3://{ARTIFACTS}", "--workers", "2",
        # uvicorn kills a worker that has not answered it for five seconds: on a busy machine both, again and again.
        "--uvicorn-opts", "--timeout-worker-healthcheck 60",
        "--cors-allowed-origins", ",".join(f"https://{name}:{settings.port}" for name in settings.names),
    )  # fmt: skip


def _mlflow_environment(settings: Settings, known: Mapping[str, str]) -> dict[str, str]:
    """Passwords are in the environment and in files, where other users do not see them."""
    machines = machine_environment(settings, dict(known))
    return {name: value for name, value in machines.items() if name.startswith("AWS_")} | {
        "MLFLOW_S3_ENDPOINT_URL": machines["AWS_ENDPOINT_URL"],
        "MLFLOW_BACKEND_STORE_URI": database_uri(settings, known, "mlflow"),
        "MLFLOW_AUTH_CONFIG_PATH": f"{settings.folder}/conf/mlflow.ini",
        "MLFLOW_AUTH_ADMIN_USERNAME": PEOPLE,
        "MLFLOW_AUTH_ADMIN_PASSWORD": known["people"],
        "MLFLOW_FLASK_SERVER_SECRET_KEY": known["mlflow_session"],
        # MLflow's jobs evaluate language models; the server would start nine processes for them.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }


def database_uri(settings: Settings, known: Mapping[str, str], name: str) -> str:
    """Of a database, for SQLAlchemy."""
    return f"postgresql+psycopg://sprue:{known['postgres']}@{settings.address('postgres')}/{name}"


def _ray(settings: Settings, known: Mapping[str, str]) -> dict[str, str]:
    """The environment of Ray's nodes, and so of the jobs."""
    return (
        machine_environment(settings, dict(known))
        | NODE_ENVIRONMENT
        | {
            "RAY_USAGE_STATS_ENABLED": "0",
            # One machine is not preempted, and the watcher is a process for each run of Ray Train.
            "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
            "DASHBOARD_METRIC_PORT": str(settings.ports["ray_dashboard_metrics"]),
            "RAY_PROMETHEUS_HOST": f"http://{settings.address('prometheus')}/prometheus",
            "RAY_GRAFANA_HOST": f"http://{settings.address('grafana')}/grafana" if grafana_home() else "DISABLED",
            "RAY_GRAFANA_IFRAME_HOST": f"{settings.url}/grafana",
            "RAY_GRAFANA_DASHBOARD_OUTPUT_DIR": f"{settings.folder}/conf/grafana/boards",
        }
    )


def _ray_node(settings: Settings, node: str, cpus: int) -> tuple[str, ...]:
    port = settings.ports
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return (
        sys.executable, str(Path(__file__).parent / "ray_node.py"), "start", "--block", f"--node-ip-address={LOOPBACK}",
        f"--num-cpus={cpus}", f"--dashboard-agent-listen-port={port[f'{node}_agent']}",
        f"--dashboard-agent-grpc-port={port[f'{node}_agent_grpc']}",
        f"--runtime-env-agent-port={port[f'{node}_runtime_env']}", f"--metrics-export-port={port[f'{node}_metrics']}",
        f"--node-manager-port={port[f'{node}_manager']}", f"--object-manager-port={port[f'{node}_objects']}",
        "--min-worker-port=0", "--max-worker-port=0", f"--object-store-memory={max(memory // 10, 10**8)}",
        "--include-log-monitor=false",
    )  # fmt: skip


def _ray_head(settings: Settings) -> tuple[str, ...]:
    """A head that runs no work: jobs' drivers, Ray's dashboard and Ray Serve's proxy alone."""
    port = settings.ports
    return (
        *_ray_node(settings, "head", 0), "--head", "--num-gpus=0", f"--port={port['ray']}", "--include-dashboard=true",
        f"--dashboard-host={LOOPBACK}", f"--dashboard-port={port['ray_dashboard']}",
        f"--ray-client-server-port={port['ray_client']}", "--no-monitor", f"--temp-dir={settings.sockets}/ray",
    )  # fmt: skip


def _ray_worker(settings: Settings, number: int) -> tuple[str, ...]:
    """Half of the cores; GPUs, which Ray can't divide among nodes of one machine, are the first worker's."""
    cpus = ((os.cpu_count() or 1) + 1) // 2
    node = _ray_node(settings, f"worker{number}", cpus)
    return (
        *node, f"--address={settings.address('ray')}", f"--node-name=worker-{number}",
        *(("--num-gpus=0",) if number > 1 else ()),
    )  # fmt: skip


def _scoring(settings: Settings) -> tuple[str, ...]:
    hosts = [word for name in settings.names for word in ("--allowed-host", name)]
    return (
        _own("sprue"), "--store", f"s3://{BUCKET}/store", "serve", "--port", str(settings.ports["scoring"]), "--keys",
        f"{settings.folder}/keys.json", "--allow-empty", *hosts,
    )  # fmt: skip


def _grafana(settings: Settings) -> tuple[str, ...]:
    home = grafana_home()
    return (f"{home}/bin/grafana", "server", f"--homepath={home}", f"--config={settings.folder}/conf/grafana.ini")


def make_database(settings: Settings, known: Mapping[str, str]) -> None:
    """Makes Postgres' cluster and MLflow's two databases, if there are none; nothing listens meanwhile.

    Raises:
        StackError: If Postgres can't.
    """
    data, root, password = settings.folder / "postgres", os.geteuid() == 0, settings.sockets / "password"
    if (data / "sprue-made").exists():
        return
    if data.exists():  # interrupted before it was complete
        shutil.rmtree(data)
    data.mkdir(mode=0o700)
    give(data, POSTGRES_USER)

    def run(command: list[str], words: str = "") -> None:
        user = {"user": POSTGRES_USER, "group": POSTGRES_USER} if root else {}
        done = subprocess.run(command, cwd="/", input=words, capture_output=True, text=True, **user)  # type: ignore[call-overload]
        if done.returncode:
            raise StackError(f"{Path(command[0]).name} failed: {done.stderr.strip() or done.stdout.strip()}")

    try:
        run(["test", "-w", str(data)])
    except StackError as error:
        reason = f"the user {POSTGRES_USER}, as which Postgres runs, can't reach {data}; name a folder with --folder"
        raise StackError(reason) from error
    write_private(password, known["postgres"])
    give(password, POSTGRES_USER)
    settings.sockets.chmod(0o711 if root else 0o700)
    try:
        run([program("initdb"), "-D", str(data), "-U", "sprue", "--auth=scram-sha-256", f"--pwfile={password}"])
    finally:
        password.unlink()
    run([program("postgres"), "--single", "-D", str(data), "postgres"],
        "CREATE DATABASE mlflow;\nCREATE DATABASE mlflow_auth;\n")  # fmt: skip
    (data / "sprue-made").touch()


def write_configurations(settings: Settings, services: list[Service], known: Mapping[str, str]) -> None:
    """Renders the templates beside this file, and those of infra/prometheus and infra/grafana."""
    conf, root = settings.folder / "conf", os.geteuid() == 0
    templates = Environment(loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True)
    values = {
        "settings": settings,
        "folder": settings.folder,
        "services": services,
        "command": lambda service: shlex.join(_command(settings, service)).replace("%", "%%"),
        "full_disk": shlex.join(
            (sys.executable, str(Path(__file__).parent / "full_disk.py"), str(settings.folder))
        ).replace("%", "%%"),
        "quote": lambda value: json.dumps(str(value)).replace("%", "%%"),
        "root": root,
        "proxy_user": PROXY_USER if root else None,
        "ray_token": known["ray"],
        "people": PEOPLE,
        "password": known["people"],
        "has_grafana": grafana_home() is not None,
        "s3_signing": known["s3_signing"],
        "mlflow_auth": database_uri(settings, known, "mlflow_auth"),
    }
    for name in ("supervisord.conf", "nginx.conf", "mlflow.ini", "grafana.ini", "security.toml"):
        write_private(conf / name, templates.get_template(name).render(values))
    for name in ("people", "mlflow"):
        give(conf / f"{name}.htpasswd", PROXY_USER)
    prometheus = YAML(typ="safe").load(ROOT / "infra/prometheus/prometheus.yaml")
    prometheus["rule_files"] = [str(ROOT / "infra/prometheus/alerts.yaml")]
    discovery = {"files": [f"{settings.sockets}/ray/prom_metrics_service_discovery.json"]}
    prometheus["scrape_configs"][0]["file_sd_configs"] = [discovery]
    _write_yaml(conf / "prometheus.yaml", prometheus)
    for kind in ("datasources", "dashboards"):
        (conf / "grafana" / "provisioning" / kind).mkdir(parents=True, exist_ok=True)
    boards = conf / "grafana" / "boards"
    boards.mkdir(exist_ok=True)
    for board in (ROOT / "infra/grafana").glob("*.json"):
        shutil.copy(board, boards)
    source = YAML(typ="safe").load(ROOT / "infra/grafana/datasource.yaml")
    source["datasources"][0]["url"] = f"http://{settings.address('prometheus')}/prometheus"
    _write_yaml(conf / "grafana/provisioning/datasources/datasource.yaml", source)
    provider = YAML(typ="safe").load(ROOT / "infra/grafana/dashboards.yaml")
    provider["providers"][0]["options"]["path"] = str(boards)
    _write_yaml(conf / "grafana/provisioning/dashboards/dashboards.yaml", provider)


def _write_yaml(path: Path, value: object) -> None:
    with path.open("w") as file:
        YAML().dump(value, file)
