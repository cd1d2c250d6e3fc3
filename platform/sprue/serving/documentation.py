"""What /docs says beyond what follows from the code."""

from importlib.metadata import version
from typing import Any

from sprue.serving.schemas import ErrorBody

APPLICATION: dict[str, Any] = {
    "title": "sprue",
    "version": version("sprue"),
    "summary": "Scores pictures of products with the champion detector of their class.",
    "redoc_url": None,
    "openapi_tags": [
        {"name": "scoring", "description": "Is this part good?"},
        {"name": "service", "description": "What is served, and how it is."},
    ],
}
"""Arguments of the FastAPI application."""


def _binary(description: str = "") -> dict[str, Any]:
    return {"type": "string", "format": "binary"} | ({"description": description} if description else {})


def _error(description: str, **examples: str) -> dict[str, Any]:
    bodies = {code: {"value": {"error": {"code": code, "message": message}}} for code, message in examples.items()}
    return {"model": ErrorBody, "description": description, "content": {"application/json": {"examples": bodies}}}


_RAW = ("image/png", "image/jpeg", "image/bmp", "image/tiff", "image/webp", "application/octet-stream")

_FIGURES = {
    "X-Sprue-Score": "number",
    "X-Sprue-P-Value": "number",
    "X-Sprue-Alpha": "number",
    "X-Sprue-Threshold": "number",
    "X-Sprue-Is-Anomalous": "boolean",
    "X-Sprue-Class": "string",
    "X-Sprue-Model": "string",
    "X-Sprue-Model-Version": "integer",
    "X-Sprue-View": "string",
    "X-Sprue-Marked-Share": "number",
}

SCORE: dict[str, Any] = {
    "tags": ["scoring"],
    "response_model_exclude_none": True,
    "openapi_extra": {
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {
                    "schema": {
                        "type": "object",
                        "properties": {
                            "image": _binary(
                                "The picture, under any name; where a sample has several, a file for each view, under "
                                "its name or in the views' order"
                            )
                        },
                        "required": ["image"],
                    }
                },
                **{kind: {"schema": _binary()} for kind in _RAW},
            },
        }
    },
    "responses": {
        200: {
            "description": "The figures; as headers where the body is the heat map",
            "content": {"image/png": {"schema": _binary()}},
            "headers": {
                "Server-Timing": {
                    "description": "Milliseconds of decoding and scoring, and how many pictures were scored together",
                    "schema": {"type": "string"},
                },
                **{
                    name: {"description": "Where the body is the heat map", "schema": {"type": kind}}
                    for name, kind in _FIGURES.items()
                },
            },
        },
        404: _error("Unknown class", unknown_class="there is no class 'bolt'; there are: brick, grass, gravel"),
        413: _error(
            "Larger than the limits",
            too_many_bytes="the body is larger than 20,971,520 bytes; ...",
            too_many_pixels="the body has 60000 x 60000 pixels; at most 50,000,000 are read",
        ),
        415: _error("Not an image", not_an_image="the body is not a picture (PNG, JPEG, BMP, TIFF, WEBP are read)"),
        422: _error(
            "Undecodable",
            undecodable_picture="the body can't be decoded: image file is truncated",
            empty_picture="the picture has no bytes",
            malformed_form="Missing boundary in multipart.",
            wrong_views="the class's samples have 3 pictures; send a form with the files 0-top, 1-left, 2-right ...",
            unknown_view="class 'box' has no view 'top'; it has: 0-top, 1-left, 2-right",
            no_file="the form holds no file; send the picture as one",
            invalid_request="query.heatmap: Input should be a valid boolean, unable to interpret input",
        ),
        500: _error("The service's own failure", internal_error="the service failed on this request; its log says why"),
        503: _error("The champion could not be loaded", class_unavailable="class 'brick' can't be scored now: ..."),
    },
}
"""Arguments of the scoring route."""
