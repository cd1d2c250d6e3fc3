"""The service over HTTP, on a real Ray Serve."""

import base64
import io
import re
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import unquote

import mlflow
import numpy as np
import pytest
from PIL import Image, ImageColor

from sprue.errors import SprueError
from sprue.inference.heatmap import OUTLINE, heat, overlay
from sprue.serving.run import require_free_port, serve_champions
from sprue.serving.upload import MULTIPART
from sprue.tracking import registry


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def claiming(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims a size."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [header, b"IDAT" + zlib.compress(bytes(1000)), b"IEND"]
    parts = [struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def parts(total: int) -> Iterator[bytes]:
    """A body without Content-Length, in parts."""
    for _ in range(total // 2**16):
        yield bytes(2**16)


def assert_alike(shown: Image.Image, expected: Image.Image, atol: int) -> None:
    """But for the outline, which rounding can move by a pixel here and there."""
    pictures = [np.asarray(picture).astype(int) for picture in (shown, expected)]
    apart_HW = np.abs(pictures[0] - pictures[1]).max(2)
    outline_HW = np.any([(picture == ImageColor.getrgb(OUTLINE)).all(2) for picture in pictures], axis=0)
    assert apart_HW[~outline_HW].max() <= atol
    assert (apart_HW[outline_HW] > 0).sum() < 0.002 * apart_HW.size


def test_a_busy_port_is_refused_before_anything_starts(cluster: Any) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        started = time.monotonic()
        with pytest.raises(SprueError, match=f"port {port} of 127.0.0.1 is busy"):
            serve_champions(port=port)
    assert time.monotonic() - started < 2
    require_free_port("127.0.0.1", port)
    with pytest.raises(SprueError, match="can't be listened on"):  # an address of no machine
        require_free_port("192.0.2.1", port)
    for none in (0, 70_000):
        with pytest.raises(SprueError, match=f"port {none} is none: give a number from 1 to 65535"):
            require_free_port("127.0.0.1", none)


def test_an_empty_registry_says_to_run_the_pipeline(cluster: Any, unused_port: int) -> None:
    with pytest.raises(SprueError, match="run the pipeline first"):
        serve_champions(port=unused_port)


@pytest.mark.parametrize("class_name", ["brick", "gräs 2"])
def test_scores_are_the_detectors_own(plant: Any, class_name: str) -> None:
    image, detector = plant.picture(class_name), plant.detectors[class_name]
    expected = detector.predict([image], plant.engine)
    body = plant.post(class_name, image).raise_for_status().json()
    assert body.pop("score") == pytest.approx(float(expected.score_B[0]), rel=1e-4)
    assert body == {
        "class_name": class_name,
        "p_value": expected.p_value_B[0],
        "alpha": 0.05,
        "is_anomalous": bool(expected.is_anomalous_B[0]),
        "threshold": detector.calibration.threshold,
        "model": {"name": class_name, "version": 1},
    }


def test_a_defect_is_anomalous_and_hot_where_it_is(plant: Any) -> None:
    image = plant.picture("brick")
    image.paste((255, 255, 255), (140, 20, 180, 60))
    body = plant.post("brick", image, params={"heatmap": "true"}).json()
    assert body["is_anomalous"] and body["p_value"] <= body["alpha"] and body["score"] > body["threshold"]
    laid = np.asarray(Image.open(io.BytesIO(base64.b64decode(body["heatmap_png"])))).astype(float)
    change_HW = np.abs(laid - np.asarray(image)).mean(2)
    assert change_HW[20:60, 140:180].mean() > 3 * change_HW[90:, :90].mean()
    assert 0 < body["marked_share"] < 0.5


def test_heat_map_as_png_or_in_json(plant: Any) -> None:
    image, detector = plant.picture("gräs 2"), plant.detectors["gräs 2"]
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
    marked_HW = detector.calibration.marked(map_HW)
    assert marked_HW.any()
    assert_alike(shown, overlay(image, heat(map_HW, detector.calibration), marked_HW), atol=2)

    figures = {name: value for name, value in alone.headers.items() if name.startswith("x-sprue-")}
    body = in_json.json()
    assert float(figures["x-sprue-score"]) == body["score"]
    assert float(figures["x-sprue-p-value"]) == body["p_value"]
    assert float(figures["x-sprue-threshold"]) == body["threshold"]
    assert float(figures["x-sprue-marked-share"]) == body["marked_share"] == pytest.approx(marked_HW.mean(), abs=1e-3)
    assert figures["x-sprue-is-anomalous"] == str(body["is_anomalous"]).lower()
    assert unquote(figures["x-sprue-class"]) == "gräs 2"
    assert figures["x-sprue-model-version"] == "1"


def test_the_same_picture_in_a_form_or_as_bytes_of_any_name(plant: Any) -> None:
    image = plant.picture("brick")
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
    image, buffer = plant.picture("brick").resize(size), io.BytesIO()
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    image.convert(mode).save(buffer, "TIFF" if mode == "CMYK" else "PNG")
    url = "/v1/classes/brick/score?heatmap=1"
    answer = plant.client.post(url, content=buffer.getvalue(), headers={"Accept": "image/png"})
    assert answer.status_code == 200, answer.text
    assert Image.open(io.BytesIO(answer.content)).size == size


def test_concurrent_requests_share_a_backbone_run(plant: Any) -> None:
    names = list(plant.detectors) * 12
    images = [plant.picture(name, seed) for seed, name in enumerate(names)]
    expected = [plant.detectors[n].predict([i], plant.engine).score_B[0] for n, i in zip(names, images, strict=True)]
    assert plant.client.get("/healthz").json()["engines"] == 1
    with ThreadPoolExecutor(len(names)) as pool:
        answers = list(pool.map(plant.post, names, images))
    np.testing.assert_allclose([answer.json()["score"] for answer in answers], expected, rtol=1e-4)
    assert [answer.json()["class_name"] for answer in answers] == names
    batches = [int(re.search(r"batch of (\d+)", answer.headers["server-timing"])[1]) for answer in answers]
    assert 8 <= max(batches) <= 16
    # Each batch says its size to all of its pictures.
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
    "truncated": ({"content": png(Image.effect_noise((64, 64), 50))[:1500]}, 422, "undecodable_picture"),
    "empty": ({"content": b""}, 422, "empty_picture"),
    "empty file": ({"files": {"image": ("x.png", b"")}}, 422, "empty_picture"),
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
    "decompression bomb": ({"content": claiming(60_000, 60_000)}, 413, "too_many_pixels"),
    "too many pixels": ({"content": claiming(2_001, 2_000)}, 413, "too_many_pixels"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_are_json_and_the_service_goes_on(plant: Any, case: str) -> None:
    arguments, status, code = REFUSALS[case]
    arguments = {"method": "POST", "url": "/v1/classes/brick/score"} | arguments
    if callable(arguments.get("content")):
        arguments["content"] = arguments["content"]()
    started = time.monotonic()
    answer = plant.client.request(**arguments)
    assert time.monotonic() - started < 2
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert set(answer.json()) == {"error"} and set(answer.json()["error"]) == {"code", "message"}
    assert answer.json()["error"]["code"] == code
    assert plant.post("brick", plant.picture("brick")).status_code == 200


def test_an_unknown_class_is_told_which_there_are(plant: Any) -> None:
    message = plant.client.post("/v1/classes/bolt/score").json()["error"]["message"]
    assert "'bolt'" in message and "brick, gräs 2" in message


def test_classes_health_and_description(plant: Any) -> None:
    brick, grass = plant.client.get("/v1/classes").json()["classes"]
    spec = plant.detectors["brick"].spec
    assert brick == {
        "class_name": "brick",
        "model": {"name": "brick", "version": 1},
        "alpha": 0.05,
        "threshold": plant.detectors["brick"].calibration.threshold,
        "pixel_threshold": plant.detectors["brick"].calibration.pixel_threshold,
        "calibration_pictures": 20,
        "features": {"fingerprint": spec.fingerprint, "backbone": "tf_efficientnet_lite0", "input_size": 128},
    }
    assert grass["class_name"] == "gräs 2" and grass["features"] == brick["features"]
    health = plant.client.get("/healthz").json()
    assert health == {"status": "ok", "classes": 2, "engines": 1, "failures": {}, "registry_error": None}

    description = plant.client.get("/openapi.json").json()
    score = description["paths"]["/v1/classes/{class_name}/score"]["post"]
    assert {"multipart/form-data", "image/png"} <= set(score["requestBody"]["content"])
    assert {"200", "404", "413", "415", "422", "500", "503"} == set(score["responses"])
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
        url, files = "/v1/classes/box/score", [png(image) for image in (top, left, right)]
        in_order = plant.client.post(url, files=[("image", each) for each in files])
        body = in_order.raise_for_status().json()
        assert body["score"] == pytest.approx(float(expected.score_B[0]), rel=1e-4)
        assert body["p_value"] == expected.p_value_B[0] and body["is_anomalous"] == bool(expected.is_anomalous_B[0])
        assert [each["view"] for each in body["pictures"]] == list(detector.views)
        scores = [each["score"] for each in body["pictures"]]
        np.testing.assert_allclose(scores, expected.picture_score_BV[0], rtol=1e-4)
        assert len(set(scores)) == 3 and max(scores) == body["score"]

        by_name = dict(zip(detector.views, files, strict=True))
        for names in (detector.views, detector.views[::-1]):
            answer = plant.client.post(url, files=[(name, by_name[name]) for name in names])
            named = [each["score"] for each in answer.raise_for_status().json()["pictures"]]
            np.testing.assert_allclose(named, scores, rtol=1e-4)
        turned = plant.client.post(url, files=[("image", each) for each in files[::-1]]).json()
        assert turned["pictures"][0]["score"] != pytest.approx(scores[0], rel=1e-2)

        # Samples and lone pictures that come in together share a backbone run, and each gets its own answer.
        with ThreadPoolExecutor(12) as pool:
            boxed = [pool.submit(plant.client.post, url, files=[("image", each) for each in files]) for _ in range(8)]
            lone = pool.submit(plant.post, "brick", top)
        for each in boxed:
            np.testing.assert_allclose(
                [picture["score"] for picture in each.result().json()["pictures"]], scores, rtol=1e-4
            )
        alone = plant.detectors["brick"].predict([top], plant.engine).score_B[0]
        assert lone.result().json()["score"] == pytest.approx(float(alone), rel=1e-4)
        assert plant.client.get("/healthz").json()["engines"] == 1
        (listed,) = (each for each in plant.client.get("/v1/classes").json()["classes"] if each["class_name"] == "box")
        assert listed["views"] == list(detector.views) and listed["calibration_pictures"] == 20

    def test_the_heat_map_of_a_view(self, plant: Any, boxes: Any) -> None:
        detector, (images, *_) = boxes
        files = [("image", png(image)) for image in images]
        predictions = detector.predict([images], plant.engine)
        hottest = detector.views[int(predictions.picture_score_BV[0].argmax())]
        for place, view in enumerate(detector.views):
            url = f"/v1/classes/box/score?heatmap=1&view={view}"
            alone = plant.client.post(url, files=files, headers={"Accept": "image/png"})
            assert alone.headers["x-sprue-view"] == view
            shown, (width, height) = Image.open(io.BytesIO(alone.content)), images[place].size
            assert shown.size == (width, height)
            map_HW = predictions.anomaly_map(0, (height, width), place)
            marked_HW = detector.calibration.marked(map_HW)
            assert_alike(shown, overlay(images[place], heat(map_HW, detector.calibration), marked_HW), atol=3)
            assert float(alone.headers["x-sprue-marked-share"]) == pytest.approx(marked_HW.mean(), abs=1e-3)
            in_json = plant.client.post(url, files=files).json()
            assert in_json["heatmap_view"] == view and base64.b64decode(in_json["heatmap_png"]) == alone.content
            if view == hottest:
                unasked = plant.client.post("/v1/classes/box/score?heatmap=1", files=files).json()
                assert (unasked["heatmap_view"], unasked["heatmap_png"]) == (view, in_json["heatmap_png"])

    @pytest.mark.parametrize(
        ("names", "query", "code", "words"),
        [
            (["image", "image"], "", "wrong_views", "3 pictures; send a form with the files 0-top, 1-left, 2-right"),
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

    def test_one_of_a_samples_pictures_is_damaged_or_missing(self, plant: Any, boxes: Any) -> None:
        _, ((image, *_), *_) = boxes
        good, noise = png(image), png(Image.effect_noise((64, 64), 50))[:1500]
        for third, status, code, words in (
            (noise, 422, "undecodable_picture", "picture 3 is damaged"),
            (b"text", 415, "not_an_image", "picture 3 is not a picture"),
            (claiming(2_001, 2_000), 413, "too_many_pixels", "picture 3 "),
            (b"", 422, "empty_picture", "no bytes"),
        ):
            answer = plant.client.post("/v1/classes/box/score", files=[("v", each) for each in (good, good, third)])
            assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
            assert words in answer.json()["error"]["message"]
        alone = plant.post("box", image)
        assert (alone.status_code, alone.json()["error"]["code"]) == (422, "wrong_views")
        # Each of the three pictures may be as large as one alone.
        large = plant.client.post("/v1/classes/box/score", files=[("v", bytes(3 * 2**20)), ("v", good), ("v", good)])
        assert large.json()["error"]["code"] == "not_an_image"
        assert plant.client.post("/v1/classes/box/score", content=bytes(7 * 2**20)).status_code == 413


def test_champions_are_followed(plant: Any) -> None:
    brick = plant.detectors["brick"]
    image = plant.picture("brick")

    # A champion that can't be loaded is reported, and the one before it goes on.
    damaged = plant.release("brick", brick, damaged=True)
    health = plant.wait(lambda each: each["status"] == "degraded")
    assert f"brick version {damaged}" in health["failures"]["brick"]
    assert plant.post("brick", image).json()["model"]["version"] == 1

    # One that can is swapped in without a refused request.
    version = plant.release("brick", plant.detectors["gräs 2"])
    seen = []
    while version not in seen:
        seen.append(plant.post("brick", image).raise_for_status().json()["model"]["version"])
        assert len(seen) < 1000
    assert plant.wait(lambda each: each["status"] == "ok")["failures"] == {}
    expected = plant.detectors["gräs 2"].predict([image], plant.engine).score_B[0]
    assert plant.post("brick", image).json()["score"] == pytest.approx(float(expected), rel=1e-4)

    # A class of which nothing can be loaded is unavailable, not unknown.
    plant.release("bolt", brick, damaged=True)
    plant.wait(lambda each: "bolt" in each["failures"])
    answer = plant.post("bolt", image)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "class_unavailable")

    # A new class needs no restart.
    plant.release("bolt", brick)
    assert plant.wait(lambda each: each["classes"] == 3)["engines"] == 1
    assert plant.post("bolt", image).json()["model"] == {"name": "bolt", "version": 2}

    # A registry that has lost its champions is reported, and the old ones go on.
    client = mlflow.MlflowClient()
    for name in ("brick", "gräs 2", "bolt"):
        client.delete_registered_model_alias(name, registry.CHAMPION)
    # A look at the registry while the alias goes away may say so in MLflow's words; the next says it in ours.
    plant.wait(lambda each: "no champion" in (each["registry_error"] or ""))
    assert plant.post("brick", image).json()["model"]["version"] == version
