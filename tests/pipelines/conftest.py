"""What the tests of the pipeline share, all of it real: copies of the checkout, a Ray head, an object store."""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import boto3
import numpy as np
import pytest
import requests
from PIL import Image, ImageDraw
from ruamel.yaml import YAML
from skimage import data

ROOT = Path(__file__).parents[2]
DATASET = "tiny"
CLASSES = ("brick", "grass")
SIDE = 96
GOOD, TESTED = 30, 4
"""Training pictures of a class, and test pictures of each of its two kinds."""

QUICK = {
    "dataset": DATASET,
    "manifest": {"calibration": 0.2, "validation": 0.1},
    "features": {"blocks": [2, 3], "scales": [1.0], "input_size": 128},
    "flow": {"adapted": 32, "bottleneck": 16, "steps": 1},
    "fit": {"epochs": 2},
    "calibration": {"alpha": 0.2},
}
"""Parameters with which a run takes seconds."""


@dataclass(frozen=True)
class Checkout:
    """A clone of the repository and the environment in which a user works in it."""

    folder: Path
    environment: Mapping[str, str] = field(repr=False)

    def run(self, *command: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs a command in the folder; this interpreter is first on its path."""
        done = subprocess.run(
            command,
            cwd=self.folder,
            env={**self.environment, "PYTHONPATH": f"{self.folder}/platform:{self.folder}/models", **environment},
            capture_output=True,
            text=True,
            timeout=400,
        )
        if check and done.returncode:
            pytest.fail(
                f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
            )
        return done

    def git(self, *arguments: str) -> str:
        return self.run("git", *arguments).stdout.strip()

    def commit(self, message: str) -> str:
        """Commits everything, and returns the commit."""
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", message)
        return self.git("rev-parse", "HEAD")

    def dvc(self, *arguments: str, **environment: str) -> str:
        done = self.run("dvc", *arguments, **environment)
        return done.stdout + done.stderr

    def set_params(self, changes: Mapping[str, object]) -> None:
        """Changes values of params.yaml, a section's by its name."""
        path = self.folder / "params.yaml"
        write_params(path, changes, path)

    def digests(self, *names: str) -> dict[str, bytes]:
        """Content of all files of some folders."""
        files = [path for name in names for path in (self.folder / name).rglob("*") if path.is_file()]
        return {str(path.relative_to(self.folder)): path.read_bytes() for path in files}

    def clone(self, folder: Path) -> "Checkout":
        """What another user gets from git."""
        self.run("git", "clone", "--quiet", str(self.folder), str(folder))
        return replace(self, folder=folder)

    def copy(self, folder: Path) -> "Checkout":
        """The same with everything that git ignores."""
        shutil.copytree(self.folder, folder, symlinks=True)
        return replace(self, folder=folder)


def write_params(path: Path, changes: Mapping[str, object], source: Path = ROOT / "params.yaml") -> None:
    """Writes a parameter file that differs from another in some values."""
    params = YAML().load(source)
    for name, value in changes.items():
        if isinstance(value, dict):
            params[name].update(value)
        else:
            params[name] = value
    YAML().dump(params, path)


def crop(class_name: str, rng: np.random.Generator) -> Image.Image:
    """A random piece of one of scikit-image's photographs."""
    photograph = getattr(data, class_name)()
    top, left = rng.integers(0, photograph.shape[0] - SIDE, 2)
    return Image.fromarray(photograph[top : top + SIDE, left : left + SIDE])


def spotted(class_name: str, rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """A random piece with a white spot, and where that is."""
    image, mask = crop(class_name, rng), Image.new("L", (SIDE, SIDE))
    left, top = rng.integers(0, SIDE - 24, 2).tolist()
    for drawn in (image, mask):
        ImageDraw.Draw(drawn).ellipse((left, top, left + 20, top + 20), fill=255)
    return image, mask


def write_pictures(folder: Path, classes: Sequence[str] = CLASSES, good: int = GOOD) -> Path:
    """A small dataset in MVTec AD's layout: crops, and in the test split crops with a white spot."""
    for seed, class_name in enumerate(classes):
        rng = np.random.default_rng(seed)
        for place in ("train/good", "test/good", "test/spot", "ground_truth/spot"):
            (folder / class_name / place).mkdir(parents=True)
        for number in range(good):
            crop(class_name, rng).save(folder / class_name / "train/good" / f"{number:03}.png")
        for number in range(TESTED):
            crop(class_name, rng).save(folder / class_name / "test/good" / f"{number:03}.png")
            image, mask = spotted(class_name, rng)
            image.save(folder / class_name / "test/spot" / f"{number:03}.png")
            mask.save(folder / class_name / "ground_truth/spot" / f"{number:03}_mask.png")
    return folder


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A user's environment: nothing of this machine's but the path, and caches of its own."""
    folder = tmp_path_factory.mktemp("user")
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "MLFLOW_", "RAY_", "SPRUE_"))
    }
    user = {f"GIT_{role}_{part}": "test@example.org" for role in ("AUTHOR", "COMMITTER") for part in ("NAME", "EMAIL")}
    return kept | user | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "DVC_SITE_CACHE_DIR": str(folder / "dvc"),
        "DVC_NO_ANALYTICS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "SPRUE_CACHE": str(folder / "cache"),
    }  # fmt: skip


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Checkout:
    """The working tree as a repository with quick parameters, and pictures that are not under DVC yet."""
    checkout = Checkout(tmp_path_factory.mktemp("checkout"), environment)
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (checkout.folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, checkout.folder / name)
    checkout.set_params(QUICK)
    checkout.git("init", "--quiet")
    checkout.commit("The working tree")
    write_pictures(checkout.folder / "data" / DATASET)
    return checkout


@pytest.fixture(scope="session")
def pictures() -> Callable[[Path], Path]:
    """Writes a small dataset; see `write_pictures`."""
    return write_pictures


@pytest.fixture(scope="session")
def parameters() -> Callable[[Path, Mapping[str, object]], None]:
    """Writes the quick parameters with some changes."""

    def write(path: Path, changes: Mapping[str, object]) -> None:
        write_params(path, QUICK)
        write_params(path, changes, path)

    return write


@pytest.fixture
def add_pictures() -> Callable[[Path, str, int], None]:
    """Writes further good pictures of a class into a folder."""

    def add(folder: Path, class_name: str, count: int) -> None:
        rng = np.random.default_rng(99)
        for number in range(count):
            crop(class_name, rng).save(folder / f"new{number}.png")

    return add


@pytest.fixture
def unseen_bricks(tmp_path: Path) -> Path:
    """A folder of good and spotted bricks that are not in the dataset."""
    rng, folder = np.random.default_rng(7), tmp_path / "unseen"
    for name in ("good", "spot"):
        (folder / name).mkdir(parents=True)
    for number in range(24):
        crop("brick", rng).save(folder / "good" / f"{number:03}.png")
        spotted("brick", rng)[0].save(folder / "spot" / f"{number:03}.png")
    return folder


@pytest.fixture(scope="session")
def object_store(s3_server: str) -> dict[str, str]:
    """The environment that leads every S3 library to the server."""
    return {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "sprue",
        "AWS_SECRET_ACCESS_KEY": "sprue-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


@pytest.fixture(scope="session")
def bucket(object_store: dict[str, str]) -> str:
    """A bucket's name."""
    boto3.client(
        "s3",
        endpoint_url=object_store["AWS_ENDPOINT_URL"],
        aws_access_key_id=object_store["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=object_store["AWS_SECRET_ACCESS_KEY"],
        region_name=object_store["AWS_DEFAULT_REGION"],
    ).create_bucket(Bucket="plant")
    return "plant"


@dataclass(frozen=True)
class Head:
    """The head of a Ray cluster: its address for drivers, the dashboard's for jobs, and what lets one in."""

    address: str
    dashboard: str
    headers: Mapping[str, str]

    def get(self, path: str) -> requests.Response:
        """Asks the dashboard."""
        return requests.get(f"{self.dashboard}/{path}", headers=self.headers, timeout=10)


@pytest.fixture(scope="session")
def ray_head(
    environment: dict[str, str], object_store: dict[str, str], ports: Callable[[int], list[int]]
) -> Iterator[Head]:
    """``ray start --head`` in a folder that holds nothing; the object store's keys are in its environment alone."""
    # Not below pytest's folder: the paths of Ray's sockets would be too long.
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    port, dashboard, agent, client = ports(4)
    command = [
        "ray", "start", "--head", "--block", "--num-cpus=2", f"--port={port}", f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}", "--include-dashboard=true",
        f"--temp-dir={folder}", "--object-store-memory=500000000",
    ]  # fmt: skip
    log = folder / "start.log"
    with (
        log.open("wb") as output,
        subprocess.Popen(
            command, cwd=folder, env=environment | object_store, stdout=output, stderr=output, start_new_session=True
        ) as process,
    ):
        try:
            headers = {"Authorization": f"Bearer {environment['RAY_AUTH_TOKEN']}"}
            head = Head(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", headers)
            _wait_until_it_takes_jobs(head, process, log)
            yield head
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


def _wait_until_it_takes_jobs(head: Head, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        try:
            head.get("api/jobs/").raise_for_status()
        except requests.RequestException:
            time.sleep(0.3)
        else:
            return
    pytest.fail(f"ray start --head does not answer:\n{log.read_text()[-3000:]}")
