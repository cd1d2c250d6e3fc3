"""A request's images come out in the views' order; limits are checked before anything is read or decoded."""

import asyncio
import io
from collections.abc import Sequence

import httpx
import numpy as np
import pytest
from PIL import Image
from starlette.requests import Request

from sprue.inference.images import model_input
from sprue.serving.errors import ApiError
from sprue.serving.parsing import decode_inputs, read_uploads

VIEWS = ("top", "left")


def request_of(headers: dict[str, str], body: Sequence[bytes]) -> tuple[Request, list[bytes]]:
    """A request, and the parts of its body that are not read yet."""
    unread = list(body)

    async def receive():
        part = unread.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(unread)}

    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "method": "POST", "headers": raw}, receive), unread


def read(request: Request, views: Sequence[str] = ("",), max_bytes: int = 100) -> list[bytes]:
    return asyncio.run(read_uploads(request.headers, request.stream(), views, max_bytes))


def form(*files: tuple[str, bytes]) -> Request:
    sent = httpx.Request("POST", "http://host", files=[(name, ("file.png", content)) for name, content in files])
    headers = {"content-type": sent.headers["content-type"]}
    return request_of(headers, [sent.read()])[0]


@pytest.mark.parametrize("content_type", ["image/png", "IMAGE/TIFF; q=1", "application/octet-stream", None])
def test_a_body_is_one_image(content_type):
    request, _ = request_of({"content-type": content_type} if content_type else {}, [b"part 1, ", b"part 2"])
    assert read(request) == [b"part 1, part 2"]


def test_a_forms_files_are_ordered_by_view():
    assert read(form(("x", b"1")), max_bytes=1000) == [b"1"]
    assert read(form(("left", b"2"), ("top", b"1")), VIEWS, 1000) == [b"1", b"2"]
    assert read(form(("x", b"2"), ("y", b"1")), VIEWS, 1000) == [b"2", b"1"]


@pytest.mark.parametrize(
    ("files", "code"),
    [
        ([("top", b"1")], "wrong_views"),
        ([("top", b"1"), ("y", b"2")], "wrong_views"),
        ([("top", b"1"), ("top", b"2")], "wrong_views"),
        ([("x", b"1"), ("y", b"2"), ("z", b"3")], "malformed_form"),
        ([("x", b"1"), ("y", b"")], "empty_image"),
    ],
)
def test_forms_that_do_not_fit_the_views_are_refused(files, code):
    with pytest.raises(ApiError) as refusal:
        read(form(*files), VIEWS, 1000)
    assert (refusal.value.status, refusal.value.code) == (422, code)


def test_a_body_that_is_announced_too_large_is_not_read():
    request, unread = request_of({"content-length": "201"}, [bytes(201)])
    with pytest.raises(ApiError, match="larger than 200 bytes"):  # 100 for each view
        read(request, VIEWS)
    assert unread


def test_a_body_is_read_up_to_the_limit():
    request, unread = request_of({}, [bytes(60)] * 5)
    with pytest.raises(ApiError) as refusal:
        read(request)
    assert (refusal.value.status, refusal.value.code) == (413, "too_many_bytes")
    assert len(unread) == 3


def test_another_content_type_is_not_read():
    request, unread = request_of({"content-type": "application/x-www-form-urlencoded"}, [b"part"])
    with pytest.raises(ApiError, match="is not an image; send its bytes") as refusal:
        read(request)
    assert refusal.value.status == 415 and unread


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_images_are_decoded_and_resized_for_the_backbone():
    sent = [Image.effect_noise((40, 30), 50).convert("RGB"), Image.effect_noise((70, 90), 50).convert("RGB")]
    inputs_VSS3 = decode_inputs([encoded(image) for image in sent], 10_000, 32)
    assert np.array_equal(inputs_VSS3, np.stack([model_input(image, 32) for image in sent]))


@pytest.mark.parametrize(
    ("damage", "status", "message"),
    [
        (lambda data: b"text", 415, "is not an image"),
        (lambda data: data[:100], 422, "is damaged"),
        (lambda data: encoded(Image.new("L", (101, 100))), 413, "has 101 x 100 pixels"),
    ],
)
def test_an_image_that_cannot_be_decoded_is_named(damage, status, message):
    data = encoded(Image.effect_noise((64, 64), 50))
    for sent, name in (([damage(data)], "the body"), ([data, damage(data)], "image 2")):
        with pytest.raises(ApiError, match=f"^{name} {message}") as refusal:
            decode_inputs(sent, 10_000, 32)
        assert refusal.value.status == status
