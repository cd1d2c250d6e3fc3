"""What the tests of the pipeline share, all of it real: copies of the checkout, a Ray head, an object store."""

import os
import shutil
import signal
import subprocess
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
"""Training images of a class, and test images of each of its two kinds."""

RECIPE = ROOT / "models/recipes/patchflow-cpu.yaml"
QUICK = {
    "manifest": {"calibration": 0.2, "validation": 0.1},
    "features": {"blocks": [2, 3], "scales": [1.0], "input_size": 128},
    "flow": {"adapted": 32, "bottleneck": 16, "steps": 1},
    "fit": {"epochs": 2},
    "search": {"trials": 0},
    "calibration": {"alpha": 0.2},
}
"""Changes of a recipe with which a run takes seconds."""


@dataclass(frozen=True)
class Checkout:
    """A clone of the repository and the environment in which a user works in it."""

    folder: Path
    environment: Mapping[str, str] = field(repr=False)

    def run(self, *command: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs a command in the folder; this interpreter is first on its path."""
        done = subprocess.run(
            command, cwd=self.folder, env=self.variables(environment), capture_output=True, text=True, timeout=1000
        )
        if check and done.returncode:
            pytest.fail(
                f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
            )
        return done

    def variables(self, changes: Mapping[str, str]) -> dict[str, str]:
        """The environment of a command."""
        return {**self.environment, "PYTHONPATH": f"{self.folder}/platform:{self.folder}/models", **changes}

    def start(self, *command: str, **environment: str) -> subprocess.Popen[str]:
        """Starts a command in the folder; its output and errors come together."""
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.variables(environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

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

    def set_params(self, changes: Mapping[str, Mapping[str, object]], dataset: str = DATASET) -> None:
        """Changes settings of a dataset in params.yaml."""
        path = self.folder / "params.yaml"
        params = YAML().load(path)
        update(params["datasets"][dataset], changes)
        YAML().dump(params, path)

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


def write_params(path: Path, changes: Mapping[str, Mapping[str, object]], dataset: str = DATASET) -> None:
    """Writes a parameter file with one dataset: quick settings, and some changes of these."""
    settings = YAML(typ="safe").load(RECIPE)
    update(settings, QUICK)
    update(settings, changes)
    yaml = YAML()
    yaml.width = 4096  # as `sprue run` writes it, so that the lines stay as they are
    yaml.dump({"datasets": {dataset: settings}}, path)


def update(settings: dict[str, object], changes: Mapping[str, Mapping[str, object]]) -> None:
    """Changes values of sections; a section that is missing is added."""
    for section, values in changes.items():
        settings.setdefault(section, {}).update(values)


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


def write_images(folder: Path, classes: Sequence[str] = CLASSES, good: int = GOOD) -> Path:
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
def checkout(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Checkout:
    """The tracked files of the working tree as a repository with quick parameters, and images that DVC does not track.

    Untracked files stay behind: the demo leaves some in a clone.
    """
    checkout = Checkout(tmp_path_factory.mktemp("checkout"), environment)
    listed = subprocess.run(["git", "ls-files", "--cached", "-z"], cwd=ROOT, capture_output=True, check=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (checkout.folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, checkout.folder / name)
    write_params(checkout.folder / "params.yaml", {})
    checkout.git("init", "--quiet")
    checkout.commit("The working tree")
    write_images(checkout.folder / "data" / DATASET)
    return checkout


@pytest.fixture(scope="session")
def images() -> Callable[[Path], Path]:
    """Writes a small dataset; see `write_images`."""
    return write_images


@pytest.fixture(scope="session")
def parameters() -> Callable[..., None]:
    """Writes quick parameters; see `write_params`."""
    return write_params


@pytest.fixture
def add_images() -> Callable[[Path, str, int], None]:
    """Writes further good images of a class into a folder."""

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


@pytest.fixture(scope="module")
def ray_head(
    request: pytest.FixtureRequest,
    environment: dict[str, str],
    object_store: dict[str, str],
    ports: Callable[[int], list[int]],
) -> Iterator[Head]:
    """``ray start --head`` in a folder that holds nothing; the object store's keys are in its environment alone.

    It ends with the module: a head that nobody uses takes a tenth of a core. It has one CPU, so that a job starts one
    process of each kind, unless the module's CPUS says otherwise.
    """
    # Not below pytest's folder: the paths of Ray's sockets would be too long.
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    port, dashboard, agent, client = ports(4)
    cpus = getattr(request.module, "CPUS", 1)
    command = [
        "ray", "start", "--head", "--block", f"--num-cpus={cpus}", f"--port={port}", f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}", "--include-dashboard=true",
        f"--temp-dir={folder}", "--object-store-memory=500000000",
        "--include-log-monitor=false",
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
