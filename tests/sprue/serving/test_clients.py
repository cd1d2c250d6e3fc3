"""Clients: the documentation's examples, generated requests, rate limits, the access log, and TLS."""

import importlib.util
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import mlflow
import pytest
import torch
from click.testing import CliRunner

from sprue.cli import main
from sprue.errors import SprueError
from sprue.release.access_log import FOLDER as ACCESSES
from sprue.release.access_log import Access, AccessLog
from sprue.serving.certificates import Certificate
from sprue.serving.keys import add_key
from sprue.serving.launch import ServeSettings, serve_champions, stop_serving
from sprue.serving.rates import Rate
from sprue.store import location

ROOT = Path(__file__).parents[3]
EXAMPLES = ROOT / "docs" / "examples"
LANGUAGES = {"score.py": sys.executable, "score.sh": "sh", "score.mjs": "node"}


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    """The benchmark that sends generated requests."""
    spec = importlib.util.spec_from_file_location("fuzz_service", ROOT / "benchmarks" / "fuzz_service.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def images(plant: Any) -> dict[str, Path]:
    """A good image, and one with a defect."""
    found = {"good": plant.image("brick", 1), "defective": plant.defective("brick", 1)}
    paths = {name: plant.folder / f"{name}.png" for name in found}
    for name, path in paths.items():
        found[name].save(path)
    return paths


def run_example(name: str, url: str, image: Path, key: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs an example with a class's name that has to be encoded nowhere."""
    program = shutil.which(LANGUAGES[name])
    assert program, f"install {LANGUAGES[name]}"
    command = [program, str(EXAMPLES / name), url, "textures.brick", str(image)]
    variables = os.environ | {"SPRUE_KEY": key} | environment
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=variables)


@pytest.mark.parametrize("name", LANGUAGES)
def test_an_example_scores_and_keeps_to_retry_after(plant: Any, images: dict[str, Path], name: str) -> None:
    url, key = str(plant.client.base_url), add_key(plant.keys, f"camera-{name}", ["score"], "1/s")
    good = run_example(name, url, images["good"], key)
    assert good.returncode == 0, good.stderr
    # This one is beyond the rate limit at first.
    defective = run_example(name, url, images["defective"], key)
    assert defective.returncode == 1, defective.stderr
    assert json.loads(defective.stdout)["model"]["name"] == "textures.brick"
    stations: set[str] = set()
    for _ in range(200):  # decisions are in the store some seconds later
        stations = {each.station for each in plant.decisions.newest("textures.brick", 2)}
        if stations == {"line-7"}:
            break
        time.sleep(0.1)
    assert stations == {"line-7"}


@pytest.mark.parametrize("name", LANGUAGES)
def test_an_example_without_a_decision_says_why(
    plant: Any, images: dict[str, Path], name: str, unused_port: int
) -> None:
    refused = run_example(name, str(plant.client.base_url), images["good"], "wrong")
    assert refused.returncode == 2 and "unauthorized" in refused.stderr
    nobody = run_example(name, f"http://127.0.0.1:{unused_port}", images["good"], "any")
    assert nobody.returncode == 2 and nobody.stderr


def raw_request(plant: Any, method: str, path: str, key: str) -> bytes:
    """Headers of a request that announces a body of JSON."""
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", f"Authorization: Bearer {key}", "Content-Length: 1000"]
    return "\r\n".join([*lines, "Content-Type: application/json", "\r\n"]).encode()


def test_beyond_its_rate_a_key_is_refused_before_its_body_is_read(plant: Any) -> None:
    key = add_key(plant.keys, "fast", ["score"], "2/h")
    url = "/v1/classes"
    assert [plant.client.get(url, headers={"Authorization": f"Bearer {key}"}).status_code for _ in range(2)] == [
        200
    ] * 2
    with socket.create_connection(("127.0.0.1", plant.port)) as connection:
        connection.settimeout(60)
        connection.sendall(raw_request(plant, "POST", "/v1/classes/brick/score", key))
        received = b""
        while b'"code":"rate_limited"' not in received and (part := connection.recv(2**16)):
            received += part
    assert received.startswith(b"HTTP/1.1 429 ") and b'"code":"rate_limited"' in received
    (retry_after,) = re.findall(rb"retry-after: (\d+)", received.lower())
    assert 1700 < int(retry_after) <= 1800
    assert plant.client.get(url).status_code == 200  # another key


def test_a_review_that_comes_too_slowly_is_ended(plant: Any) -> None:
    key = plant.client.headers["authorization"].removeprefix("Bearer ")
    with socket.create_connection(("127.0.0.1", plant.port)) as connection:
        connection.settimeout(60)
        connection.sendall(raw_request(plant, "POST", "/v1/classes/brick/reviews", key))
        received = b"".join(iter(partial(connection.recv, 2**16), b""))  # until the service closes the connection
    assert received.startswith(b"HTTP/1.1 408 ") and b'"code":"slow_body"' in received


def entries(plant: Any, condition: Callable[[list[Access]], bool]) -> list[Access]:
    """Waits until the access log satisfies a condition, and returns it."""
    for _ in range(200):
        found = list(AccessLog(location(str(plant.folder / "store" / ACCESSES))).entries())
        if condition(found):
            return found
        time.sleep(0.05)
    pytest.fail(f"10 s later the access log is still {found}")


def test_the_access_log_has_who_looked_and_who_reviewed(plant: Any, images: dict[str, Path]) -> None:
    monitor = add_key(plant.keys, "monitor", ["admin"])
    for _ in range(3):  # one entry in an hour
        plant.client.get("/readyz", headers={"Authorization": f"Bearer {monitor}"})
    plant.client.get("/readyz", headers={"Authorization": f"Bearer {add_key(plant.keys, 'curious', ['score'])}"})
    answer = plant.client.post("/v1/classes/brick/score", content=images["defective"].read_bytes())
    decision = plant.decision(answer)
    review = {"key": decision.key, "at": decision.at.isoformat(), "verdict": "defective"}
    plant.client.post("/v1/classes/brick/reviews", json=review).raise_for_status()

    found = entries(plant, lambda each: any(entry.kind == "reviewed" for entry in each))
    (looked,) = (each for each in found if each.by == "monitor")
    assert (looked.kind, looked.origin, looked.detail) == ("admin", "127.0.0.1", "GET /readyz")
    assert not any(each.by == "curious" for each in found)
    (reviewed,) = (each for each in found if each.kind == "reviewed")
    assert (reviewed.by, reviewed.origin, reviewed.model) == ("everything", "127.0.0.1", "textures.brick")
    assert reviewed.detail == f"defective: decision {decision.key}, request {decision.request_id}"

    command = ["--store", str(plant.folder / "store"), "audit", "textures.brick", "--json"]
    environment = {"MLFLOW_TRACKING_URI": mlflow.get_tracking_uri()}
    done = CliRunner().invoke(main, command, prog_name="sprue", env=environment, catch_exceptions=False)
    printed = json.loads(done.output)
    assert {each["kind"] for each in printed} == {"external", "reviewed"}
    assert [each["at"] for each in printed] == sorted(each["at"] for each in printed)


def test_whatever_is_sent_the_answer_is_one_that_is_described(plant: Any, fuzz: ModuleType) -> None:
    url, headers = str(plant.client.base_url).rstrip("/"), {"Authorization": plant.client.headers["authorization"]}
    # Libraries of other tests may have made this thread round tiny numbers to zero, and hypothesis generates such.
    torch.set_flush_denormal(False)
    tally = fuzz.send_described(url, "textures.brick", 100, 7, headers)
    tally += fuzz.send_images(url, "textures.brick", 200, 7, headers)
    assert not tally.wrong, str(tally)
    assert tally.statuses.total() > 200
    assert {"200", "404", "415", "422"} <= set(tally.statuses), str(tally)


class TestTls:
    """The service under a certificate; it replaces the one without, and is the last of this file."""

    @pytest.fixture(scope="class")
    def certificate(self, issue: Callable[..., tuple[Path, Path]]) -> Certificate:
        return Certificate.read(*issue("scoring", ["localhost", "scoring.plant"]))

    @pytest.fixture(scope="class")
    def secure(self, plant: Any, certificate: Certificate, ports: Callable[[int], list[int]]) -> Iterator[httpx.Client]:
        """A client that trusts the certificate alone."""
        (port,) = ports(1)
        with pytest.raises(SprueError, match="with another certificate or without one: stop it first"):
            serve_champions(ServeSettings(port=plant.port, keys=plant.keys, certificate=certificate))
        stop_serving()
        url = serve_champions(ServeSettings(port=port, keys=plant.keys, certificate=certificate, rate=Rate.of("100/s")))
        assert url == f"https://127.0.0.1:{port}"
        trusted = ssl.create_default_context(cafile=str(certificate.chain))
        key = {"Authorization": plant.client.headers["authorization"]}
        with httpx.Client(base_url=f"https://localhost:{port}", verify=trusted, headers=key, timeout=30) as client:
            yield client
        stop_serving()

    def test_names_of_the_certificate_are_verified_and_answered(self, secure: httpx.Client) -> None:
        assert secure.get("/v1/classes").status_code == 200
        port = secure.base_url.port
        assert secure.get("/v1/classes", headers={"Host": f"scoring.plant:{port}"}).status_code == 200
        assert secure.get("/v1/classes", headers={"Host": "evil.example"}).status_code == 421
        with pytest.raises(httpx.ConnectError, match="IP address mismatch"):
            secure.get(f"https://127.0.0.1:{port}/v1/classes")
        with pytest.raises(httpx.ConnectError, match="self-signed certificate"):
            httpx.get(f"https://localhost:{port}/v1/classes")
        with pytest.raises(httpx.HTTPError):  # no key in clear text
            httpx.get(f"http://localhost:{port}/v1/classes")

    def test_old_versions_of_tls_are_refused(self, secure: httpx.Client, certificate: Certificate) -> None:
        old = ssl.create_default_context(cafile=str(certificate.chain))
        old.set_ciphers("DEFAULT@SECLEVEL=0")
        old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
        with pytest.raises(httpx.ConnectError):
            httpx.get(str(secure.base_url), verify=old)

    @pytest.mark.parametrize("name", LANGUAGES)
    def test_the_examples_trust_the_certificate(
        self, plant: Any, secure: httpx.Client, certificate: Certificate, images: dict[str, Path], name: str
    ) -> None:
        trust = dict.fromkeys(["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "NODE_EXTRA_CA_CERTS"], str(certificate.chain))
        key, url = add_key(plant.keys, f"tls-{name}", ["score"]), str(secure.base_url).rstrip("/")
        done = run_example(name, url, images["defective"], key, **trust)
        assert done.returncode == 1, done.stderr
        distrusted = run_example(name, url, images["defective"], key)
        assert distrusted.returncode == 2 and "self-signed" in distrusted.stderr.lower().replace(" ", "-")

    def test_the_page_is_served_and_keeps_no_cookie(self, secure: httpx.Client) -> None:
        page = secure.get("/")
        assert page.status_code == 200 and "set-cookie" not in page.headers
