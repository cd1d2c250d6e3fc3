"""Two datasets with a class of one name, run at once in a checkout that has a third; all are served.

One of them holds out no calibration set: it fits a flow for each of three folds.
"""

import json
import subprocess
import time

import mlflow
import pytest
import requests
from ruamel.yaml import YAML
from upath import UPath

from sprue.data.folds import fold_split
from sprue.data.manifest import Manifest

NAMES = ("left", "right")
CPUS = 2  # the two run at once
FOLDS = 3


@pytest.fixture(scope="module")
def recipe(checkout, parameters, tmp_path_factory):
    """A recipe file with quick settings, as ``sprue run --recipe`` takes it."""
    folder = tmp_path_factory.mktemp("recipe")
    parameters(folder / "params.yaml", {"calibration": {"alpha": 0.05}})
    settings = YAML().load(folder / "params.yaml")["datasets"]["tiny"]
    sections = ("features", "flow", "fit", "scoring")
    YAML().dump({name: settings[name] for name in sections}, folder / "quick.yaml")
    return folder / "quick.yaml"


@pytest.fixture(scope="module")
def datasets(checkout, ray_head, images, recipe, parameters, tmp_path_factory):
    """A checkout in which the pipelines of two datasets have run at the same time; their outputs."""
    folder = tmp_path_factory.mktemp("datasets")
    shared = checkout.copy(folder / "checkout")
    before = (shared.folder / "params.yaml").read_text()
    parameters(folder / "folds.yaml", {"calibration": {"alpha": 0.05, "folds": FOLDS}}, "left")
    params = YAML().load(shared.folder / "params.yaml")
    params["datasets"] |= YAML().load(folder / "folds.yaml")["datasets"]
    YAML().dump(params, shared.folder / "params.yaml")
    commands = {}
    for name in NAMES:
        source = images(folder / "sources" / name, classes=("brick",))
        command = ("python", "-m", "sprue.cli", "run", str(source), "--name", name, "--recipe", str(recipe))
        commands[name] = shared.start(*command, RAY_ADDRESS=ray_head.address)
    said = {name: process.communicate(timeout=1000)[0] for name, process in commands.items()}
    for name, process in commands.items():
        assert process.returncode == 0, said[name]
    return shared, said, before


def test_both_have_run_and_neither_has_changed_the_other(datasets):
    shared, said, before = datasets
    params = YAML(typ="safe").load(shared.folder / "params.yaml")["datasets"]
    assert list(params) == ["tiny", *sorted(NAMES, key=list(params).index)]
    assert (shared.folder / "params.yaml").read_text().startswith(before.rstrip("\n"))
    for name in NAMES:
        assert f"store/{name}/evaluation/index.html" in said[name]
        status = shared.dvc("status", *(f"{stage}@{name}" for stage in ("manifest", "features", "search", "fit")))
        assert "up to date" in status
    uri = f"sqlite:///{shared.folder}/store/mlflow/mlflow.db"
    models = mlflow.MlflowClient(uri, uri).search_registered_models()
    assert {model.name: model.aliases for model in models} == {f"{name}.brick": {"champion": 1} for name in NAMES}


def test_the_champion_with_folds_is_three_flows_that_all_good_images_calibrate(datasets):
    shared, _, _ = datasets
    store = shared.folder / "store/left"
    for fold in range(1, FOLDS + 1):
        assert (store / f"fits/brick/fold-{fold}/flow.safetensors").is_file()
    saved = json.loads((store / "detectors/brick/detector.json").read_text())
    frame = Manifest.read(UPath(store / "manifest.parquet")).frame
    good = frame[frame["split"] != "test"]
    assert sorted(good["split"].unique()) == sorted(
        fold_split(fold, validates) for fold in range(1, FOLDS + 1) for validates in (False, True)
    )
    assert (saved["members"], saved["calibration"]["folds"]) == (FOLDS, FOLDS)
    assert len(saved["calibration"]["scores"]) == len(good)
    client = mlflow.MlflowClient(*[f"sqlite:///{shared.folder}/store/mlflow/mlflow.db"] * 2)
    version = client.get_model_version_by_alias("left.brick", "champion")
    assert version.description.startswith(f"3 flows, patchflow, fitted on {len(good)} good images")
    run = client.get_run(version.run_id)
    children = client.search_runs([run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run.info.run_id}'")
    assert sorted(child.info.run_name for child in children) == [f"brick/fold-{fold}" for fold in range(1, FOLDS + 1)]
    assert {child.info.status for child in children} == {"FINISHED"}
    assert len(client.get_metric_history(children[0].info.run_id, "validation_nll")) == 2
    again = shared.run("python", "-m", "sprue.cli", "reproduce", "left.brick", "--json")
    assert json.loads(again.stdout)["equal"] is True


def test_a_change_of_one_reruns_its_stages_alone(datasets):
    shared, _, _ = datasets
    shared.set_params({"fit": {"epochs": 3}}, dataset="left")
    status = shared.dvc("status", *(f"search@{name}" for name in NAMES))
    assert "search@left" in status and "search@right" not in status
    shared.set_params({"fit": {"epochs": 2}}, dataset="left")


def test_both_are_served_by_their_full_names(datasets, ray_head, ports):
    shared, _, _ = datasets
    (port,) = ports(1)
    image = next((shared.folder / "data/left/brick/test/spot").iterdir()).read_bytes()
    url = f"http://127.0.0.1:{port}/v1/classes"

    def score(name):
        return requests.post(f"{url}/{name}/score", data=image, headers={"Content-Type": "image/png"}, timeout=60)

    service = shared.start("python", "-m", "sprue.cli", "serve", "--port", str(port), RAY_ADDRESS=ray_head.address)
    try:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and service.poll() is None:
            try:
                requests.get(url, timeout=5).raise_for_status()
                break
            except requests.RequestException:
                time.sleep(0.5)
        for name in NAMES:
            answer = score(f"{name}.brick")
            assert answer.ok, answer.text
            assert answer.json()["dataset"] == name and answer.json()["class_name"] == "brick"
            assert (answer.json()["model"]["name"], answer.json()["model"]["version"]) == (f"{name}.brick", 1)
        ambiguous = score("brick")
        assert ambiguous.status_code == 409
        assert "left.brick" in ambiguous.json()["error"]["message"]
        assert "right.brick" in ambiguous.json()["error"]["message"]
    finally:
        service.send_signal(2)
        try:
            service.wait(30)
        except subprocess.TimeoutExpired:
            service.kill()
