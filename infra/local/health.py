"""Whether the services do what they are there for."""

from collections.abc import Callable
from functools import partial

import boto3
import botocore.exceptions
import psycopg
import requests
from botocore.config import Config
from credentials import MACHINES, PEOPLE
from services import ARTIFACTS, BUCKET
from settings import LOOPBACK, Settings

TIMEOUT_S = 10


class Unhealthy(Exception):
    """What is wrong with a service, in a line."""


def checks(settings: Settings, known: dict[str, str]) -> dict[str, Callable[[], str]]:
    """For each service a function that says in a few words how it is, or raises `Unhealthy`."""
    return {
        "postgres": partial(_postgres, settings, known),
        "seaweedfs": partial(_seaweedfs, settings, known),
        "ray-head": partial(_ray_head, settings, known),
        "ray-worker-1": partial(_ray_worker, settings, known, "worker-1"),
        "ray-worker-2": partial(_ray_worker, settings, known, "worker-2"),
        "mlflow": partial(_mlflow, settings, known),
        "scoring": partial(_scoring, settings),
        "prometheus": partial(_prometheus, settings),
        "grafana": partial(_grafana, settings),
        "proxy": partial(_proxy, settings),
    }


def _get(url: str, **arguments: object) -> requests.Response:
    try:
        answer = requests.get(url, timeout=TIMEOUT_S, **arguments)  # type: ignore[arg-type]
        answer.raise_for_status()
    except requests.HTTPError as error:
        raise Unhealthy(f"status {error.response.status_code}") from error
    except requests.RequestException as error:
        raise Unhealthy("does not answer") from error
    return answer


def _postgres(settings: Settings, known: dict[str, str]) -> str:
    try:
        with psycopg.connect(
            host=LOOPBACK, port=settings.ports["postgres"], user="sprue", password=known["postgres"],
            dbname="mlflow", connect_timeout=TIMEOUT_S,
        ) as connection:  # fmt: skip
            row = connection.execute("SELECT pg_size_pretty(pg_database_size('mlflow'))").fetchone()
    except psycopg.Error as error:
        raise Unhealthy(str(error).splitlines()[0]) from error
    return f"database of {row[0]}" if row else ""


def _seaweedfs(settings: Settings, known: dict[str, str]) -> str:
    """Makes the buckets, if they are missing; the gateway answers before a volume can take anything."""
    client = boto3.client(
        "s3", endpoint_url=f"http://{settings.address('s3')}", aws_access_key_id=known["s3_key"],
        aws_secret_access_key=known["s3_secret"], region_name="us-east-1",
        config=Config(connect_timeout=2, read_timeout=TIMEOUT_S, retries={"max_attempts": 0}),
    )  # fmt: skip
    try:
        there = [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]
        for bucket in {ARTIFACTS, BUCKET}.difference(there):
            client.create_bucket(Bucket=bucket)
        client.put_object(Bucket=BUCKET, Key="checked", Body=b"")
    except botocore.exceptions.ClientError as error:
        raise Unhealthy(str(error)) from error
    except botocore.exceptions.BotoCoreError as error:
        raise Unhealthy("does not answer") from error
    return f"takes objects; buckets {BUCKET}, {ARTIFACTS}"


def _ray(settings: Settings, known: dict[str, str], path: str) -> requests.Response:
    headers = {"Authorization": f"Bearer {known['ray']}"}
    return _get(f"http://{settings.address('ray_dashboard')}/{path}", headers=headers)


def _ray_head(settings: Settings, known: dict[str, str]) -> str:
    jobs = _ray(settings, known, "api/jobs/").json()
    running = sum(job["status"] in ("PENDING", "RUNNING") and job["type"] == "SUBMISSION" for job in jobs)
    return f"{running} jobs"


def _ray_worker(settings: Settings, known: dict[str, str], name: str) -> str:
    nodes = _ray(settings, known, "api/v0/nodes").json()["data"]["result"]["result"]
    found = [node for node in nodes if node["node_name"] == name and node["state"] == "ALIVE"]
    if not found:
        raise Unhealthy("has not joined")
    resources = found[0]["resources_total"]
    return ", ".join(f"{int(resources[kind])} {kind}" for kind in ("CPU", "GPU") if resources.get(kind))


def _mlflow(settings: Settings, known: dict[str, str]) -> str:
    """Makes the machines' account, if it is missing."""
    url, people = f"http://{settings.address('mlflow')}", (PEOPLE, known["people"])
    _get(f"{url}/health")
    machines = (MACHINES, known["machines"])
    user = {"username": MACHINES, "password": known["machines"]}
    try:
        _get(f"{url}/api/2.0/mlflow/users/get", params={"username": MACHINES}, auth=machines)
    except Unhealthy:
        try:
            made = requests.post(f"{url}/api/2.0/mlflow/users/create", json=user, auth=people, timeout=TIMEOUT_S)
        except requests.RequestException as error:
            raise Unhealthy("does not answer") from error
        if not made.ok:
            raise Unhealthy(f"the account {MACHINES} can't be made: {made.text}") from None
    found = _get(f"{url}/api/2.0/mlflow/registered-models/search", auth=machines).json()
    return f"{len(found.get('registered_models', []))} models"


def _scoring(settings: Settings) -> str:
    url, file = f"http://{settings.address('scoring')}", settings.folder / "first.key"
    _get(f"{url}/livez")
    key = file.read_text() if file.exists() else ""
    ready = _get(f"{url}/readyz", headers={"Authorization": f"Bearer {key}"}).json()
    if "classes" not in ready:  # as for those without a key with the scope `admin`
        raise Unhealthy(f"{file} has no valid key with all scopes: remove the file, and `make up` makes another key")
    if not ready["classes"] and not ready.get("failures"):
        return "no champion yet"
    if ready["status"] != "ready":
        reasons = [*ready.get("failures", {}).values(), *(ready.get(f"{each}_error") for each in
                   ("registry", "keys", "decisions"))]  # fmt: skip
        raise Unhealthy(f"{ready['status']}: {'; '.join(reason for reason in reasons if reason)}")
    return f"{ready['classes']} classes"


def _prometheus(settings: Settings) -> str:
    url = f"http://{settings.address('prometheus')}/prometheus"
    _get(f"{url}/-/ready")
    alerts = _get(f"{url}/api/v1/alerts").json()["data"]["alerts"]
    firing = sorted({alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"})
    return f"alerts: {', '.join(firing) or 'none'}"


def _grafana(settings: Settings) -> str:
    _get(f"http://{settings.address('grafana')}/grafana/api/health")
    return "answers"


def _proxy(settings: Settings) -> str:
    """Itself, with its certificate; what is behind it has checks of its own."""
    answer = _get(f"{settings.url}/grafana", verify=str(settings.folder / "tls" / "ca.pem"), allow_redirects=False)
    if answer.status_code != 308:
        raise Unhealthy(f"status {answer.status_code}")
    return settings.url
