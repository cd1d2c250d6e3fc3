"""What a user gets wrong: one message that names the culprit, no traceback, before anything expensive is started.

Stages and commands run in this process, where an exception that is no message fails the test; one of each runs as a
user starts it.
"""

import json
import signal
import socket

import mlflow
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from sprue.cli import main
from sprue.data.manifest import Manifest
from sprue.stages.runtime import run_stage
from sprue.store import location

NO_RAY = {"RAY_ADDRESS": "127.0.0.1:1"}
"""A cluster that is not there: a stage that went on to its work would end with a traceback."""


class Bench:
    """A dataset and parameters that a test spoils, and the arguments of stages that read them."""

    def __init__(self, folder, write_images, write_params):
        self.write_params = write_params
        self.data, self.store, self.params = folder / "data", folder / "store", folder / "params.yaml"
        self.arguments = ("--params", str(self.params), "--data", str(self.data), "--store", str(self.store))
        write_images(self.data)
        write_params(self.params, {})

    def refuses(self, stage, *culprits):
        """The stage ends at once with one message."""
        with pytest.raises(SystemExit) as ended:
            run_stage(stage, self.arguments)
        check(ended.value.code, f"sprue {stage}: ", *culprits)


def check(message, beginning, *culprits):
    """It is one message that names the culprits."""
    assert message.startswith(beginning)
    for culprit in culprits:
        assert culprit in message
    assert max(map(len, message.splitlines())) < 600


def refused(done, beginning, *culprits):
    """The process failed, and the end of what it said is one message that names the culprits."""
    assert done.returncode not in (0, None)
    assert "Traceback" not in done.stderr, done.stderr
    assert beginning in done.stderr
    check(done.stderr[done.stderr.index(beginning) :].strip(), beginning, *culprits)


def sprue(*arguments):
    """Runs the command in this process."""
    return CliRunner().invoke(main, arguments, prog_name="sprue", catch_exceptions=False)


@pytest.fixture(autouse=True)
def this_process(monkeypatch):
    """The environment of stages in this process, which is left as it was."""
    monkeypatch.setenv("RAY_ADDRESS", NO_RAY["RAY_ADDRESS"])
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tracking, registry = mlflow.get_tracking_uri(), mlflow.get_registry_uri()
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)
    mlflow.set_tracking_uri(tracking)
    mlflow.set_registry_uri(registry)


@pytest.fixture
def bench(tmp_path, images, parameters):
    """Good to start with."""
    return Bench(tmp_path, images, parameters)


@pytest.fixture(scope="module")
def with_manifest(tmp_path_factory, images, parameters):
    """One whose manifest is written, for tests that spoil no more than the parameters."""
    bench = Bench(tmp_path_factory.mktemp("bench"), images, parameters)
    run_stage("manifest", bench.arguments)
    return bench


def goes_on_without_grass(bench, *culprits):
    """The manifest stage names what is wrong with grass, and goes on with brick."""
    run_stage("manifest", bench.arguments)
    failures = json.loads((bench.store / "tiny/failures/manifest.json").read_text())
    assert list(failures) == ["grass"]
    check(failures["grass"], "class 'grass' has ", *culprits)
    assert Manifest.read(location(str(bench.store / "tiny/manifest.parquet"))).classes == ["brick"]


def test_empty_class(bench):
    for image in (bench.data / "grass/train/good").iterdir():
        image.unlink()
    goes_on_without_grass(bench, "no images in grass/train/good", "put its good images there")


def test_too_few_images(bench):
    for image in sorted((bench.data / "grass/train/good").iterdir())[5:]:
        image.unlink()
    goes_on_without_grass(bench, "5 good training images", "Add good images")


def test_mask_of_another_size(bench):
    mask = bench.data / "grass/ground_truth/spot/001_mask.png"
    Image.fromarray(np.zeros((50, 40), np.uint8)).save(mask)
    goes_on_without_grass(bench, "grass/ground_truth/spot/001_mask.png is 40x50", "96x96")


def test_no_class_is_left(bench):
    for name in ("brick", "grass"):
        for image in sorted((bench.data / name / "train/good").iterdir())[5:]:
            image.unlink()
    bench.refuses("manifest", "class 'brick' has 5 good training images", "class 'grass' has 5 good")
    assert not bench.store.exists()


def test_damaged_images_are_listed_and_skipped(checkout, bench):
    truncated, text = bench.data / "brick/train/good/000.png", bench.data / "grass/test/good/notes.txt"
    truncated.write_bytes(truncated.read_bytes()[:300])
    text.write_text("no image")
    done = checkout.run("python", "pipelines/manifest.py", *bench.arguments, check=False, **NO_RAY)
    assert done.returncode == 0, done.stderr
    for path in ("brick/train/good/000.png", "grass/test/good/notes.txt"):
        assert f"skipped: {path}: " in done.stderr
    assert (bench.store / "tiny/manifest.parquet").exists()


def test_all_mistakes_are_reported_by_the_first_stage(with_manifest):
    with_manifest.write_params(with_manifest.params, {"fit": {"epochs": 2.5, "epoch": 3}, "calibration": {"alpha": 2}})
    with_manifest.refuses(
        "manifest",
        "datasets.tiny.fit.epochs: 2.5: input should be a valid integer",
        "datasets.tiny.fit.epoch: there is no such setting; did you mean 'epochs'?",
        "datasets.tiny.calibration.alpha: 2: input should be less than 1",
    )


@pytest.mark.parametrize(
    ("stage", "section", "changes", "culprits"),
    [
        ("features", "features", {"backbone": "efficientnet_lite9"}, ["no model 'efficientnet_lite9'"]),
        ("features", "features", {"weights": "file:/nowhere/w.pth"}, ["features.weights", "/nowhere/w.pth"]),
        ("search", "search", {"trials": 1}, ["tiny/features", "features stage first"]),
    ],
)
def test_settings_that_only_a_stage_can_judge(with_manifest, stage, section, changes, culprits):
    with_manifest.write_params(with_manifest.params, {section: changes})
    with_manifest.refuses(stage, *culprits)
    assert not (with_manifest.store / "tiny/features").exists()


def test_a_stage_as_a_user_starts_it(checkout, with_manifest):
    with_manifest.write_params(with_manifest.params, {"fit": {"epochs": 2.5}})
    done = checkout.run("python", "pipelines/manifest.py", *with_manifest.arguments, check=False, **NO_RAY)
    refused(done, "sprue manifest: ", "datasets.tiny.fit.epochs: 2.5: input should be a valid integer")


def test_unreachable_tracking_server(with_manifest, closed_port, tmp_path, monkeypatch):
    with_manifest.write_params(with_manifest.params, {})
    address = f"http://127.0.0.1:{closed_port}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    with_manifest.refuses("fit", address, "does not answer")
    monkeypatch.chdir(tmp_path)
    done = sprue("run", str(with_manifest.data), "--name", "new")
    assert done.exit_code == 1
    check(done.stderr.strip(), "sprue run: ", address, "does not answer")
    assert not (tmp_path / "data/new").exists()


def test_missing_folder(checkout, tmp_path):
    command = ("python", "-m", "sprue.cli", "run", str(tmp_path / "nowhere"))
    refused(checkout.run(*command, check=False, **NO_RAY), "run: ", f"there is no folder {tmp_path}/nowhere")


def test_busy_port(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)  # on a cluster, a service may run there
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        done = sprue("serve", "--port", str(port))
    assert done.exit_code == 1
    check(done.stderr.strip(), "sprue serve: ", f"port {port} of 127.0.0.1 is busy")


@pytest.fixture
def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
