"""What `sprue doctor` looks at elsewhere: the store, the registry and the Ray cluster."""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import socket
import sqlite3
from contextlib import closing
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlparse

import requests
from upath import UPath

from sprue.errors import SprueError
from sprue.operations.archive import in_words
from sprue.operations.findings import Finding
from sprue.operations.machine import is_writable
from sprue.tracking.locations import left_behind, own_database

TIMEOUT_S = 2.0
"""How long a service may take to answer."""
LOW, LOWEST = 20e9, 2e9
"""Free bytes below which a store is a warning, and a failure."""
SKEW_S = 30.0
"""How far two clocks may be apart; object stores refuse requests at 15 minutes."""
DASHBOARD = 8265


def store(folder: UPath) -> list[Finding]:
    """Whether the store can be read and written, and how much space is left."""
    if folder.protocol not in ("", "file"):
        return _bucket(folder)
    path = Path(folder.path)
    if not is_writable(path):
        return [Finding("FAIL", "store", f"{path} can't be written: change its owner, or name another with --store")]
    existing = next(each for each in (path, *path.parents) if each.exists())
    free = shutil.disk_usage(existing).free
    words = f"{path}{'' if path.exists() else ' does not exist yet'}: {in_words(free)} free"
    if free < LOWEST:
        return [Finding("FAIL", "store", f"{words}: make room")]
    return [Finding("WARN" if free < LOW else "OK", "store", words + (": make room" if free < LOW else ""))]


def _bucket(folder: UPath) -> list[Finding]:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    parsed = urlparse(str(folder))
    config = Config(connect_timeout=TIMEOUT_S, read_timeout=TIMEOUT_S, retries={"total_max_attempts": 1})
    key = f"{parsed.path.strip('/')}/.doctor".lstrip("/")
    try:
        client = boto3.client("s3", config=config)
        client.put_object(Bucket=parsed.netloc, Key=key, Body=b"")
        answer = client.delete_object(Bucket=parsed.netloc, Key=key)
    except (BotoCoreError, ClientError, ValueError) as error:
        advice = "see AWS_ENDPOINT_URL, the credentials and the bucket's policy"
        return [Finding("FAIL", "store", f"{folder} can't be written: {error}; {advice}")]
    date = answer["ResponseMetadata"]["HTTPHeaders"].get("date", "")
    return [Finding("OK", "store", f"{folder} can be written"), *_clock("the object store", date)]


def registry(folder: UPath) -> list[Finding]:
    """Whether the registry answers, and whether its schema is that of the installed MLflow."""
    try:
        uri = os.environ.get("MLFLOW_TRACKING_URI") or own_database(folder)
    except SprueError as error:
        return [Finding("FAIL", "registry", str(error))]
    if uri.startswith(("http://", "https://")):
        return _server(uri.rstrip("/"))
    if not uri.startswith("sqlite:///"):
        return [Finding("WARN", "registry", f"{urlparse(uri).scheme} is not looked at: name a server")]
    return _database(Path(uri.removeprefix("sqlite:///")), folder)


def _server(uri: str) -> list[Finding]:
    try:
        answer = requests.get(f"{uri}/version", timeout=TIMEOUT_S)
        answer.raise_for_status()
        search = f"{uri}/api/2.0/mlflow/experiments/search"
        requests.post(search, json={"max_results": 1}, timeout=TIMEOUT_S).raise_for_status()
    except requests.RequestException as error:
        response = error.response
        reason = f"status {response.status_code}" if response is not None else type(error).__name__
        return [Finding("FAIL", "registry", f"{uri}: {reason}; start the server, see MLFLOW_TRACKING_URI and its log")]
    own, found = importlib.metadata.version("mlflow"), answer.text.strip()
    same = own.split(".")[:2] == found.split(".")[:2]
    words = f"{uri} answers, MLflow {found}" + ("" if same else f", and here it is {own}: install the same")
    findings = [Finding("OK" if same else "WARN", "registry", words), *_clock(uri, answer.headers.get("Date", ""))]
    if uri.startswith("http://") and not _is_loopback(urlparse(uri).hostname or ""):
        words = f"{uri} is not encrypted: what passes can be read and changed on the way; put it behind HTTPS"
        findings.append(Finding("WARN", "registry", words))
    return findings


def _database(file: Path, folder: UPath) -> list[Finding]:
    if not file.is_file():
        return [Finding("OK", "registry", f"{file} does not exist yet: the first command makes it")]
    try:
        with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True, timeout=TIMEOUT_S)) as connection:
            found = {row[0] for row in connection.execute("SELECT version_num FROM alembic_version")}
            (models,) = connection.execute("SELECT count(*) FROM registered_models").fetchone()
        moved = left_behind(file, folder)
    except (sqlite3.Error, SprueError) as error:
        return [Finding("FAIL", "registry", f"{file} can't be read: {error}; restore it from a backup")]
    if found != schema_heads():
        revisions = f"its schema is {', '.join(found)}, and MLflow's is {', '.join(schema_heads())}"
        advice = f"make a backup, then: mlflow db upgrade sqlite:///{file}"
        return [Finding("FAIL", "registry", f"{file}: {revisions}; {advice}")]
    if moved:
        words = f"{file} names files in {moved[0]}: the store was moved or copied; run `sprue relocate`"
        return [Finding("FAIL", "registry", words)]
    return [Finding("OK", "registry", f"{file}: {models} models, its schema is MLflow's")]


def schema_heads() -> set[str]:
    """The newest revision of the schema that the installed MLflow knows. To import MLflow would take seconds."""
    found = importlib.util.find_spec("mlflow")
    if found is None or found.origin is None:
        return set()
    revisions: set[str] = set()
    before: set[str] = set()
    for file in (Path(found.origin).parent / "store" / "db_migrations" / "versions").glob("*.py"):
        text = file.read_text(encoding="utf-8")
        for name, value in re.findall(r"^(revision|down_revision)\b[^=\n]*= (.*)$", text, re.MULTILINE):
            (revisions if name == "revision" else before).update(re.findall(r"['\"](\w+)['\"]", value))
    return revisions - before


def _clock(name: str, date: str) -> list[Finding]:
    """How far this machine's clock is from a server's, by the header Date of its answer."""
    try:
        skew = (datetime.now(UTC) - parsedate_to_datetime(date)).total_seconds()
    except ValueError:
        return []
    if abs(skew) < SKEW_S:
        return [Finding("OK", "clock", f"within {max(2, round(abs(skew)))} s of that of {name}")]
    words = f"{abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} that of {name}: synchronise both (NTP)"
    return [Finding("WARN", "clock", words)]


def ray_cluster() -> list[Finding]:
    """Whether the cluster that RAY_ADDRESS names can be reached, asks for a token, and runs the same Ray."""
    address, mode = os.environ.get("RAY_ADDRESS", ""), os.environ.get("RAY_AUTH_MODE", "token").lower()
    if address in ("", "local"):
        if mode != "token":
            words = "a command starts one here that asks for no token: set RAY_AUTH_MODE=token"
            return [Finding("WARN", "Ray", words)]
        return [Finding("OK", "Ray", "no cluster is named (RAY_ADDRESS): a command starts one here, with a token")]
    if address == "auto":
        return [Finding("WARN", "Ray", "RAY_ADDRESS=auto is not looked at: name the head's address")]
    parsed = urlparse(address if "://" in address else f"ray://{address}")
    host, is_dashboard = parsed.hostname or "", parsed.scheme in ("http", "https")
    try:
        port = parsed.port or (DASHBOARD if is_dashboard else 6379)
        socket.create_connection((host, port), timeout=TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        return [Finding("FAIL", "Ray", f"RAY_ADDRESS={address} can't be reached: {error}; start the head")]
    named = os.environ.get("RAY_API_SERVER_ADDRESS", f"http://{host}:{DASHBOARD}")
    return [Finding("OK", "Ray", f"{address} can be reached"), *_dashboard(address if is_dashboard else named)]


def _dashboard(url: str) -> list[Finding]:
    """Whether a cluster's dashboard asks for a token, takes ours, and which Ray it is."""
    jobs, token = f"{url.rstrip('/')}/api/jobs/", os.environ.get("RAY_AUTH_TOKEN", "")
    try:
        is_open = requests.get(jobs, timeout=TIMEOUT_S / 2).ok
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        is_let_in = is_open or requests.get(jobs, headers=headers, timeout=TIMEOUT_S / 2).ok
        answer = requests.get(f"{url.rstrip('/')}/api/version", headers=headers, timeout=TIMEOUT_S / 2)
    except requests.RequestException as error:
        words = f"the dashboard {url} does not answer ({type(error).__name__}): set RAY_API_SERVER_ADDRESS"
        return [Finding("WARN", "Ray", words)]
    findings = []
    if is_open:
        words = f"{url} asks for no token: who reaches it runs code there; start the cluster with RAY_AUTH_MODE=token"
        findings.append(Finding("WARN" if _is_loopback(urlparse(url).hostname or "") else "FAIL", "Ray", words))
    elif not is_let_in:
        findings.append(Finding("FAIL", "Ray", f"{url} does not take this token: set RAY_AUTH_TOKEN to the cluster's"))
    else:
        findings.append(Finding("OK", "Ray", f"{url} asks for a token, and takes this one"))
    own, found = importlib.metadata.version("ray"), answer.json().get("ray_version", "") if answer.ok else ""
    if found and found != own:
        findings.append(Finding("FAIL", "Ray", f"the cluster runs Ray {found}, and here it is {own}: install the same"))
    return findings


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
