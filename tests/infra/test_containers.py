"""Images are built of pinned parts alone, and the stack in containers has no default secret and one open door."""

import configparser
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib import util
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from string import Template
from types import ModuleType
from typing import Any

import pytest
import yaml
from mlflow.server.security_utils import should_block_cors_request
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from sprue.serving.keys import add_key, read_keys
from sprue.stages.runtime import NODE_ENVIRONMENT

ROOT = Path(__file__).parents[2]
CONTAINERS = ROOT / "infra" / "containers"
DOCKERFILE = (CONTAINERS / "Dockerfile").read_text()
LOCKS = ("build", "platform", "scoring", "torch-cuda")
MISSING = {"setuptools"}
"""A package that pip may have left out of this environment."""
DIGEST = "sha256:" + "0" * 64


def script(name: str) -> ModuleType:
    spec = util.spec_from_file_location(name, CONTAINERS / f"{name}.py")
    assert spec
    assert spec.loader
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def locked(name: str) -> dict[str, str]:
    """The packages of a file of requirements and their versions."""
    lines = (CONTAINERS / "requirements" / f"{name}.txt").read_text().splitlines()[1:]
    found = {}
    for line in lines:
        requirement, *hashes = line.split()
        assert hashes, f"{requirement} has no hash"
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", each) for each in hashes), line
        package, version = requirement.split("==")
        found[package] = version
    return found


def needed(name: str) -> set[str]:
    """The packages that a file names for the lock beside it."""
    lines = (CONTAINERS / "requirements" / f"{name}.in").read_text().splitlines()
    return {canonicalize_name(Requirement(line).name) for line in lines if line and not line.startswith("#")}


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return yaml.safe_load((CONTAINERS / "compose.yaml").read_text())


def test_the_dockerfile_passes_hadolint(program: Callable[[str], str]) -> None:
    done = subprocess.run([program("hadolint"), str(CONTAINERS / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_nothing_is_installed_that_has_no_hash() -> None:
    steps = re.sub(r"\\\n", " ", DOCKERFILE)
    installs = re.findall(r"pip(?: --python \S+)? (?:install|wheel) .*?(?=&&|\n)", steps)
    assert len(installs) == 5
    for each in installs:
        local = "--no-index" in each or each.rstrip().endswith(" .")
        assert "--no-deps" in each
        assert local or "--require-hashes" in each, each
    assert "apt-get" not in steps
    assert re.findall(r"^FROM (\S+)", steps, re.M) == ["${PYTHON_IMAGE}"] * 2


def test_the_images_run_as_nobody_in_particular_and_say_how_they_are() -> None:
    assert re.search(r"^USER 10001:10001$", DOCKERFILE, re.M)
    assert "HEALTHCHECK" in DOCKERFILE
    # KubeRay starts Ray in a login shell, whose path is Debian's.
    assert 'export PATH=/opt/sprue/bin:\\$PATH" > /etc/profile.d/sprue.sh' in DOCKERFILE
    environment = dict(re.findall(r"^(?:ENV|   )\s*(\w+)=(\S+)", DOCKERFILE, re.M))
    assert NODE_ENVIRONMENT.items() <= environment.items(), "as for a Ray that sprue starts"


def test_the_locks_have_the_tested_versions_of_all_that_is_needed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    tested = {}
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            tested[canonicalize_name(requirement.name)] = str(requirement.specifier).removeprefix("==")
    for name in LOCKS:
        for package, version in locked(name).items():
            assert tested.get(package, version) == version, f"{package}: run infra/containers/lock.py"
    torch = set(locked("torch-cuda"))
    declared = {canonicalize_name(Requirement(each).name) for each in project["dependencies"]}
    assert declared | needed("platform") <= locked("platform").keys() | torch
    assert needed("scoring") <= locked("scoring").keys() | torch
    assert needed("build") | {"hatchling"} <= locked("build").keys()


def test_the_scoring_image_has_what_the_service_imports_and_no_more(tmp_path: Path) -> None:
    """Imports the service in a process that sees the packages of the scoring image alone."""
    for package in locked("scoring").keys() | locked("torch-cuda").keys() | {"sprue"}:
        try:
            installed = distribution(package)
        except PackageNotFoundError:
            assert package in MISSING
            continue
        for top in {file.parts[0] for file in installed.files or ()} - {"..", "__pycache__"}:
            link = tmp_path / top
            if not link.exists():
                link.symlink_to(Path(str(installed.locate_file(top))))
    code = (
        "import sprue.cli, sprue.serving.application, sprue.serving.proxy, sprue.release.replay, timm, openvino, s3fs"
    )
    path = os.pathsep.join(map(str, (tmp_path, ROOT / "platform", ROOT / "models")))
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env={"PYTHONPATH": path, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert not {"dvc", "mlflow", "optuna", "scikit-learn", "matplotlib"} & locked("scoring").keys()


def test_an_image_that_is_not_pinned_is_not_built(tmp_path: Path) -> None:
    images = script("images")
    names, lock = tmp_path / "images.txt", tmp_path / "images.lock"
    names.write_text("# names\nPYTHON_IMAGE=python:3.11-slim-bookworm\n")
    with pytest.raises(images.ImageError, match="there is no"):
        images.pinned(names, lock)
    for wrong in ("python:3.11-slim-bookworm", "python:3.11-slim-bookworm@sha256:12", f"python:3.12@{DIGEST}"):
        lock.write_text(f"PYTHON_IMAGE={wrong}\n")
        with pytest.raises(images.ImageError, match="is not pinned"):
            images.pinned(names, lock)
    lock.write_text(f"PYTHON_IMAGE=python:3.11-slim-bookworm@{DIGEST}\n")
    assert images.pinned(names, lock) == {"PYTHON_IMAGE": f"python:3.11-slim-bookworm@{DIGEST}"}
    # So says the command, whatever follows for Docker.
    folder = tmp_path / "infra" / "containers"
    folder.mkdir(parents=True)
    for each in ("images.py", "images.txt"):
        (folder / each).write_text((CONTAINERS / each).read_text())
    for words in (["check"], ["build", "scoring", "cpu", "--tag", "x", "--", "--load"]):
        done = subprocess.run([sys.executable, str(folder / "images.py"), *words], capture_output=True, text=True)
        assert done.returncode == 1
        assert f"images: there is no {folder / 'images.lock'}" in done.stderr
    # The build itself refuses too, whoever calls it.
    (check,) = re.findall(r'\[\[ "\$\{PYTHON_IMAGE\}" =~ (\S+) \]\]', DOCKERFILE)
    for image, is_pinned in ((f"python@{DIGEST}", True), ("python:3.11", False)):
        done = subprocess.run(["bash", "-c", f'[[ "$0" =~ {check} ]]', image])
        assert (done.returncode == 0) == is_pinned


def test_the_compose_file_has_the_form_of_its_specification(program: Callable[[str], str]) -> None:
    command = [program("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", str(CONTAINERS / "compose.yaml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_only_the_proxy_is_published_and_only_by_tls(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert [name for name, each in services.items() if each.get("ports")] == ["proxy"]
    assert [name for name, each in services.items() if each["networks"] != ["stack"]] == ["proxy"]
    assert compose["networks"]["stack"] == {"internal": True}
    assert services["proxy"]["ports"] == ["${PUBLIC_ADDRESS:-127.0.0.1}:${PUBLIC_PORT:-443}:8443"]
    listens = re.findall(r"listen (.*);", (CONTAINERS / "nginx.conf").read_text())
    assert listens == ["127.0.0.1:8081", "8443 ssl default_server", "8443 ssl"]


def test_containers_can_do_little_and_say_how_they_are(compose: dict[str, Any]) -> None:
    for name, each in compose["services"].items():
        assert each["read_only"], name
        assert each["cap_drop"] == ["ALL"], name
        assert each["security_opt"] == ["no-new-privileges:true"], name
        assert each["mem_limit"], name
        # The platform's image has a check of its own, that of a node of Ray.
        assert "healthcheck" in each or each["image"].startswith("sprue-platform"), name


def test_images_come_pinned_or_are_built_here(compose: dict[str, Any]) -> None:
    names = set(script("images").read(CONTAINERS / "images.txt"))
    used = set()
    for name, each in compose["services"].items():
        if "build" in each:
            assert each["build"]["args"]["PYTHON_IMAGE"].startswith("${PYTHON_IMAGE:?"), name
            used.add("PYTHON_IMAGE")
        else:
            (variable,) = re.fullmatch(r"\$\{(\w+):\?\}", each["image"]).groups()
            used.add(variable)
    assert used == names


def test_no_secret_is_in_the_file_or_in_an_environment(compose: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "secrets"
    script("make_secrets").make(folder, "inspection.plant")
    files = {Path(each["file"]).name for each in compose["secrets"].values()}
    assert files | {"first.key", "keys"} == {each.name for each in folder.iterdir()}
    assert folder.stat().st_mode & 0o077 == 0, "others can't enter the folder"
    for name, each in compose["services"].items():
        given = [secret if isinstance(secret, str) else secret["source"] for secret in each.get("secrets", [])]
        assert set(given) <= compose["secrets"].keys(), name
        for variable, value in each.get("environment", {}).items():
            words = ("PASSWORD", "TOKEN", "SECRET", "ACCESS_KEY")
            is_secret = any(word in variable for word in words)
            assert not is_secret or str(value).startswith("/run/secrets/"), f"{name}: {variable}"
    # The services' files agree with one another.
    password = (folder / "postgres").read_text()
    assert f":{password}@postgres:5432/mlflow" in (folder / "mlflow_backend").read_text()
    server, client = configparser.ConfigParser(), configparser.ConfigParser()
    server.read(folder / "mlflow_auth.ini")
    client.read(folder / "mlflow_credentials")
    assert server["mlflow"]["admin_password"] == client["mlflow"]["mlflow_tracking_password"]
    assert f":{password}@postgres:5432/mlflow_auth" in server["mlflow"]["database_uri"]
    (identity,) = json.loads((folder / "s3.json").read_text())["identities"]
    assert identity["credentials"][0]["secretKey"] in (folder / "aws_credentials").read_text()


def test_the_scoring_service_follows_the_keys_of_their_owner(compose: dict[str, Any], tmp_path: Path) -> None:
    make, folder = script("make_secrets").make, tmp_path / "secrets"
    make(folder, "inspection.plant")
    source, target, access = compose["services"]["scoring"]["volumes"][-1].split(":")
    assert (source, access) == ("./secrets/keys", "ro"), "a folder, so that a replaced file reaches the container"
    assert f"--keys {target}/keys.json " in compose["services"]["scoring"]["command"][-1]
    keys = tmp_path / source / "keys.json"
    assert read_keys(keys)[0].scopes == ("score", "review", "admin")
    first = (folder / "first.key").read_text()
    add_key(keys, "line-7", ["score"])
    make(folder, "inspection.plant")
    assert [key.name for key in read_keys(keys)] == ["first", "line-7"]
    assert (folder / "first.key").read_text() == first
    for path, mode in ((keys.parent, 0o755), (keys, 0o444), (folder / "first.key", 0o400)):
        assert stat.S_IMODE(path.stat().st_mode) == mode, path
    (lock,) = keys.parent.glob(".*")
    assert lock.stat().st_mode & stat.S_IWUSR, "else nobody but root could add a key"


def test_mlflow_takes_what_browsers_send_through_the_proxy(compose: dict[str, Any]) -> None:
    service = compose["services"]["mlflow"]
    assert service["environment"]["PUBLIC_PORT"] == "${PUBLIC_PORT:-443}", "the port that the proxy is published at"
    (option,) = re.findall(r'--cors-allowed-origins "(\S+)"', service["command"][-1])
    for port, origin in (("443", "https://inspection.plant"), ("8443", "https://inspection.plant:8443")):
        variables = {"PUBLIC_NAME": "inspection.plant", "PUBLIC_PORT": port}
        origins = Template(option.replace("$$", "$")).substitute(variables).split(",")
        assert not should_block_cors_request(origin, "POST", origins)
        assert should_block_cors_request("https://evil.example", "POST", origins)


def test_the_stacks_prometheus_and_grafana_show_what_the_local_ones_do(compose: dict[str, Any], tmp_path: Path) -> None:
    local = yaml.safe_load((ROOT / "infra" / "prometheus" / "prometheus.yaml").read_text())["scrape_configs"]
    (here,) = yaml.safe_load((CONTAINERS / "prometheus.yaml").read_text())["scrape_configs"]
    (ray,) = (each for each in local if each["job_name"] == "ray")
    assert here["metric_relabel_configs"] == ray["metric_relabel_configs"]
    (found,) = here["dns_sd_configs"]
    assert set(found["names"]) <= compose["services"].keys()
    for name in found["names"]:
        assert f"--metrics-export-port={found['port']}" in json.dumps(compose["services"][name]["command"])
    for service in ("grafana", "prometheus"):
        for mount in compose["services"][service]["volumes"]:
            source = mount.partition(":")[0]
            assert not source.startswith(".") or (CONTAINERS / source).exists(), source
    # Prometheus reads them as they lie in the container, beside one another.
    for source in (CONTAINERS / "prometheus.yaml", ROOT / "infra" / "prometheus" / "alerts.yaml"):
        (tmp_path / source.name).write_text(source.read_text())
    command = ["promtool", "check", "config", str(tmp_path / "prometheus.yaml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rules found" in done.stdout


def test_nginx_takes_the_proxys_configuration(tmp_path: Path) -> None:
    for name, text in script("make_secrets").certificate("inspection.plant").items():
        (tmp_path / name).write_text(text)
    server = (CONTAINERS / "nginx.conf").read_text()
    (tmp_path / "server.conf").write_text(
        server.replace("${PUBLIC_NAME}", "inspection.plant").replace("/run/secrets", str(tmp_path))
    )
    main = f"pid {tmp_path}/pid; events {{}} http {{ access_log off; include {tmp_path}/server.conf; }}"
    (tmp_path / "nginx.conf").write_text(main)
    command = [shutil.which("nginx") or "/usr/sbin/nginx", "-t", "-c", str(tmp_path / "nginx.conf")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
