"""Reads a sample's images from a request; limits are checked before anything is read or decoded.

Shapes: V views of a sample, S side of the backbone's input.
"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from http import HTTPStatus

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from sprue.inference.images import ImageTooLargeError, NotAnImageError, UnreadableImageError, model_input, open_image
from sprue.serving.errors import ApiError

MULTIPART = "multipart/form-data"


@dataclass(frozen=True)
class ServiceLimits:
    """The largest request.

    Attributes:
        max_bytes: Size of the body, for each image of a sample.
        max_pixels: Size of an image, read from its header before it is decoded.
    """

    max_bytes: int = 20 * 2**20
    max_pixels: int = 50_000_000


async def read_uploads(
    headers: Headers, body: AsyncGenerator[bytes], views: Sequence[str], max_bytes: int
) -> list[bytes]:
    """Reads a sample's encoded images, in the views' order: the files of a form, or the body if it is an image.

    A form's files are in the views' order, unless their fields have the views' names. The body may have `max_bytes` for
    each view.

    Raises:
        ApiError: 415 for another content type, 413 for a body that is too large (by its header, or as it arrives),
            422 for an empty or malformed one, or another number of images.
    """
    # By default curl sends every file as application/x-www-form-urlencoded; hence the hint.
    content_type = headers.get("content-type", "application/octet-stream").partition(";")[0].strip().lower()
    if not (content_type in (MULTIPART, "application/octet-stream") or content_type.startswith("image/")):
        raise ApiError(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            "not_an_image",
            f"Content-Type {content_type} is not an image; send its bytes as image/* or application/octet-stream "
            f"(curl: -H 'Content-Type: image/png' --data-binary @part.png), or files as {MULTIPART}",
        )
    max_bytes *= len(views)
    announced = headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise _too_large(max_bytes)
    async with aclosing(limited(body, max_bytes)) as stream:
        if content_type == MULTIPART:
            encoded = _in_order(await _form_files(headers, stream, len(views)), views)
        else:
            encoded = _in_order([("", b"".join([part async for part in stream]))], views)
    if not all(encoded):
        raise ApiError(HTTPStatus.UNPROCESSABLE_ENTITY, "empty_image", "the image has no bytes")
    return encoded


async def _form_files(headers: Headers, stream: AsyncGenerator[bytes], max_files: int) -> list[tuple[str, bytes]]:
    """Field name and content of each file of a form."""
    try:
        form = await MultiPartParser(headers, stream, max_files=max_files).parse()
    except MultiPartException as error:
        raise ApiError(HTTPStatus.UNPROCESSABLE_ENTITY, "malformed_form", error.message) from error
    try:
        files = [(name, await value.read()) for name, value in form.multi_items() if isinstance(value, UploadFile)]
    finally:
        await form.close()
    if not files:
        raise ApiError(HTTPStatus.UNPROCESSABLE_ENTITY, "no_file", "the form holds no file; send the image as one")
    return files


def _in_order(files: Sequence[tuple[str, bytes]], views: Sequence[str]) -> list[bytes]:
    """The files' contents in the views' order: by name if they have the views' names, else as they are."""
    named = {name for name, _ in files} & set(views)
    if len(files) != len(views) or 0 < len(named) < len(views):
        raise ApiError(
            HTTPStatus.UNPROCESSABLE_ENTITY,
            "wrong_views",
            f"the class's samples have {len(views)} images; send a form with the files {', '.join(views)}, under "
            f"these names or in this order under others; got {len(files)} {', '.join(name for name, _ in files)}",
        )
    by_name = dict(files)
    return [by_name[view] for view in views] if named else [data for _, data in files]


async def limited(body: AsyncGenerator[bytes], max_bytes: int) -> AsyncGenerator[bytes]:
    """The body's parts, until they are more than `max_bytes`; raises ApiError 413 then."""
    total = 0
    async for part in body:
        total += len(part)
        if total > max_bytes:
            raise _too_large(max_bytes)
        yield part


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        "too_many_bytes",
        f"the body is larger than {max_bytes:,} bytes; send a smaller or more compressed image",
    )


def decode_inputs(encoded: Sequence[bytes], max_pixels: int, side: int) -> NDArray[np.uint8]:
    """Decodes a sample's images and resizes them to the backbone's input, [V, S, S, 3].

    Raises:
        ApiError: 415 if one is not an image, 413 if its header states more than `max_pixels`, 422 if it is damaged.
    """
    names = ["the body"] if len(encoded) == 1 else [f"image {number}" for number in range(1, len(encoded) + 1)]
    # One image of full size at a time: it may have 150 MB.
    return np.stack(
        [model_input(_decode(data, name, max_pixels), side) for data, name in zip(encoded, names, strict=True)]
    )


def _decode(data: bytes, name: str, max_pixels: int) -> Image.Image:
    try:
        return open_image(data, name, max_pixels)
    except NotAnImageError as error:
        raise ApiError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "not_an_image", str(error)) from error
    except ImageTooLargeError as error:
        raise ApiError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "too_many_pixels", str(error)) from error
    except UnreadableImageError as error:
        raise ApiError(HTTPStatus.UNPROCESSABLE_ENTITY, "undecodable_image", str(error)) from error
