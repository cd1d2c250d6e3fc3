"""Takes a sample's pictures out of a request, within limits that are checked before it costs anything.

Shapes: V views of a sample, S side of the backbone's input.
"""

from collections.abc import AsyncGenerator, Sequence
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
        max_bytes: Size of the body, for each picture of a sample.
        max_pixels: Size of a picture, read from its header before it is decoded.
    """

    max_bytes: int = 20 * 2**20
    max_pixels: int = 50_000_000


async def read_pictures(request: Request, views: Sequence[str], max_bytes: int) -> list[bytes]:
    """The encoded pictures of a sample, in the views' order: the files of a form, or the whole body if it is one.

    A form's files are the views' in their order, unless their fields have the views' names.

    Args:
        request: The request.
        views: Names of the views.
        max_bytes: Size of the body, for each view.

    Raises:
        ApiError: 415 for another content type, 413 for a body that is too large (as announced, or as it arrives),
            422 for an empty or malformed one, or another number of pictures.
    """
    # curl, unless told otherwise, calls every file a filled-in form; hence the hint.
    content_type = request.headers.get("content-type", "application/octet-stream").partition(";")[0].strip().lower()
    if not (content_type in (MULTIPART, "application/octet-stream") or content_type.startswith("image/")):
        raise ApiError(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            "not_an_image",
            f"Content-Type {content_type} is not a picture; send its bytes as image/* or application/octet-stream "
            f"(curl: -H 'Content-Type: image/png' --data-binary @part.png), or files as {MULTIPART}",
        )
    max_bytes *= len(views)
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise _too_large(max_bytes)
    async with aclosing(_limited(request, max_bytes)) as stream:
        if content_type == MULTIPART:
            pictures = _in_order(await _form_files(request, stream, len(views)), views)
        else:
            pictures = _in_order([("", b"".join([part async for part in stream]))], views)
    if not all(pictures):
        raise ApiError(HTTPStatus.UNPROCESSABLE_ENTITY, "empty_picture", "the picture has no bytes")
    return pictures


async def _form_files(request: Request, stream: AsyncGenerator[bytes], most: int) -> list[tuple[str, bytes]]:
    """Field and content of each of a form's files."""
    try:
        form = await MultiPartParser(request.headers, stream, max_files=most).parse()
    except MultiPartException as error:
        raise ApiError(HTTPStatus.UNPROCESSABLE_ENTITY, "malformed_form", error.message) from error
    try:
        files = [(name, await value.read()) for name, value in form.multi_items() if isinstance(value, UploadFile)]
    finally:
        await form.close()
    if not files:
        raise ApiError(HTTPStatus.UNPROCESSABLE_ENTITY, "no_file", "the form holds no file; send the picture as one")
    return files


def _in_order(files: Sequence[tuple[str, bytes]], views: Sequence[str]) -> list[bytes]:
    """Pictures in the views' order: by name if the files have the views' names, else as they came."""
    named = {name for name, _ in files} & set(views)
    if len(files) != len(views) or 0 < len(named) < len(views):
        raise ApiError(
            HTTPStatus.UNPROCESSABLE_ENTITY,
            "wrong_views",
            f"the class's samples have {len(views)} pictures; send a form with the files {', '.join(views)}, under "
            f"these names or in this order under others; got {len(files)} {', '.join(name for name, _ in files)}",
        )
    by_name = dict(files)
    return [by_name[view] for view in views] if named else [data for _, data in files]


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


def decode_pictures(
    pictures: Sequence[bytes], max_pixels: int, side: int
) -> tuple[list[Image.Image], NDArray[np.uint8]]:
    """Decodes a sample's pictures, and makes of them what the backbone reads, [V, S, S, 3].

    Raises:
        ApiError: 415 if one is not a picture, 413 if its header claims more than `max_pixels`, 422 if it is damaged.
    """
    names = ["the body"] if len(pictures) == 1 else [f"picture {place + 1}" for place in range(len(pictures))]
    images = [_decode(data, name, max_pixels) for data, name in zip(pictures, names, strict=True)]
    return images, np.stack([model_input(image, side) for image in images])


def _decode(data: bytes, name: str, max_pixels: int) -> Image.Image:
    try:
        return open_image(data, name, max_pixels)
    except NotAnImageError as error:
        raise ApiError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "not_an_image", str(error)) from error
    except ImageTooLargeError as error:
        raise ApiError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "too_many_pixels", str(error)) from error
    except UnreadableImageError as error:
        raise ApiError(HTTPStatus.UNPROCESSABLE_ENTITY, "undecodable_picture", str(error)) from error
