"""Takes the picture out of a request, within limits that are checked before it costs anything.

Shapes: S side of the backbone's input.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from http import HTTPStatus

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from sprue.inference.images import ImageTooLargeError, NotAnImageError, UnreadableImageError, model_input, open_image
from sprue.serving.errors import ApiError

MULTIPART = "multipart/form-data"


@dataclass(frozen=True)
class ServiceLimits:
    """What a request may cost.

    Attributes:
        max_bytes: Size of the body.
        max_pixels: Size of the picture, read from its header before it is decoded.
    """

    max_bytes: int = 20 * 2**20
    max_pixels: int = 50_000_000


async def read_picture(request: Request, max_bytes: int) -> bytes:
    """The picture's encoded bytes: the whole body, or the first file of a form.

    Raises:
        ApiError: 415 for another content type, 413 for a body above `max_bytes` (as announced, or as it arrives),
            422 for an empty or malformed one.
    """
    # curl, unless told otherwise, calls every file a filled-in form; hence the hint.
    content_type = request.headers.get("content-type", "application/octet-stream").partition(";")[0].strip().lower()
    if not (content_type in (MULTIPART, "application/octet-stream") or content_type.startswith("image/")):
        raise ApiError(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            "not_an_image",
            f"Content-Type {content_type} is not a picture; send its bytes as image/* or application/octet-stream "
            f"(curl: -H 'Content-Type: image/png' --data-binary @part.png), or a file as {MULTIPART}",
        )
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise _too_large(max_bytes)
    async with aclosing(_limited(request, max_bytes)) as stream:
        if content_type == MULTIPART:
            data = await _form_file(request, stream)
        else:
            data = b"".join([part async for part in stream])
    if not data:
        raise ApiError(HTTPStatus.UNPROCESSABLE_ENTITY, "empty_picture", "the picture has no bytes")
    return data


async def _form_file(request: Request, stream: AsyncGenerator[bytes]) -> bytes:
    try:
        form = await MultiPartParser(request.headers, stream, max_files=1).parse()
    except MultiPartException as error:
        raise ApiError(HTTPStatus.UNPROCESSABLE_ENTITY, "malformed_form", error.message) from error
    try:
        for value in form.values():
            if isinstance(value, UploadFile):
                return await value.read()
    finally:
        await form.close()
    raise ApiError(HTTPStatus.UNPROCESSABLE_ENTITY, "no_file", "the form holds no file; send the picture as one")


async def _limited(request: Request, max_bytes: int) -> AsyncGenerator[bytes]:
    total = 0
    async for part in request.stream():
        total += len(part)
        if total > max_bytes:
            raise _too_large(max_bytes)
        yield part


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        "too_many_bytes",
        f"the body is larger than {max_bytes:,} bytes; send a smaller or more compressed picture",
    )


def decode_picture(data: bytes, max_pixels: int, side: int) -> tuple[Image.Image, NDArray[np.uint8]]:
    """Decodes a picture, and makes of it what the backbone reads, [S, S, 3].

    Raises:
        ApiError: 415 if it is not a picture, 413 if its header claims more than `max_pixels`, 422 if it is damaged.
    """
    try:
        image = open_image(data, "the body", max_pixels)
    except NotAnImageError as error:
        raise ApiError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "not_an_image", str(error)) from error
    except ImageTooLargeError as error:
        raise ApiError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "too_many_pixels", str(error)) from error
    except UnreadableImageError as error:
        raise ApiError(HTTPStatus.UNPROCESSABLE_ENTITY, "undecodable_picture", str(error)) from error
    return image, model_input(image, side)
