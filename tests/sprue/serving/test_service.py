"""The service over HTTP, on a real Ray Serve."""

import base64
import hashlib
import io
import json
import math
import os
import re
import socket
import sqlite3
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx
import mlflow
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from PIL import Image, ImageColor

from sprue.cli import main
from sprue.errors import SprueError
from sprue.inference.heatmap import OUTLINE, heat, overlay
from sprue.release.decision_store import FOLDER, rows_of
from sprue.release.replay import replay
from sprue.serving.decision_log import why_kept
from sprue.serving.keys import add_key, remove_key
from sprue.serving.launch import stop_serving
from sprue.serving.metrics import label
from sprue.serving.parsing import MULTIPART
from sprue.tracking import registry


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def with_header_of(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header states a size."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [header, b"IDAT" + zlib.compress(bytes(1000)), b"IEND"]
    parts = [struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def digest(model: str) -> str:
    """Of a champion's files."""
    return registry.find_registered(model, registry.CHAMPION).digest


def parts(total: int) -> Iterator[bytes]:
    """A body without Content-Length, in parts."""
    for _ in range(total // 2**16):
        yield bytes(2**16)


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
    image = plant.image("brick")
    image.paste((255, 255, 255), (140, 20, 180, 60))
    body = plant.post("brick", image, params={"heatmap": "true"}).json()
    assert body["is_anomalous"] and body["p_value"] <= body["alpha"] and body["score"] > body["threshold"]
    overlaid = np.asarray(Image.open(io.BytesIO(base64.b64decode(body["heatmap_png"])))).astype(float)
    change_HW = np.abs(overlaid - np.asarray(image)).mean(2)
    assert change_HW[20:60, 140:180].mean() > 3 * change_HW[90:, :90].mean()
    assert 0 < body["predicted_mask_fraction"] < 0.5


def test_heat_map_as_png_or_in_json(plant: Any) -> None:
    image, detector = plant.image("gräs 2"), plant.detectors["gräs 2"]
    image.paste((255, 255, 255), (140, 20, 180, 60))
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
    images = {f"{seed}.png": plant.image("brick", seed) for seed in range(1, 6)}
    images["1.png"].paste((255, 255, 255), (140, 20, 180, 60))
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
    assert plant.client.post(url, files={"part": ("x.png", png(image))}, data={"line": "7"}).json() == raw
    for content_type in ("application/octet-stream", "image/jpeg", "IMAGE/PNG; q=1"):
        assert plant.post("brick", image, headers={"Content-Type": content_type}).json() == raw
    request = plant.client.build_request("POST", url, content=png(image))
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


REFUSALS: dict[str, tuple[dict[str, Any], int, str]] = {
    "unknown class": ({"url": "/v1/classes/bolt/score", "content": b"x"}, 404, "unknown_class"),
    "unknown path": ({"url": "/v2/classes"}, 404, "not_found"),
    "wrong method": ({"method": "GET"}, 405, "method_not_allowed"),
    "wrong argument": ({"params": {"heatmap": "perhaps"}}, 422, "invalid_request"),
    "text": ({"content": b"a,b", "headers": {"Content-Type": "text/csv"}}, 415, "not_an_image"),
    "curl's default": (
        {"content": b"\x89PNG", "headers": {"Content-Type": "application/x-www-form-urlencoded"}},
        415,
        "not_an_image",
    ),
    "noise": ({"content": bytes(range(256)), "headers": {"Content-Type": "image/png"}}, 415, "not_an_image"),
    "other format": ({"content": b"GIF89a" + bytes(100)}, 415, "not_an_image"),
    "truncated": ({"content": png(Image.effect_noise((64, 64), 50))[:1500]}, 422, "undecodable_image"),
    "empty": ({"content": b""}, 422, "empty_image"),
    "empty file": ({"files": {"image": ("x.png", b"")}}, 422, "empty_image"),
    "form without file": ({"files": {"image": (None, "text")}}, 422, "no_file"),
    "two files": ({"files": {"a": b"x", "b": b"y"}}, 422, "malformed_form"),
    "no boundary": ({"content": b"x", "headers": {"Content-Type": MULTIPART}}, 422, "malformed_form"),
    "bad form": (
        {"content": b"x", "headers": {"Content-Type": "multipart/form-data; boundary=b"}},
        422,
        "malformed_form",
    ),
    "too many bytes": ({"content": bytes(3 * 2**20)}, 413, "too_many_bytes"),
    "too many bytes in parts": ({"content": lambda: parts(30 * 2**20)}, 413, "too_many_bytes"),
    "too many bytes in a form": ({"files": {"image": bytes(3 * 2**20)}}, 413, "too_many_bytes"),
    "decompression bomb": ({"content": with_header_of(60_000, 60_000)}, 413, "too_many_pixels"),
    "too many pixels": ({"content": with_header_of(2_001, 2_000)}, 413, "too_many_pixels"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_are_json_and_the_service_keeps_running(plant: Any, case: str) -> None:
    arguments, status, code = REFUSALS[case]
    arguments = {"method": "POST", "url": "/v1/classes/brick/score"} | arguments
    if callable(arguments.get("content")):
        arguments["content"] = arguments["content"]()
    answer = plant.client.request(**arguments)
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert set(answer.json()) == {"error"} and set(answer.json()["error"]) == {"code", "message"}
    assert answer.json()["error"]["code"] == code
    assert plant.post("brick", plant.image("brick")).status_code == 200


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


def test_connections_without_a_body_disturb_nobody(plant: Any) -> None:
    """More than Ray Serve would let a replica of 64 requests have; each gets the reason why it ends."""
    lines = ["POST /v1/classes/brick/score HTTP/1.1", "Host: 127.0.0.1", "Content-Length: 1000"]
    head = "\r\n".join([*lines, f"Authorization: {plant.client.headers['authorization']}", "\r\n"]).encode()
    with ExitStack() as stack:
        idle = [stack.enter_context(socket.create_connection(("127.0.0.1", plant.port))) for _ in range(70)]
        for each in idle:
            each.sendall(head)
        assert plant.post("brick", plant.image("brick")).status_code == 200
        assert plant.client.get("/livez").json() == {"status": "alive"}
        assert plant.client.get("/readyz").json()["status"] == "ready"
        for each in idle:
            each.settimeout(60)
            received = b"".join(iter(partial(each.recv, 2**16), b""))  # until the service closes the connection
            assert received.startswith(b"HTTP/1.1 408 ") and b'"code":"slow_body"' in received


def test_what_is_too_much_is_refused_and_the_rest_is_scored(plant: Any) -> None:
    image, address, key = plant.image("brick"), plant.client.base_url, plant.client.headers
    # Connections of its own: those that were refused are refused again until their time has come.
    with httpx.Client(base_url=address, headers=key, timeout=30) as client, ThreadPoolExecutor(72) as pool:
        crowd = replace(plant, client=client)
        answers = list(pool.map(lambda _: crowd.post("brick", image), range(144)))
    refused = [answer for answer in answers if answer.status_code != 200]
    assert 0 < len(refused) < len(answers)
    for answer in refused:
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "overloaded")
        assert 1 <= int(answer.headers["retry-after"]) <= 15
    scores = [answer.json()["score"] for answer in answers if answer.status_code == 200]
    np.testing.assert_allclose(scores, plant.post("brick", image).json()["score"], rtol=1e-4)


def test_a_request_says_how_long_it_may_take(plant: Any) -> None:
    image = plant.image("brick")
    assert plant.post("brick", image, headers={"X-Request-Timeout-Ms": "30000"}).status_code == 200
    late = plant.post("brick", image, headers={"X-Request-Timeout-Ms": "1"})
    assert (late.status_code, late.json()["error"]["code"]) in [(504, "deadline_exceeded"), (408, "slow_body")]
    wrong = plant.post("brick", image, headers={"X-Request-Timeout-Ms": "1 s"})
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (422, "invalid_timeout")


ROUTES = [("POST", "/v1/classes/brick/score"), ("GET", "/v1/classes")]


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_routes_need_a_key_of_their_scope(plant: Any, method: str, path: str) -> None:
    monitor = add_key(plant.keys, f"monitor-{method}", ["admin"])
    for sent in ("", "Bearer", "Bearer wrong", f"Basic {monitor}", f"bearer {monitor[:-1]}"):
        answer = plant.client.request(method, path, headers={"Authorization": sent})
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "unauthorized")
        assert answer.headers["www-authenticate"] == "Bearer"
    answer = plant.client.request(method, path, headers={"Authorization": f"Bearer {monitor}"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden")


def test_keys_are_made_and_revoked_while_the_service_runs(plant: Any) -> None:
    image = plant.image("brick")
    line = {"Authorization": f"Bearer {add_key(plant.keys, 'line', ['score'])}"}
    assert plant.post("brick", image, headers=line).status_code == 200
    whole = plant.keys.read_bytes()
    plant.keys.write_text('{"format": 1}')
    assert plant.post("brick", image, headers=line).status_code == 200
    health = plant.client.get("/readyz").json()
    assert health["status"] == "degraded" and "is no file of keys: keys: Field required" in health["keys_error"]
    plant.keys.write_bytes(whole)
    remove_key(plant.keys, "line")
    assert plant.post("brick", image, headers=line).status_code == 401
    assert plant.client.get("/readyz").json()["status"] == "ready"


def test_strangers_and_lines_see_only_that_the_service_is_ready(plant: Any) -> None:
    line = add_key(plant.keys, "curious", ["score"])
    for sent in ("", f"Bearer {line}"):
        assert plant.client.get("/readyz", headers={"Authorization": sent}).json() == {"status": "ready"}
        assert plant.client.get("/livez", headers={"Authorization": sent}).json() == {"status": "alive"}


@pytest.mark.parametrize("path", ["/v1/classes", "/livez", "/docs", "/nothing"])
def test_other_names_of_the_service_are_refused(plant: Any, path: str) -> None:
    assert plant.client.get(path, headers={"Host": f"localhost:{plant.port}"}).status_code != 421
    answer = plant.client.get(path, headers={"Host": f"evil.example:{plant.port}"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (421, "foreign_host")


def test_a_request_keeps_its_id_or_gets_one(plant: Any) -> None:
    answer = plant.client.get("/livez", headers={"X-Request-Id": "line-7:0001"})
    assert answer.headers.get_list("x-request-id") == ["line-7:0001"]
    assert len({plant.client.get("/livez").headers["x-request-id"] for _ in range(2)}) == 2
    for odd in ("a b", "x" * 129, "{}"):
        answer = plant.client.get("/livez", headers={"X-Request-Id": odd})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request_id")


def test_errors_of_ray_serves_proxy_are_json(plant: Any) -> None:
    answer = plant.post("brick", plant.image("brick"), headers={"X-Request-Timeout-Seconds": "0.001"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "gateway_timeout")


class TestSamplesOfViews:
    """A class of three views beside the others."""

    def test_a_sample_of_several_views_is_one_form(self, plant: Any, boxes: Any) -> None:
        detector, ((top, left, right), *_) = boxes
        expected = detector.predict([[top, left, right]], plant.engine)
        url, files = "/v1/classes/box/score", [png(image) for image in (top, left, right)]
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
        files = [("image", png(image)) for image in images]
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
        forms = [[png(image) for image in images] for images in samples]
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

    @pytest.mark.parametrize(
        ("names", "query", "code", "words"),
        [
            (["image", "image"], "", "wrong_views", "3 images; send a form with the files 0-top, 1-left, 2-right"),
            (["0-top", "1-left", "image"], "", "wrong_views", "got 3 0-top, 1-left, image"),
            (["0-top", "0-top", "1-left"], "", "wrong_views", "got 3 0-top, 0-top, 1-left"),
            (["a", "b", "c", "d"], "", "malformed_form", "3"),
            (
                ["a", "b", "c"],
                "?heatmap=1&view=top",
                "unknown_view",
                "has no view 'top'; it has: 0-top, 1-left, 2-right",
            ),
        ],
    )
    def test_forms_that_are_no_sample_of_the_class(
        self, plant: Any, boxes: Any, names: list[str], query: str, code: str, words: str
    ) -> None:
        _, ((image, *_), *_) = boxes
        answer = plant.client.post(f"/v1/classes/box/score{query}", files=[(name, png(image)) for name in names])
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, code)
        assert words in answer.json()["error"]["message"]

    def test_one_of_a_samples_images_is_damaged_or_missing(self, plant: Any, boxes: Any) -> None:
        _, ((image, *_), *_) = boxes
        good, noise = png(image), png(Image.effect_noise((64, 64), 50))[:1500]
        for third, status, code, words in (
            (noise, 422, "undecodable_image", "image 3 is damaged"),
            (b"text", 415, "not_an_image", "image 3 is not an image"),
            (with_header_of(2_001, 2_000), 413, "too_many_pixels", "image 3 "),
            (b"", 422, "empty_image", "no bytes"),
        ):
            answer = plant.client.post("/v1/classes/box/score", files=[("v", each) for each in (good, good, third)])
            assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
            assert words in answer.json()["error"]["message"]
        alone = plant.post("box", image)
        assert (alone.status_code, alone.json()["error"]["code"]) == (422, "wrong_views")
        # Each of the three images may be as large as one alone.
        large = plant.client.post("/v1/classes/box/score", files=[("v", bytes(3 * 2**20)), ("v", good), ("v", good)])
        assert large.json()["error"]["code"] == "not_an_image"
        assert plant.client.post("/v1/classes/box/score", content=bytes(7 * 2**20)).status_code == 413


def with_defect(image: Image.Image) -> Image.Image:
    image.paste((255, 255, 255), (140, 20, 180, 60))
    return image


def test_a_decision_is_a_row_and_the_images_of_alarms_are_kept(plant: Any) -> None:
    image = with_defect(plant.image("brick"))
    names = {"X-Request-Id": "line-7:4711", "X-Station": "line-7"}
    answer = plant.post("brick", image, headers=names, params={"heatmap": "true"})
    body, found = answer.json(), plant.decision(answer)
    assert (found.request_id, found.station, found.kept) == ("line-7:4711", "line-7", "alarm")
    for name in ("dataset", "class_name", "score", "p_value", "alpha", "threshold", "is_anomalous"):
        assert getattr(found, name) == body[name], name
    assert found.version == body["model"]["version"] and found.batch == 1
    assert abs(time.time() - found.at.timestamp()) < 60 and 0 < found.latency_s < 30
    assert found.images == (hashlib.sha256(png(image)).hexdigest(),)
    assert plant.decisions.read_images(found) == [png(image)]
    folder = plant.folder / "digests"
    plant.detectors["brick"].save(folder)
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    assert dict(each.split(":") for each in found.files) == digests

    others = [plant.post("gräs 2", plant.image("gräs 2", seed)) for seed in range(6)]
    found = [plant.decision(answer) for answer in others]
    assert {len(answer.headers["x-request-id"]) for answer in others} == {36} and {each.station for each in found} == {
        ""
    }
    assert [each.score for each in found] == [answer.json()["score"] for answer in others]
    assert [each.kept for each in found] == [why_kept(each, 0.5) for each in found]
    assert "" in {each.kept for each in found}


@pytest.mark.parametrize("name", ["line 7", "x" * 129, "line\t7"])
def test_a_station_is_fit_for_a_table(plant: Any, name: str) -> None:
    answer = plant.post("brick", plant.image("brick"), headers={"X-Station": name})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_station")


def test_an_alarm_is_replayed(plant: Any) -> None:
    images = [with_defect(plant.image("brick", seed)) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:  # so that some are scored together
        answers = list(pool.map(lambda image: plant.post("brick", image), images))
    found = [decision for decision in map(plant.decision, answers) if decision.kept]
    assert len(found) > 1
    for recorded in found:
        repeated = replay(plant.decisions, recorded.request_id)
        assert repeated.decision == recorded and repeated.equal and repeated.engine == recorded.engine
        assert repeated.score == pytest.approx(recorded.score, rel=1e-4)

    def run(request_id: str) -> Any:
        command = ["--store", str(plant.folder / "store"), "replay", request_id, "--json"]
        environment = {"MLFLOW_TRACKING_URI": mlflow.get_tracking_uri()}
        return CliRunner().invoke(main, command, prog_name="sprue", env=environment, catch_exceptions=False)

    recorded = found[0]
    done = run(recorded.request_id)
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["equal"] and json.loads(done.output)["decision"]["score"] == recorded.score

    # A row that says something else than the detector is found out; it is the last with this identifier.
    altered = replace(recorded, score=recorded.score * 1.01, at=datetime.now(UTC))
    plant.decisions.write_part(altered.at.date(), "altered", rows_of([altered]))
    done = run(recorded.request_id)
    assert done.exit_code == 1 and "the result differs from the recorded one" in done.output
    assert '"equal": false' in done.output and '"same_id": 2' in done.output

    # So are a version with other files, one that is gone, and an image that was not kept.
    others = [
        (replace(altered, request_id="files", files=("flow.safetensors:ab",)), "has other files now than those"),
        (replace(altered, request_id="version", version=999), "has no version '999'"),
        (replace(altered, request_id="kept", kept=""), "the images of kept were not kept"),
    ]
    plant.decisions.write_part(altered.at.date(), "others", rows_of([each for each, _ in others]))
    for each, words in others:
        done = run(each.request_id)
        assert done.exit_code == 1 and words in done.output


def test_champions_are_checked_again(plant: Any) -> None:
    def run() -> Any:
        command = ["--store", str(plant.folder / "store"), "recheck", "gräs 2", "--json"]
        environment = {"MLFLOW_TRACKING_URI": mlflow.get_tracking_uri()}
        done = CliRunner().invoke(main, command, prog_name="sprue", env=environment, catch_exceptions=False)
        (found,) = json.loads(done.stdout)
        return done, found

    answers = (plant.post("gräs 2", plant.image("gräs 2", seed)) for seed in range(100, 150))
    recorded = next(each for each in map(plant.decision, answers) if each.kept)
    done, found = run()
    assert done.exit_code == 0, done.output
    assert found["samples"] >= 1 and found["chance"] > 0.001
    assert found["replayed"] >= 1 and found["findings"] == []

    # More alarms than good samples can have, and a score that the detector does not give.
    now = datetime.now(UTC)
    alarm = replace(recorded, request_id="alarm", kept="", at=now, is_anomalous=True)
    alarms = [alarm] * (40 + 10 * found["samples"])
    other = replace(recorded, request_id="other", score=recorded.score * 1.01, at=now)
    plant.decisions.write_part(now.date(), "recheck", rows_of([*alarms, other]))
    done, found = run()
    assert done.exit_code == 1 and "1 of 1 champions need a look: textures.gräs 2" in done.output
    many, one = found["findings"]
    assert "of the samples are alarms; among good ones alone, the chance of as many is" in many
    assert one.startswith("other of ") and f"and had {other.score!r}" in one
    (plant.decisions.folder / "rows" / f"date={now.date()}" / "recheck.parquet").unlink()


def test_a_store_that_takes_no_decisions_is_named(plant: Any) -> None:
    rows = plant.folder / "store" / FOLDER / "rows"
    plant.decision(plant.post("brick", plant.image("brick")))
    aside = rows.rename(rows.with_name("aside"))
    try:
        rows.write_text("a file where a folder has to be")
        answer = plant.post("brick", plant.image("brick"))
        assert answer.status_code == 200
        assert plant.wait(lambda health: "decisions_error" in health)["status"] == "degraded"
    finally:
        rows.unlink()
        aside.rename(rows)
    plant.wait(lambda health: health["status"] == "ready")
    assert plant.decision(answer).score == answer.json()["score"]


def test_a_request_that_is_refused_is_no_decision(plant: Any) -> None:
    answer = plant.client.post("/v1/classes/brick/score", content=b"text", headers={"X-Request-Id": "refused"})
    assert answer.status_code == 415
    plant.decision(plant.post("brick", plant.image("brick")))  # later ones are there
    with pytest.raises(SprueError, match="has no decision 'refused'"):
        plant.decisions.find("refused")


def values(query: Any, expression: str, by: str = "") -> dict[str, float]:
    """A query's values, by a label; by all labels without one."""
    found = query(expression)
    return {each["metric"].get(by) or str(each["metric"]): float(each["value"][1]) for each in found}


COUNTS = {
    "answers": 'ray_sprue_requests_total{route="score", status="200"}',
    "decisions": "ray_sprue_decisions_total",
    "alarms": 'ray_sprue_decisions_total{decision="anomalous"}',
    "scores": "ray_sprue_relative_score_count",
    "above": 'ray_sprue_relative_score_count - ignoring(le) ray_sprue_relative_score_bucket{le="1.0"}',
    "p-values": "ray_sprue_p_value_count",
    "hits": 'ray_sprue_model_cache_total{outcome="hit"}',
    "unknown": 'ray_sprue_refusals_total{code="unknown_class"}',
}


def test_prometheus_has_what_every_panel_of_the_board_shows(plant: Any, prometheus: Any, panels: Any) -> None:
    alarm, fine = with_defect(plant.image("brick")), plant.image("gräs 2")
    left = {query: title for title, queries in panels("serving.json", "30s").items() for query in queries}
    assert len(left) > 15
    deadline = time.monotonic() + 240
    while left and time.monotonic() < deadline:
        plant.post("brick", alarm, params={"heatmap": "true"})
        plant.post("gräs 2", fine)
        plant.post("bolt", fine)  # an unknown class
        time.sleep(0.5)
        for query in list(left):
            # Models without a request have no quantiles.
            if any(map(math.isfinite, values(prometheus, query).values())):
                del left[query]
    assert not left

    # What is shown is what has happened.
    def settled() -> dict[str, dict[str, float]]:
        """The counts by series, once scrapes that all succeeded have found the same."""
        counts, last, scraped = {}, None, 0.0
        while counts != last or not scraped:
            time.sleep(6)
            last, counts = counts, {name: values(prometheus, query) for name, query in COUNTS.items()}
            scraped = min(values(prometheus, "min_over_time(up[10s])").values(), default=0.0)
        return counts

    before = settled()
    for image, name in [(alarm, "brick")] * 3 + [(fine, "gräs 2")] * 7 + [(fine, "bolt")]:
        plant.post(name, image)
    after = settled()
    # A series of a worker that has ended may be gone.
    grown = {name: sum(after[name][each] - before[name].get(each, 0.0) for each in after[name]) for name in COUNTS}
    assert grown == {
        "answers": 10,
        "decisions": 10,
        "alarms": 3,
        "scores": 10,
        "above": 3,
        "p-values": 10,
        "hits": 10,
        "unknown": 1,
    }
    assert values(prometheus, "max by (model) (ray_sprue_alpha)", "model")["textures.brick"] == 0.05
    served = {
        label(each["model"]["name"]): each["model"]["version"]
        for each in plant.client.get("/v1/classes").json()["classes"]
    }
    assert values(prometheus, "max by (model) (ray_sprue_champion_version)", "model").items() >= served.items()

    # A swap is seen.
    plant.release("textures.brick", plant.detectors["brick"])
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        swaps = values(prometheus, "sum by (model) (changes(ray_sprue_champion_version[1m]))", "model")
        if swaps.get("textures.brick"):
            break
        time.sleep(0.5)
    assert swaps["textures.brick"] == 1
    mlflow.MlflowClient().set_registered_model_alias("textures.brick", registry.CHAMPION, str(served["textures.brick"]))
    plant.wait(lambda _: plant.post("brick", alarm).json()["model"]["version"] == served["textures.brick"])


def without_flow(folder: Path) -> None:
    (folder / "flow.safetensors").unlink()


def with_higher_scores(folder: Path) -> None:
    """As if good parts scored higher, so that defects pass."""
    file = folder / "detector.json"
    saved = json.loads(file.read_text())
    saved["calibration"]["scores"] = [score + 10 for score in saved["calibration"]["scores"]]
    file.write_text(json.dumps(saved))


def test_a_champion_whose_files_were_changed_is_refused(plant: Any) -> None:
    image = plant.image("brick")
    image.paste((255, 255, 255), (140, 20, 180, 60))
    before = plant.post("brick", image).json()
    assert before["is_anomalous"]

    def require_the_old_one() -> None:
        answer = plant.post("brick", image).json()
        assert answer["is_anomalous"] and answer["model"] == before["model"]

    version = plant.release("textures.brick", plant.detectors["brick"], damage=with_higher_scores)
    reason = plant.wait(lambda health: health["status"] == "degraded")["failures"]["textures.brick"]
    assert f"the files of textures.brick version {version} are not those that were registered: detector.json" in reason
    require_the_old_one()

    # Nor is one that was registered without digests.
    source = plant.folder / "models" / "by-hand"
    plant.detectors["brick"].save(source / "artifacts" / "detector")
    client = mlflow.MlflowClient()
    by_hand = client.create_model_version("textures.brick", str(source), run_id=None).version
    client.set_registered_model_alias("textures.brick", registry.CHAMPION, by_hand)
    plant.wait(lambda health: "has no digests" in health["failures"].get("textures.brick", ""))
    require_the_old_one()

    client.set_registered_model_alias("textures.brick", registry.CHAMPION, str(before["model"]["version"]))
    plant.wait(lambda health: health["status"] == "ready")


def test_champions_are_followed(plant: Any) -> None:
    brick = plant.detectors["brick"]
    image = plant.image("brick")

    # A champion that can't be loaded is reported, and the previous one is kept.
    damaged = plant.release("textures.brick", brick, damage=without_flow)
    health = plant.wait(lambda each: each["status"] == "degraded")
    assert f"brick version {damaged}" in health["failures"]["textures.brick"]
    assert plant.post("brick", image).json()["model"]["version"] == 1

    # One that can be loaded replaces it without a refused request.
    version = plant.release("textures.brick", plant.detectors["gräs 2"])
    seen = []
    while version not in seen:
        seen.append(plant.post("brick", image).raise_for_status().json()["model"]["version"])
        assert len(seen) < 1000
    assert plant.wait(lambda each: each["status"] == "ready")["failures"] == {}
    expected = plant.detectors["gräs 2"].predict([image], plant.engine).score_B[0]
    assert plant.post("brick", image).json()["score"] == pytest.approx(float(expected), rel=1e-4)

    # A class of which nothing can be loaded is unavailable, not unknown.
    plant.release("parts.bolt", brick, damage=without_flow)
    plant.wait(lambda each: "parts.bolt" in each["failures"])
    answer = plant.post("bolt", image)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "class_unavailable")

    # A new class needs no restart.
    plant.release("parts.bolt", brick)
    assert plant.wait(lambda each: each["classes"] == 3)["engines"] == 1
    answer = plant.post("bolt", image)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"]["version"] == 2

    # A registry that has lost its champions, all at once, is reported, and the old ones are kept.
    file = mlflow.get_registry_uri().removeprefix("sqlite:///")
    with closing(sqlite3.connect(file, timeout=60)) as database, database:
        database.execute("DELETE FROM registered_model_aliases WHERE alias = ?", [registry.CHAMPION])
    plant.wait(lambda each: "no champion" in each.get("registry_error", ""))
    answer = plant.post("brick", image)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"]["version"] == version


def test_the_last_decisions_are_written_when_the_service_stops(plant: Any) -> None:
    answer = plant.post("brick", plant.image("brick"))
    assert answer.status_code == 200, answer.text
    stop_serving()
    assert plant.decisions.find(answer.headers["x-request-id"])[0].score == answer.json()["score"]
