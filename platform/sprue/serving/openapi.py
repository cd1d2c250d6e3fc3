"""What /docs says beyond what FastAPI derives from the code."""

from importlib.metadata import version
from typing import Any

from fastapi import Response

from sprue.serving.admission import TIMEOUT_HEADER
from sprue.serving.errors import ErrorBody
from sprue.serving.hosts import IDENTIFIER
from sprue.serving.schemas import NewReview

CLIENTS = """
```sh
curl -H "Authorization: Bearer $SPRUE_KEY" -H "X-Request-Timeout-Ms: 5000" -H "X-Station: line-7" \\
    -H "Content-Type: application/octet-stream" --data-binary @part.png --max-time 6 --retry 5 --retry-max-time 5 \\
    https://scoring.plant:8443/v1/classes/textures.brick/score
```

- Decide by `is_anomalous`. A part without a decision is not a good part.
- `X-Request-Timeout-Ms` says for how long an answer is of use, the upload included. Set a time limit of your own that
  is a second longer.
- 429 (your key's rate limit) and 503 (too much work): again after the seconds in `Retry-After`. 408, 500, 502: again,
  on a new connection. 504: the deadline passed, and nothing was decided. Other errors: the same request fails again.
- `X-Request-Id` and `X-Station` (up to 128 letters, digits and `_.:/+=@-`) are kept with the decision.
- Errors are JSON: `error.code` for programs, `error.message` for people.
"""
"""What a client has to know, on the page /docs. The guide "Connect a camera" has programs."""


def _binary(description: str = "") -> dict[str, Any]:
    return {"type": "string", "format": "binary"} | ({"description": description} if description else {})


def _error(description: str, **examples: str) -> dict[str, Any]:
    bodies = {code: {"value": {"error": {"code": code, "message": message}}} for code, message in examples.items()}
    return {"model": ErrorBody, "description": description, "content": {"application/json": {"examples": bodies}}}


APPLICATION: dict[str, Any] = {
    "title": "sprue",
    "version": version("sprue"),
    "summary": "Scores images of products with the champion detector of their class.",
    "description": CLIENTS,
    "responses": {
        400: _error(
            "A header is not fit for a log",
            invalid_station="X-Station has more than 128 characters, or others than letters, digits and _.:/+=@-",
        ),
        421: _error(
            "Another name of the service",
            foreign_host="the service does not answer under this Host; `sprue serve --allowed-host NAME` makes it",
        ),
    },
    "redoc_url": None,
    "openapi_tags": [
        {"name": "scoring", "description": "Is this part good?"},
        {"name": "service", "description": "What is served, and whether it is healthy."},
        {"name": "review", "description": "What was decided, and what people say about it."},
    ],
}
"""Arguments of the FastAPI application."""

NAME = (
    "The class's model, `<dataset>.<class>`, such as `textures.brick`; or the class alone, such as `brick`, where only "
    "one served dataset has a class of that name"
)
"""Description of the path parameter of the scoring route."""


_IDENTIFIER = {"type": "string", "maxLength": 128, "pattern": f"^{IDENTIFIER.pattern}$"}
_RATE_LIMITED = _error(
    "More requests than the key's rate limit, or the address's where there are no keys: try again after the seconds in "
    "Retry-After",
    rate_limited="the key 'line-7' may make 20 requests in 1 s; try again in 1 s",
)
_SLOW = _error(
    "The body arrives too slowly; the connection is closed",
    slow_body="the body arrives too slowly: 0 bytes in 5.0 s",
)
_RAW = ("image/png", "image/jpeg", "image/bmp", "image/tiff", "image/webp", "application/octet-stream")

_HEADERS = {
    "number": ("Score", "P-Value", "Alpha", "Threshold", "Predicted-Mask-Fraction"),
    "boolean": ("Is-Anomalous",),
    "string": ("Dataset", "Class", "Model", "Model-Digest", "View"),
    "integer": ("Model-Version",),
}

SCORE: dict[str, Any] = {
    "tags": ["scoring"],
    "response_model_exclude_none": True,
    "openapi_extra": {
        "parameters": [
            {
                "name": TIMEOUT_HEADER,
                "in": "header",
                "description": "Milliseconds after which the answer is of no use, the upload included",
                "schema": {"type": "integer", "minimum": 1, "maximum": 60000},
            },
            {
                "name": "X-Station",
                "in": "header",
                "description": "Which station sends the image; it is kept with the decision",
                "schema": _IDENTIFIER,
            },
            {
                "name": "X-Request-Id",
                "in": "header",
                "description": "Identifies the decision; made if missing, and in the answer",
                "schema": _IDENTIFIER,
            },
        ],
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {
                    "schema": {
                        "type": "object",
                        "properties": {
                            "image": _binary(
                                "The image, under any name; where a sample has several, one file for each view, under "
                                "its name or in the views' order"
                            )
                        },
                        "required": ["image"],
                    }
                },
                **{kind: {"schema": _binary()} for kind in _RAW},
            },
        },
    },
    "responses": {
        200: {
            "description": "The score; in headers where the body is the heat map",
            "content": {"image/png": {"schema": _binary()}},
            "headers": {
                "Server-Timing": {
                    "description": "Milliseconds of decoding and scoring, and how many images were scored together",
                    "schema": {"type": "string"},
                },
                **{
                    f"X-Sprue-{name}": {"description": "Where the body is the heat map", "schema": {"type": kind}}
                    for kind, names in _HEADERS.items()
                    for name in names
                },
            },
        },
        401: _error("No key", unauthorized="send a key of this service in the header Authorization: Bearer KEY"),
        403: _error("Not allowed", forbidden="the key 'monitor' has not the scope 'score'; it has: admin"),
        404: _error("Unknown class", unknown_class="there is no class 'bolt'; there are: metal.rod, textures.brick"),
        408: _SLOW,
        409: _error(
            "Several datasets have the class",
            ambiguous_class="class 'brick' is ambiguous: write metal.brick or textures.brick",
        ),
        413: _error(
            "Larger than the limits",
            too_many_bytes="the body is larger than 20,971,520 bytes; ...",
            too_many_pixels="the body has 60000 x 60000 pixels; at most 50,000,000 are read",
        ),
        415: _error("Not an image", not_an_image="the body is not an image (PNG, JPEG, BMP, TIFF, WEBP are read)"),
        422: _error(
            "The request can't be processed",
            undecodable_image="the body can't be decoded: image file is truncated",
            empty_image="the image has no bytes",
            malformed_form="Missing boundary in multipart.",
            wrong_views="the class's samples have 3 images; send a form with the files 0-top, 1-left, 2-right ...",
            unknown_view="class 'box' has no view 'top'; it has: 0-top, 1-left, 2-right",
            no_file="the form holds no file; send the image as one",
            invalid_timeout="X-Request-Timeout-Ms is not a whole number of milliseconds from 1 to 60000",
            invalid_request="query.heatmap: Input should be a valid boolean, unable to interpret input",
        ),
        429: _RATE_LIMITED,
        500: _error("The service failed", internal_error="the service failed on this request; see its log"),
        503: _error(
            "Too much work: try again after the seconds in Retry-After; or the champion could not be loaded",
            overloaded="64 requests are waiting to be scored; try again in 3 s",
            deadline_too_short="a score takes about 2.1 s now, and the request allows 0.5 s; try again in 3 s",
            class_unavailable="class 'textures.brick' is unavailable: ...",
        ),
        504: _error(
            "The deadline has passed",
            deadline_exceeded="the sample was not scored within 10 s; X-Request-Timeout-Ms may allow more",
        ),
    },
}
"""Arguments of the scoring route."""

CLASSES: dict[str, Any] = {
    "tags": ["service"],
    "response_model_exclude_none": True,
    "responses": {status: SCORE["responses"][status] for status in (401, 403, 429)},
}
"""Arguments of the route that lists the classes."""

_CLASS_ERRORS = {status: SCORE["responses"][status] for status in (401, 403, 404, 409, 429)}

REGISTRY_EVENT: dict[str, Any] = {
    "tags": ["service"],
    "openapi_extra": {
        "requestBody": {"required": True, "content": {"application/json": {"schema": {"type": "object"}}}},
        "parameters": [
            {"name": name, "in": "header", "required": True, "description": description, "schema": {"type": "string"}}
            for name, description in {
                "X-MLflow-Signature": "`v1,` and the HMAC-SHA256 in base64 of `<delivery id>.<timestamp>.<body>`",
                "X-MLflow-Timestamp": "Unix time in seconds; at most 5 minutes old",
                "X-MLflow-Delivery-Id": "Identifies the message",
            }.items()
        ],
    },
    "responses": {
        204: {"description": "The registry is looked into"},
        401: _error(
            "Not from the tracking server", bad_signature="the message is not signed with this service's secret"
        ),
        404: _error(
            "No events are taken",
            no_webhook="this service takes no events of the registry: it was started without --webhook-secret",
        ),
        408: _SLOW,
        413: _error("Larger than the limit", too_many_bytes="the body is larger than 262,144 bytes; ..."),
        503: _error("It could not be passed on", unavailable="the event could not be passed on; try again in 1 s"),
    },
}
"""Arguments of the route that takes MLflow's webhooks."""

_NO_DECISIONS = _error(
    "Unknown class, or decisions are not kept",
    unknown_class="there is no class 'bolt'; there are: metal.rod, textures.brick",
    no_decisions="this service keeps no decisions: it was started with --no-decisions",
)

_STORE_UNAVAILABLE = _error(
    "The store does not answer", store_unavailable="the store of decisions does not answer; try again in 5 s"
)

CALIBRATION: dict[str, Any] = {
    "tags": ["service"],
    "responses": _CLASS_ERRORS
    | {503: _error("Its champion can't be loaded", class_unavailable="class 'textures.brick' is unavailable: ...")},
}
"""Arguments of the route of a class's calibration."""

DECISIONS: dict[str, Any] = {
    "tags": ["review"],
    "response_model_exclude_none": True,
    "responses": _CLASS_ERRORS | {404: _NO_DECISIONS, 503: _STORE_UNAVAILABLE},
}
"""Arguments of the route of past decisions."""

IMAGE: dict[str, Any] = {
    "tags": ["review"],
    "response_class": Response,
    "responses": {
        200: {"description": "The image", "content": {"application/octet-stream": {"schema": _binary()}}},
        **{status: _CLASS_ERRORS[status] for status in (401, 403, 429)},
        404: _error(
            "There is no such image",
            image_gone="... is gone: images are deleted after some days, sooner where space is short",
            no_decisions="this service keeps no decisions: it was started with --no-decisions",
        ),
        503: _STORE_UNAVAILABLE,
    },
}
"""Arguments of the route of an image."""

REVIEW: dict[str, Any] = {
    "tags": ["review"],
    "openapi_extra": {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": NewReview.model_json_schema()}},
        }
    },
    "responses": {
        **_CLASS_ERRORS,
        404: _NO_DECISIONS,
        408: _SLOW,
        413: _error("Larger than the limit", too_many_bytes="the body is larger than 4,194,304 bytes; ..."),
        415: _error("Not JSON", not_json="send the review with Content-Type: application/json"),
        422: _error(
            "The review can't be kept",
            invalid_request="verdict: Input should be 'good', 'defective' or 'unsure'",
            not_reviewable="a mask is a PNG of its image's size",
        ),
        503: _STORE_UNAVAILABLE,
    },
}
"""Arguments of the route that takes reviews."""
