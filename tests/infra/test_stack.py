"""The local stack, brought up once: the whole way from images under DVC to a score through the proxy."""

import contextlib
import itertools
import json
import random
import re
import shlex
import shutil
import socket
import ssl
import stat
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import psutil
import pytest
import requests
from PIL import Image, ImageDraw
from ray.job_submission import JobSubmissionClient
from ruamel.yaml import YAML
from skimage import data

ROOT = Path(__file__).parents[2]
CLASS_NAME = "tiny.brick"
STAGES = ("manifest", "features", "search", "fit", "evaluate", "register")
SERVICES = {
    "postgres",
    "seaweedfs",
    "ray-head",
    "ray-worker-1",
    "ray-worker-2",
    "mlflow",
    "scoring",
    "prometheus",
    "proxy",
}
SETTINGS = {
    "manifest": {"calibration": 0.2, "validation": 0.1},
    "features": {"blocks": [2, 3], "scales": [1.0], "input_size": 128},
    "flow": {"adapted": 32, "bottleneck": 16, "steps": 1},
    "fit": {"epochs": 2},
    "search": {"trials": 0},
    "calibration": {"alpha": 0.2},
}


@dataclass
class Stack:
    """A stack in a folder of its own."""

    folder: Path
    base: int
    environment: dict[str, str]
    client: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"https://localhost:{self.base + 70}"

    def run(self, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """``make up``, ``down`` or ``status``."""
        return self.shell(sys.executable, "infra/local/stack.py", command, "--folder", str(self.folder), *arguments)

    def up(self) -> subprocess.CompletedProcess[str]:
        done = self.run("up", "--port", str(self.base + 70), "--base", str(self.base))
        assert done.returncode == 0, done.stdout + done.stderr + self.logs()
        lines = (self.folder / "client.env").read_text().splitlines()
        self.client = dict(line.removeprefix("export ").replace("'", "").split("=", 1) for line in lines)
        return done

    def logs(self) -> str:
        return "".join(f"\n{log.name}:\n{log.read_text()[-1000:]}" for log in (self.folder / "log").glob("*.log"))

    def shell(self, *command: str, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
        """Runs a command as a user of this machine does who has read client.env."""
        environment = self.environment | self.client | variables
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)

    def secret(self, name: str) -> str:
        return json.loads((self.folder / "secrets.json").read_text())[name]

    def get(self, path: str, **arguments) -> requests.Response:
        """Asks the proxy, whose certificate is checked."""
        arguments.setdefault("allow_redirects", False)
        return requests.get(self.url + path, verify=self.client["SPRUE_CA"], timeout=60, **arguments)

    def query(self, expression: str) -> list[dict]:
        """Asks Prometheus, as a person does."""
        answer = self.get(
            "/prometheus/api/v1/query", params={"query": expression}, auth=("admin", self.secret("people"))
        )
        assert answer.status_code == 200, f"{expression}: {answer.text}"
        return answer.json()["data"]["result"]

    def processes(self) -> list[psutil.Process]:
        supervisor = psutil.Process(int((self.folder / "supervisord.pid").read_text()))
        return [supervisor, *supervisor.children(recursive=True)]


def free_base() -> int:
    """The first of some ports that nothing listens on, below those that the other tests take."""
    for base in random.SystemRandom().sample(range(12_000, 19_900, 72), 109):
        with_all = []
        try:
            for port in range(base, base + 72):
                probe = socket.socket()
                with_all.append(probe)
                probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        finally:
            for probe in with_all:
                probe.close()
        return base
    pytest.fail("there are no 72 free ports side by side")


@pytest.fixture(scope="module")
def stack(environment):
    """The stack, up."""
    folder = Path(tempfile.mkdtemp(prefix="stack-"))
    folder.chmod(0o711)  # for Postgres and the proxy, which run as users of their own if this is root
    variables = environment | {
        "PYTHONPATH": f"{ROOT}/platform:{ROOT}/models",
        "RAY_metrics_report_interval_ms": "1000",
        "SPRUE_COMMIT": "0" * 40,
    }
    found = Stack(folder / "stack", free_base(), variables)
    try:
        found.up()
        yield found
    finally:
        found.run("down")
        shutil.rmtree(folder)


def write_images(folder: Path, places: dict[str, int], seed: int) -> None:
    """Crops of a photograph; those of a folder ``spot`` with a white spot."""
    rng, photograph = np.random.default_rng(seed), data.brick()
    for place, count in places.items():
        (folder / place).mkdir(parents=True)
        for number in range(count):
            top, left = rng.integers(0, photograph.shape[0] - 96, 2)
            image = Image.fromarray(photograph[top : top + 96, left : left + 96])
            if place.endswith("spot"):
                ImageDraw.Draw(image).ellipse((30, 30, 50, 50), fill=255)
            image.save(folder / place / f"{number:03}.png")


@pytest.fixture(scope="module")
def champion(stack, tmp_path_factory):
    """The data in DVC with the stack as its remote; another clone gets it, and the stages run on it as jobs."""
    folder = tmp_path_factory.mktemp("repository")
    write_images(folder / "first/data/tiny/brick", {"train/good": 30, "test/good": 4, "test/spot": 4}, seed=0)
    write_images(folder / "unseen", {"good": 24, "spot": 24}, seed=1)

    def run(clone, *command):
        done = stack.shell(*command, cwd=folder / clone)
        assert done.returncode == 0, f"{shlex.join(command)}:\n{done.stdout}{done.stderr}"

    for command in (
        "git init --quiet", "dvc init --quiet", "dvc remote add --default stack s3://sprue/dvc",
        f"dvc remote modify stack endpointurl {stack.client['AWS_ENDPOINT_URL']}", "dvc add --quiet data/tiny",
        "git add .", "git commit --quiet -m images", "dvc push --quiet", f"git clone --quiet . {folder}/second",
    ):  # fmt: skip
        run("first", *command.split())
    run("second", "dvc", "pull", "--quiet")
    params = YAML(typ="safe").load(ROOT / "models/recipes/patchflow-cpu.yaml")
    for section, values in SETTINGS.items():
        params.setdefault(section, {}).update(values)
    YAML().dump({"datasets": {"tiny": params}}, folder / "params.yaml")
    jobs = JobSubmissionClient(
        f"{stack.url}/ray", headers={"Authorization": f"Bearer {stack.secret('ray')}"}, verify=stack.client["SPRUE_CA"]
    )
    runtime_env = YAML(typ="safe").load(ROOT / "infra/ray/runtime_env.yaml") | {"working_dir": str(ROOT)}
    for stage in STAGES:
        entrypoint = ["python", f"pipelines/{stage}.py", *arguments(folder, "params.yaml")]
        job = jobs.submit_job(entrypoint=shlex.join(entrypoint), runtime_env=dict(runtime_env))
        while not (status := jobs.get_job_status(job)).is_terminal():
            time.sleep(0.2)
        assert status == "SUCCEEDED", jobs.get_job_logs(job)
    return folder


def arguments(folder: Path, params: str) -> list[str]:
    """Of a stage: the images of the second clone, and the store on S3."""
    return [
        "--params", f"{folder}/{params}", "--data", f"{folder}/second/data/tiny", "--store", "s3://sprue/store",
    ]  # fmt: skip


def test_it_is_up_and_says_so(stack):
    status = stack.run("status")
    assert status.returncode == 0, status.stdout
    rows = dict(line.split(None, 1) for line in status.stdout.splitlines()[1:])
    assert rows.keys() - {"grafana"} == SERVICES
    assert all(row.startswith("running") for row in rows.values())
    again = stack.run("up")
    assert again.returncode == 0 and "running" not in again.stderr


def test_secrets_are_their_owners_alone(stack):
    private = ("secrets.json", "keys.json", "first.key", "ray.token", "client.env", "tls/ca.key", "tls/proxy.key")
    rendered = ("supervisord.conf", "nginx.conf", "mlflow.ini", "security.toml", "people.htpasswd", "mlflow.htpasswd")
    for name in (*private, *(f"conf/{each}" for each in rendered)):
        assert stat.S_IMODE((stack.folder / name).stat().st_mode) == 0o600, name
    known = json.loads((stack.folder / "secrets.json").read_text())
    assert len(set(known.values())) == len(known) and all(len(each) == 48 for each in known.values())
    commands = [" ".join(process.cmdline()) for process in stack.processes()]
    assert not [command for command in commands for each in known.values() if each in command]


def test_a_first_key_that_was_revoked_is_named_and_another_made(stack):
    keys = str(stack.folder / "keys.json")
    removed = stack.shell("sprue", "--store", "s3://sprue/store", "keys", "remove", "first", "--keys", keys)
    assert removed.returncode == 0, removed.stderr
    status = stack.run("status")
    assert status.returncode == 1
    assert "first.key has no valid key" in status.stdout
    (stack.folder / "first.key").unlink()
    stack.up()
    assert stack.run("status").returncode == 0
    assert stack.get("/v1/classes", headers={"Authorization": f"Bearer {stack.client['SPRUE_KEY']}"}).status_code == 200


def test_certificates_are_renewed_while_the_stack_runs(stack, local):
    settings = local("settings").Settings.read(stack.folder)
    pids = {name: service_pid(stack, name) for name in ("proxy", "seaweedfs")}
    for name in ("proxy", "s3"):
        (stack.folder / "tls" / f"{name}.pem").unlink()
    local("certificates").make_certificates(settings, datetime.now(UTC) - timedelta(days=380))
    status = stack.run("status")
    assert status.returncode == 0
    assert all(re.search(rf"{name}\.pem ends on .*: `make up` renews it", status.stdout) for name in ("proxy", "s3"))
    stack.up()
    for _ in range(100):  # nginx's new workers take over
        served = ssl.get_server_certificate(("localhost", settings.port))
        if served.strip() == (stack.folder / "tls/proxy.pem").read_text().strip():
            break
        time.sleep(0.1)
    else:
        pytest.fail("the proxy has not read its new certificate")
    assert service_pid(stack, "proxy") == pids["proxy"]
    assert service_pid(stack, "seaweedfs") != pids["seaweedfs"]
    assert "ends on" not in stack.run("status").stdout
    assert stack.get("/livez", headers={"X-Request-Id": "renewed"}).status_code == 200
    assert logged(stack, "renewed")["path"] == "/livez"


def service_pid(stack, service):
    """The process that the supervisor has started."""
    return int(stack.shell("supervisorctl", "-c", f"{stack.folder}/conf/supervisord.conf", "pid", service).stdout)


PORT = re.compile(r"^\| (\d+) \|", re.MULTILINE)


def listening(stack) -> dict[int, set[str]]:
    """Addresses by their ports."""
    found: dict[int, set[str]] = {}
    for process in stack.processes():
        with contextlib.suppress(psutil.NoSuchProcess):  # a job's may end meanwhile
            for each in process.net_connections("tcp"):
                if each.status == psutil.CONN_LISTEN:
                    found.setdefault(each.laddr.port, set()).add(each.laddr.ip)
    return found


def test_nothing_listens_beyond_the_loopback_and_every_port_is_in_the_documentation(stack, champion):
    found = listening(stack)
    assert len(found) > 30
    assert {address for addresses in found.values() for address in addresses} <= {"127.0.0.1", "::ffff:127.0.0.1"}
    documented = {int(port) for port in PORT.findall((ROOT / "docs/how-to/stack.md").read_text())}
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    own = {port - stack.base + 21_000 for port in found if port < lowest}
    assert own - {21_070} == documented - {8443}
    assert 21_070 in own


PEOPLE, MACHINES, NOBODY = "people", "machines", ""


@pytest.mark.parametrize(
    ("path", "login", "status"),
    [
        ("/", NOBODY, 200),
        ("/livez", NOBODY, 200),
        ("/v1/classes", NOBODY, 401),
        ("/v1/classes", PEOPLE, 401),
        ("/mlflow/", NOBODY, 401),
        ("/mlflow/", PEOPLE, 200),
        ("/mlflow/health", NOBODY, 200),
        ("/mlflow/api/2.0/mlflow/experiments/get?experiment_id=0", MACHINES, 200),
        ("/ray/", NOBODY, 401),
        ("/ray/", PEOPLE, 200),
        ("/ray/api/jobs/", MACHINES, 401),
        ("/prometheus/classic/alerts", NOBODY, 401),
        ("/prometheus/classic/alerts", PEOPLE, 200),
        ("/prometheus/classic/alerts", MACHINES, 401),
        ("/grafana/", NOBODY, 401),
    ],
)
def test_people_log_in_and_machines_have_keys(stack, path, login, status):
    auth = {PEOPLE: ("admin", stack.secret("people")), MACHINES: ("sprue", stack.secret("machines")), NOBODY: None}
    assert stack.get(path, auth=auth[login]).status_code == status
    if login and status == 200:
        assert stack.get(path, auth=(auth[login][0], "wrong")).status_code == 401


def test_tokens_names_and_other_sites(stack):
    people = ("admin", stack.secret("people"))
    bearer = lambda token: {"Authorization": f"Bearer {token}"}  # noqa: E731
    assert stack.get("/ray/api/jobs/", headers=bearer("0" * 48)).status_code == 403
    assert stack.get("/ray/api/jobs/", headers=bearer(stack.secret("ray"))).status_code == 200
    assert stack.get("/v1/classes", headers=bearer(stack.client["SPRUE_KEY"])).status_code == 200
    assert stack.get("/livez", headers={"Host": "evil.example"}).status_code == 421
    foreign = requests.post(
        f"{stack.url}/ray/api/jobs/", auth=people, headers={"Sec-Fetch-Site": "cross-site"}, json={},
        verify=stack.client["SPRUE_CA"], timeout=60,
    )  # fmt: skip
    assert foreign.status_code == 403
    socket = {"Connection": "Upgrade", "Upgrade": "websocket"}
    origins = {stack.url: 404, "https://evil.example": 403, f"{stack.url}.evil.example": 403}
    for origin, status in origins.items():  # no job has this name
        path, headers = "/ray/api/jobs/raysubmit_none/logs/tail", socket | {"Origin": origin}
        assert stack.get(path, auth=people, headers=headers).status_code == status, origin


def score(stack, champion, kind, **arguments):
    """A score of an image, through the proxy."""
    image = (champion / f"second/data/tiny/brick/test/{kind}/000.png").read_bytes()
    return requests.post(
        f"{stack.url}/v1/classes/{CLASS_NAME}/score", data=image, verify=stack.client["SPRUE_CA"], timeout=60,
        headers={"Content-Type": "image/png"} | arguments,
    )  # fmt: skip


def answers(stack, champion):
    """Waits until the champion answers: the service looks for new ones every 15 s."""
    key = {"Authorization": f"Bearer {stack.client['SPRUE_KEY']}"}
    for _ in range(120):
        answer = score(stack, champion, "spot", **key, **{"X-Request-Id": "part-4711"})
        if answer.status_code == 200:
            return answer
        time.sleep(0.5)
    pytest.fail(f"{answer.status_code}: {answer.text}\n{stack.logs()}")


def logged(stack, identifier):
    """The proxy's line of a request that was answered; the supervisor writes it a little later."""
    for _ in range(100):
        lines = (stack.folder / "log/proxy.log").read_text().splitlines()
        for each in (json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")):
            if each["request_id"] == identifier and each["status"] == 200:
                return each
        time.sleep(0.1)
    pytest.fail(f"the proxy has not logged {identifier}\n{stack.logs()}")


def test_the_champion_scores_with_a_key_and_not_without(stack, champion):
    assert answers(stack, champion).json()["is_anomalous"]
    assert score(stack, champion, "spot").status_code == 401
    assert logged(stack, "part-4711")["path"] == f"/v1/classes/{CLASS_NAME}/score"


def test_a_second_version_is_promoted_and_served(stack, champion):
    """Stages with another seed, as commands of this machine on the stack's Ray; then promotion by its test."""
    params = champion / "params.yaml"
    settings = YAML(typ="safe").load(params)
    settings["datasets"]["tiny"]["fit"]["seed"] = 1
    YAML().dump(settings, champion / "other.yaml")
    for stage in STAGES[2:]:
        done = stack.shell("python", f"pipelines/{stage}.py", *arguments(champion, "other.yaml"))
        assert done.returncode == 0, done.stdout + done.stderr
    promoted = stack.shell(
        "sprue", "--store", "s3://sprue/store", "promote", CLASS_NAME, "--images",
        str(champion / "unseen"), "--margin", "1", "--latency", "100000",
    )  # fmt: skip
    assert promoted.returncode == 0, promoted.stdout + promoted.stderr
    for _ in range(120):
        if answers(stack, champion).json()["model"]["version"] == 2:
            return
        time.sleep(0.5)
    pytest.fail("version 2 is not served")


def test_prometheus_has_the_service_and_the_rules(stack, champion, panels):
    answers(stack, champion)
    for _ in range(60):
        if stack.query(f'ray_sprue_decisions_total{{model="{CLASS_NAME}"}}'):
            break
        time.sleep(0.5)
    else:
        pytest.fail("Prometheus has no decisions")
    people = ("admin", stack.secret("people"))
    groups = stack.get("/prometheus/api/v1/rules", auth=people).json()["data"]["groups"]
    rules = list(itertools.chain.from_iterable(group["rules"] for group in groups))
    assert len(rules) > 10
    assert {rule["health"] for rule in rules} <= {"ok", "unknown"}
    for query in itertools.chain.from_iterable(panels("serving.json", "5m").values()):
        stack.query(query)


def test_each_alert_fires_when_it_should():
    done = subprocess.run(
        ["promtool", "test", "rules", "alerts_test.yaml"], cwd=ROOT / "infra/prometheus", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rules = YAML(typ="safe").load(ROOT / "infra/prometheus/alerts.yaml")
    documented = (ROOT / "docs/how-to/monitoring.md").read_text()
    for rule in itertools.chain.from_iterable(group["rules"] for group in rules["groups"]):
        assert f"`{rule['alert']}`" in documented


def test_a_port_that_is_taken_is_named(tmp_path, environment):
    command = [sys.executable, "infra/local/stack.py", "up", "--folder", str(tmp_path / "stack")]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        done = subprocess.run(
            [*command, "--port", str(port), "--base", str(free_base())],
            cwd=ROOT, env=environment, capture_output=True, text=True,
        )  # fmt: skip
    assert done.returncode == 1
    assert f"stack: others listen on 127.0.0.1:{port}; choose ports" in done.stderr
    status = subprocess.run(
        [*command[:2], "status", *command[3:]], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert status.returncode == 1


@pytest.mark.parametrize("service", ["proxy", "mlflow", "scoring"])
def test_a_service_whose_first_process_is_killed_comes_back(stack, champion, service):
    """Its other processes live on, and keep its ports until it ends them, or they are those of the next start."""
    first = psutil.Process(service_pid(stack, service))
    first.kill()
    first.wait()
    for _ in range(60):
        status = stack.run("status")
        if status.returncode == 0 and service_pid(stack, service) not in (0, first.pid):
            break
        time.sleep(2)
    else:
        pytest.fail(f"{service} does not come back\n{status.stdout}{stack.logs()}")
    assert answers(stack, champion).status_code == 200


def test_a_kill_while_detectors_are_registered_loses_nothing(stack):
    done = stack.shell(
        sys.executable, "benchmarks/registry_faults.py", "--kills", "3", "--stack", str(stack.folder),
        PYTHONPATH=stack.environment["PYTHONPATH"],
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "kill 3 of 3: SeaweedFS" in done.stdout
    assert "lost or twice: nothing" in done.stdout


def test_down_leaves_nothing_running_and_nothing_lost(stack, champion):
    before = stack.processes()
    done = stack.run("down")
    assert done.returncode == 0, done.stderr
    _, alive = psutil.wait_procs(before, timeout=10)
    assert not alive
    named = [each.info for each in psutil.process_iter(["cmdline"]) if str(stack.folder) in str(each.info["cmdline"])]
    assert not named
    assert stack.run("status").returncode == 1
    assert "nothing runs" in stack.run("down").stdout
    stack.up()
    assert answers(stack, champion).json()["model"]["version"] == 2
    assert stack.run("status").returncode == 0
