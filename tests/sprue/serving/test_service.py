"""Scores, classes and the description over HTTP, on a real Ray Serve."""

import base64
import hashlib
import io
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import mlflow
import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageColor

from sprue.inference.heatmap import OUTLINE, heat, overlay
from sprue.release.replay import replay
from sprue.tracking import registry


def digest(model: str) -> str:
    """Of a champion's files."""
    return registry.find_registered(model, registry.CHAMPION).digest


def assert_alike(shown: Image.Image, expected: Image.Image, atol: int) -> None:
    """Compares all but the outline, which rounding can move by a pixel here and there."""
    images = [np.asarray(image).astype(int) for image in (shown, expected)]
    apart_HW = np.abs(images[0] - images[1]).max(2)
    outline_HW = np.any([(image == ImageColor.getrgb(OUTLINE)).all(2) for image in images], axis=0)
    assert apart_HW[~outline_HW].max() <= atol
    assert (apart_HW[outline_HW] > 0).sum() < 0.002 * apart_HW.size


@pytest.mark.parametrize(("name", "class_name"), [("textures.brick", "brick"), ("gräs 2", "gräs 2")])
def test_scores_are_the_detectors_own(plant: Any, name: str, class_name: str) -> None:
    image, detector = plant.image(class_name), plant.detectors[class_name]
    expected = detector.predict([image], plant.engine)
    body = plant.post(name, image).raise_for_status().json()
    assert body.pop("score") == pytest.approx(float(expected.score_B[0]), rel=1e-4)
    assert body == {
        "dataset": "textures",
        "class_name": class_name,
        "p_value": expected.p_value_B[0],
        "alpha": 0.05,
        "is_anomalous": bool(expected.is_anomalous_B[0]),
        "threshold": detector.calibration.threshold,
        "model": {"name": f"textures.{class_name}", "version": 1, "digest": digest(f"textures.{class_name}")},
    }


def test_a_defect_is_anomalous_and_hot_where_it_is(plant: Any) -> None:
    image = plant.defective("brick")
    body = plant.post("brick", image, params={"heatmap": "true"}).json()
    assert body["is_anomalous"] and body["p_value"] <= body["alpha"] and body["score"] > body["threshold"]
    overlaid = np.asarray(Image.open(io.BytesIO(base64.b64decode(body["heatmap_png"])))).astype(float)
    change_HW = np.abs(overlaid - np.asarray(image)).mean(2)
    assert change_HW[20:60, 140:180].mean() > 3 * change_HW[90:, :90].mean()
    assert 0 < body["predicted_mask_fraction"] < 0.5


def test_heat_map_as_png_or_in_json(plant: Any) -> None:
    image, detector = plant.defective("gräs 2"), plant.detectors["gräs 2"]
    in_json = plant.post("gräs 2", image, params={"heatmap": "true"})
    alone = plant.post("gräs 2", image, params={"heatmap": "true"}, headers={"Accept": "image/png"})
    assert in_json.headers["content-type"] == "application/json" and alone.headers["content-type"] == "image/png"
    assert in_json.headers["vary"] == alone.headers["vary"] == "Accept"
    shown = Image.open(io.BytesIO(alone.content))
    assert shown.size == image.size == (200, 160)
    assert base64.b64decode(in_json.json()["heatmap_png"]) == alone.content

    predictions = detector.predict([image], plant.engine)
    map_HW = predictions.anomaly_map(0, (160, 200))
    predicted_mask_HW = detector.calibration.predicted_mask(map_HW)
    assert predicted_mask_HW.any()
    assert_alike(shown, overlay(image, heat(map_HW, detector.calibration), predicted_mask_HW), atol=2)

    headers, body = alone.headers, in_json.json()
    assert float(headers["x-sprue-score"]) == body["score"]
    assert float(headers["x-sprue-p-value"]) == body["p_value"]
    assert float(headers["x-sprue-threshold"]) == body["threshold"]
    assert (
        float(headers["x-sprue-predicted-mask-fraction"])
        == body["predicted_mask_fraction"]
        == pytest.approx(predicted_mask_HW.mean(), abs=1e-3)
    )
    assert headers["x-sprue-is-anomalous"] == str(body["is_anomalous"]).lower()
    assert headers["x-sprue-dataset"] == "textures" and unquote(headers["x-sprue-class"]) == "gräs 2"
    assert unquote(headers["x-sprue-model"]) == "textures.gräs 2" and headers["x-sprue-model-version"] == "1"


def test_a_folder_is_scored_as_over_http(plant: Any, tmp_path: Path) -> None:
    """By the command, on a Ray of its own.

    Requests come one at a time, and the folder's images in one batch: the backbone's sums differ in their order.
    """
    images = {f"{seed}.png": plant.image("brick", seed) for seed in range(2, 6)} | {"1.png": plant.defective("brick")}
    (tmp_path / "images").mkdir()
    for name, image in images.items():
        image.save(tmp_path / "images" / name)
    command = [sys.executable, "-m", "sprue.cli", "score", "images", "--class", "textures.brick"]
    done = subprocess.run(
        [*command, "--output", "scores", "--heatmaps", "--json"],
        cwd=tmp_path,
        env=os.environ | {"MLFLOW_TRACKING_URI": mlflow.get_tracking_uri()},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    table = pd.read_parquet(json.loads(done.stdout)["scores"]).set_index("sample")
    assert sorted(table.index) == sorted(images) and table["is_anomalous"]["1.png"]
    for name, image in images.items():
        row, body = table.loc[name], plant.post("brick", image, params={"heatmap": "true"}).json()
        assert float(row["score"]) == pytest.approx(body["score"], rel=1e-4)
        same = ("p_value", "is_anomalous", "alpha", "threshold", "dataset", "class_name")
        assert {key: row[key] for key in same} == {key: body[key] for key in same}
        assert (body["model"]["name"], body["model"]["version"]) == ("textures.brick", row["version"])
        assert row["predicted_mask_fraction"] == pytest.approx(body["predicted_mask_fraction"], abs=1e-3)
        drawn = Image.open(tmp_path / "scores" / f"version-{row['version']}" / row["heatmap"])
        assert_alike(drawn, Image.open(io.BytesIO(base64.b64decode(body["heatmap_png"]))), atol=2)


def test_the_same_image_in_a_form_or_as_bytes_of_any_name(plant: Any) -> None:
    image = plant.image("brick")
    raw = plant.post("brick", image).json()
    url = "/v1/classes/brick/score"
    assert plant.client.post(url, files={"part": ("x.png", plant.png(image))}, data={"line": "7"}).json() == raw
    for content_type in ("application/octet-stream", "image/jpeg", "IMAGE/PNG; q=1"):
        assert plant.post("brick", image, headers={"Content-Type": content_type}).json() == raw
    request = plant.client.build_request("POST", url, content=plant.png(image))
    assert "content-type" not in request.headers
    assert plant.client.send(request).json() == raw


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16", "CMYK"])
@pytest.mark.parametrize("size", [(1, 1), (3000, 2), (97, 131)])
def test_any_mode_and_size(plant: Any, mode: str, size: tuple[int, int]) -> None:
    image, buffer = plant.image("brick").resize(size), io.BytesIO()
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    image.convert(mode).save(buffer, "TIFF" if mode == "CMYK" else "PNG")
    url = "/v1/classes/brick/score?heatmap=1"
    answer = plant.client.post(url, content=buffer.getvalue(), headers={"Accept": "image/png"})
    assert answer.status_code == 200, answer.text
    assert Image.open(io.BytesIO(answer.content)).size == size


def test_concurrent_requests_share_a_backbone_run(plant: Any) -> None:
    names = list(plant.detectors) * 12
    images = [plant.image(name, seed) for seed, name in enumerate(names)]
    expected = [plant.detectors[n].predict([i], plant.engine).score_B[0] for n, i in zip(names, images, strict=True)]
    assert plant.client.get("/readyz").json()["engines"] == 1
    with ThreadPoolExecutor(len(names)) as pool:
        answers = list(pool.map(plant.post, names, images))
    np.testing.assert_allclose([answer.json()["score"] for answer in answers], expected, rtol=1e-4)
    assert [answer.json()["class_name"] for answer in answers] == names
    batches = [int(re.search(r"batch of (\d+)", answer.headers["server-timing"])[1]) for answer in answers]
    assert 8 <= max(batches) <= 16
    # All images of a batch report the same size.
    assert all(batches.count(size) % size == 0 for size in set(batches)), batches


def test_an_unknown_class_lists_the_known_ones(plant: Any) -> None:
    message = plant.client.post("/v1/classes/bolt/score").json()["error"]["message"]
    assert "'bolt'" in message and "textures.brick, textures.gräs 2" in message


def test_a_class_of_two_datasets_needs_its_datasets_name(plant: Any) -> None:
    image = plant.image("brick")
    plant.release("walls.brick", replace(plant.detectors["brick"], dataset="walls"))
    plant.wait(lambda health: health["classes"] == 3)
    ambiguous = plant.post("brick", image)
    assert (ambiguous.status_code, ambiguous.json()["error"]["code"]) == (409, "ambiguous_class")
    assert "textures.brick or walls.brick" in ambiguous.json()["error"]["message"]
    for dataset in ("textures", "walls"):
        body = plant.post(f"{dataset}.brick", image).raise_for_status().json()
        assert (body["dataset"], body["class_name"], body["model"]["name"]) == (dataset, "brick", f"{dataset}.brick")
    assert plant.post("gräs 2", image).status_code == 200
    mlflow.MlflowClient().delete_registered_model_alias("walls.brick", registry.CHAMPION)
    plant.wait(lambda health: health["classes"] == 2)
    assert plant.post("brick", image).json()["model"]["name"] == "textures.brick"


def test_classes_health_and_description(plant: Any) -> None:
    brick, grass = plant.client.get("/v1/classes").json()["classes"]
    spec = plant.detectors["brick"].spec
    assert abs(datetime.now(UTC) - datetime.fromisoformat(brick.pop("since"))) < timedelta(minutes=20)
    assert brick == {
        "dataset": "textures",
        "class_name": "brick",
        "model": {"name": "textures.brick", "version": 1, "digest": digest("textures.brick")},
        "alpha": 0.05,
        "threshold": plant.detectors["brick"].calibration.threshold,
        "pixel_threshold": plant.detectors["brick"].calibration.pixel_threshold,
        "calibration_samples": 20,
        "features": {"fingerprint": spec.fingerprint, "backbone": "tf_efficientnet_lite0", "input_size": 128},
    }
    assert grass["class_name"] == "gräs 2" and grass["features"] == brick["features"]
    health = plant.client.get("/readyz").json()
    assert health.pop("loaded_bytes") > 0 and 0 <= health.pop("registry_age_s") < 20
    assert health == {"status": "ready", "classes": 2, "loaded": 2, "engines": 1, "failures": {}}

    description = plant.client.get("/openapi.json").json()
    score = description["paths"]["/v1/classes/{name}/score"]["post"]
    assert {"multipart/form-data", "image/png"} <= set(score["requestBody"]["content"])
    statuses = "200 400 401 403 404 408 409 413 415 421 422 429 500 503 504"
    assert set(statuses.split()) == set(score["responses"])
    assert "self" not in {parameter["name"] for parameter in score["parameters"]}
    for status, response in score["responses"].items():
        schema = response["content"]["application/json"]["schema"]["$ref"]
        assert schema.endswith("Score" if status == "200" else "ErrorBody")
    page = plant.client.get("/docs")
    assert page.status_code == 200
    linked = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert linked
    for url in linked:
        assert url.startswith("/")
        assert plant.client.get(url).status_code == 200


class TestSamplesOfViews:
    """A class of three views beside the others."""

    def test_a_sample_of_several_views_is_one_form(self, plant: Any, boxes: Any) -> None:
        detector, ((top, left, right), *_) = boxes
        expected = detector.predict([[top, left, right]], plant.engine)
        url, files = "/v1/classes/box/score", [plant.png(image) for image in (top, left, right)]
        in_order = plant.client.post(url, files=[("image", each) for each in files])
        body = in_order.raise_for_status().json()
        assert body["score"] == pytest.approx(float(expected.score_B[0]), rel=1e-4)
        assert body["p_value"] == expected.p_value_B[0] and body["is_anomalous"] == bool(expected.is_anomalous_B[0])
        assert [each["view"] for each in body["images"]] == list(detector.views)
        scores = [each["score"] for each in body["images"]]
        np.testing.assert_allclose(scores, expected.image_score_BV[0], rtol=1e-4)
        assert len(set(scores)) == 3 and max(scores) == body["score"]

        by_name = dict(zip(detector.views, files, strict=True))
        for names in (detector.views, detector.views[::-1]):
            answer = plant.client.post(url, files=[(name, by_name[name]) for name in names])
            named = [each["score"] for each in answer.raise_for_status().json()["images"]]
            np.testing.assert_allclose(named, scores, rtol=1e-4)
        turned = plant.client.post(url, files=[("image", each) for each in files[::-1]]).json()
        assert turned["images"][0]["score"] != pytest.approx(scores[0], rel=1e-2)

        # Samples and single images that arrive together share a backbone run, and each gets its own response.
        with ThreadPoolExecutor(12) as pool:
            boxed = [pool.submit(plant.client.post, url, files=[("image", each) for each in files]) for _ in range(8)]
            lone = pool.submit(plant.post, "brick", top)
        for each in boxed:
            np.testing.assert_allclose([image["score"] for image in each.result().json()["images"]], scores, rtol=1e-4)
        alone = plant.detectors["brick"].predict([top], plant.engine).score_B[0]
        assert lone.result().json()["score"] == pytest.approx(float(alone), rel=1e-4)
        assert plant.client.get("/readyz").json()["engines"] == 1
        (listed,) = (each for each in plant.client.get("/v1/classes").json()["classes"] if each["class_name"] == "box")
        assert listed["views"] == list(detector.views) and listed["calibration_samples"] == 20

    def test_the_heat_map_of_a_view(self, plant: Any, boxes: Any) -> None:
        detector, (images, *_) = boxes
        files = [("image", plant.png(image)) for image in images]
        predictions = detector.predict([images], plant.engine)
        hottest = detector.views[int(predictions.image_score_BV[0].argmax())]
        for index, view in enumerate(detector.views):
            url = f"/v1/classes/box/score?heatmap=1&view={view}"
            alone = plant.client.post(url, files=files, headers={"Accept": "image/png"})
            assert alone.headers["x-sprue-view"] == view
            shown, (width, height) = Image.open(io.BytesIO(alone.content)), images[index].size
            assert shown.size == (width, height)
            map_HW = predictions.anomaly_map(0, (height, width), index)
            predicted_mask_HW = detector.calibration.predicted_mask(map_HW)
            assert_alike(shown, overlay(images[index], heat(map_HW, detector.calibration), predicted_mask_HW), atol=3)
            assert float(alone.headers["x-sprue-predicted-mask-fraction"]) == pytest.approx(
                predicted_mask_HW.mean(), abs=1e-3
            )
            in_json = plant.client.post(url, files=files).json()
            assert in_json["heatmap_view"] == view and base64.b64decode(in_json["heatmap_png"]) == alone.content
            if view == hottest:
                unasked = plant.client.post("/v1/classes/box/score?heatmap=1", files=files).json()
                assert (unasked["heatmap_view"], unasked["heatmap_png"]) == (view, in_json["heatmap_png"])

    def test_a_sample_is_one_row_and_is_replayed(self, plant: Any, boxes: Any) -> None:
        detector, samples = boxes
        forms = [[plant.png(image) for image in images] for images in samples]
        answers = [
            plant.client.post("/v1/classes/box/score", files=list(zip(detector.views, form, strict=True))[::-1])
            for form in forms
        ]
        kept = 0
        for form, answer in zip(forms, answers, strict=True):
            found = plant.decision(answer)
            assert found.images == tuple(hashlib.sha256(each).hexdigest() for each in form)
            if found.kept:
                kept += 1
                assert plant.decisions.read_images(found) == form
                assert replay(plant.decisions, found.request_id).equal
        assert kept
