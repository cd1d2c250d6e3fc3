"""What the service refuses, and that it goes on, on a real Ray Serve."""

import socket
import struct
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from sprue.serving.keys import add_key, remove_key
from sprue.serving.parsing import MULTIPART


def with_header_of(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header states a size."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [header, b"IDAT" + zlib.compress(bytes(1000)), b"IEND"]
    parts = [struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def parts(total: int) -> Iterator[bytes]:
    """A body without Content-Length, in parts."""
    for _ in range(total // 2**16):
        yield bytes(2**16)


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
    "truncated": (
        {"content": lambda plant: plant.png(Image.effect_noise((64, 64), 50))[:1500]},
        422,
        "undecodable_image",
    ),
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
    "too many bytes in parts": ({"content": lambda _: parts(30 * 2**20)}, 413, "too_many_bytes"),
    "too many bytes in a form": ({"files": {"image": bytes(3 * 2**20)}}, 413, "too_many_bytes"),
    "decompression bomb": ({"content": with_header_of(60_000, 60_000)}, 413, "too_many_pixels"),
    "too many pixels": ({"content": with_header_of(2_001, 2_000)}, 413, "too_many_pixels"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_are_json_and_the_service_keeps_running(plant: Any, case: str) -> None:
    arguments, status, code = REFUSALS[case]
    arguments = {"method": "POST", "url": "/v1/classes/brick/score"} | arguments
    if callable(arguments.get("content")):
        arguments["content"] = arguments["content"](plant)
    answer = plant.client.request(**arguments)
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert set(answer.json()) == {"error"} and set(answer.json()["error"]) == {"code", "message"}
    assert answer.json()["error"]["code"] == code
    assert plant.post("brick", plant.image("brick")).status_code == 200


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
        answer = plant.client.post(f"/v1/classes/box/score{query}", files=[(name, plant.png(image)) for name in names])
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, code)
        assert words in answer.json()["error"]["message"]

    def test_one_of_a_samples_images_is_damaged_or_missing(self, plant: Any, boxes: Any) -> None:
        _, ((image, *_), *_) = boxes
        good, noise = plant.png(image), plant.png(Image.effect_noise((64, 64), 50))[:1500]
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
