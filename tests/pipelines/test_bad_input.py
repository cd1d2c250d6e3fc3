"""What a user gets wrong: one message that names the culprit, no traceback, before anything expensive is started."""

import socket

import numpy as np
import pytest
from PIL import Image

NO_RAY = {"RAY_ADDRESS": "127.0.0.1:1"}
"""A cluster that is not there: a stage that went on to its work would end with a traceback."""


class Bench:
    """A dataset and parameters that a test spoils, and stages that read them."""

    def __init__(self, checkout, folder, write_pictures, write_params):
        self.checkout, self.folder, self.write_params = checkout, folder, write_params
        self.data, self.store, self.params = folder / "data", folder / "store", folder / "params.yaml"
        write_pictures(self.data)
        write_params(self.params, {})

    def stage(self, name, **environment):
        arguments = ("--params", str(self.params), "--data", str(self.data), "--store", str(self.store))
        return self.checkout.run("python", f"pipelines/{name}.py", *arguments, check=False, **{**NO_RAY, **environment})

    def refuses(self, stage, *culprits, **environment):
        """The stage ends at once with one message."""
        refused(self.stage(stage, **environment), f"sprue {stage}: ", *culprits)


def refused(done, beginning, *culprits):
    """The command failed, and the end of what it said is one message that names the culprits."""
    assert done.returncode not in (0, None)
    assert "Traceback" not in done.stderr, done.stderr
    assert beginning in done.stderr
    message = done.stderr[done.stderr.index(beginning) :].strip()
    for culprit in culprits:
        assert culprit in message
    assert len(message) < 600


@pytest.fixture
def bench(checkout, tmp_path, pictures, parameters):
    """Good to start with."""
    return Bench(checkout, tmp_path, pictures, parameters)


@pytest.fixture(scope="module")
def with_manifest(checkout, tmp_path_factory, pictures, parameters):
    """One whose manifest is written, for tests that spoil no more than the parameters."""
    bench = Bench(checkout, tmp_path_factory.mktemp("bench"), pictures, parameters)
    done = bench.stage("manifest")
    assert done.returncode == 0, done.stderr
    return bench


def test_empty_class(bench):
    for picture in (bench.data / "grass/train/good").iterdir():
        picture.unlink()
    bench.refuses("manifest", "grass", "put its good pictures there")
    assert not bench.store.exists()


def test_too_few_pictures(bench):
    for picture in sorted((bench.data / "grass/train/good").iterdir())[5:]:
        picture.unlink()
    bench.refuses("manifest", "class 'grass' has 5 good training pictures", "Add good pictures")
    assert not bench.store.exists()


def test_mask_of_another_size(bench):
    mask = bench.data / "brick/ground_truth/spot/001_mask.png"
    Image.fromarray(np.zeros((50, 40), np.uint8)).save(mask)
    bench.refuses("manifest", "brick/ground_truth/spot/001_mask.png is 40x50", "96x96")
    assert not bench.store.exists()


def test_damaged_pictures_are_listed_and_left_out(bench):
    truncated, text = bench.data / "brick/train/good/000.png", bench.data / "grass/test/good/notes.txt"
    truncated.write_bytes(truncated.read_bytes()[:300])
    text.write_text("no picture")
    done = bench.stage("manifest")
    assert done.returncode == 0, done.stderr
    for path in ("brick/train/good/000.png", "grass/test/good/notes.txt"):
        assert f"left out: {path}: " in done.stderr
    assert (bench.store / "tiny/manifest.parquet").exists()


@pytest.mark.parametrize(
    ("stage", "section", "changes", "culprits"),
    [
        ("manifest", "manifest", {"sed": 1}, ["manifest: there is no setting 'sed'"]),
        ("manifest", "calibration", {"alpha": "much"}, ["calibration", "much"]),
        ("features", "features", {"block": [1]}, ["features: there is no setting 'block'"]),
        ("features", "features", {"backbone": "efficientnet_lite9"}, ["no model 'efficientnet_lite9'"]),
        ("features", "features", {"weights": "file:/nowhere/w.pth"}, ["features.weights", "/nowhere/w.pth"]),
        ("features", "fit", {"epoch": 3}, ["fit: there is no setting 'epoch'"]),
        ("features", "scoring", {"tip": 0.1}, ["scoring: there is no setting 'tip'"]),
        ("features", "flow", {"depth": 2}, ["flow: patchflow has no setting 'depth'"]),
        ("features", "search", {"trials": -1}, ["search: trials is not below 0"]),
        ("search", "search", {"trials": 1, "space": {"flow.depth": [1, 2]}}, ["tiny/features", "features stage first"]),
    ],
)
def test_wrong_parameters(with_manifest, stage, section, changes, culprits):
    with_manifest.write_params(with_manifest.params, {section: changes})
    with_manifest.refuses(stage, *culprits)
    assert not (with_manifest.store / "tiny/features").exists()


def test_unreachable_tracking_server(with_manifest, closed_port):
    with_manifest.write_params(with_manifest.params, {})
    address = f"http://127.0.0.1:{closed_port}"
    with_manifest.refuses("fit", address, "does not answer", MLFLOW_TRACKING_URI=address)
    command = ("python", "pipelines/run.py", "--data", str(with_manifest.data), "--name", "new")
    done = with_manifest.checkout.run(*command, check=False, MLFLOW_TRACKING_URI=address, **NO_RAY)
    refused(done, "sprue: ", address, "does not answer")
    assert not (with_manifest.checkout.folder / "data/new").exists()


def test_missing_folder(checkout, tmp_path):
    done = checkout.run("python", "pipelines/run.py", "--data", str(tmp_path / "nowhere"), check=False, **NO_RAY)
    refused(done, "sprue: ", f"there is no folder {tmp_path}/nowhere")


def test_busy_port(checkout):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        done = checkout.run("python", "pipelines/serve.py", "--port", str(port), check=False, **NO_RAY)
    refused(done, "sprue serve: ", f"port {port} of 127.0.0.1 is busy")


@pytest.fixture
def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
