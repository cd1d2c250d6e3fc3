"""Error responses: one JSON shape for every error. Ray Serve's proxies import this, and what they import takes time."""

import threading
from collections.abc import Mapping
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from ray.util.metrics import Counter
from starlette.exceptions import HTTPException

BUSY = "overloaded"
"""Code of a refusal that is nobody's fault: there is too much work."""

REPORT_S = 1.0
"""How often refusals are reported to Ray, which takes as long as a refusal itself."""


class RefusalCounter:
    """Counts refusals by their codes, for Prometheus."""

    def __init__(self) -> None:
        self._metric = Counter("sprue_refusals", "Responses with an error, by its code", ("code",))
        self._counts: dict[str, int] = {}
        self._lock = threading.Lock()

    def count(self, code: str) -> None:
        """Counts one, which is reported with others."""
        with self._lock:
            if not self._counts:
                timer = threading.Timer(REPORT_S, self._report)
                timer.daemon = True
                timer.start()
            self._counts[code] = self._counts.get(code, 0) + 1

    def _report(self) -> None:
        with self._lock:
            counts, self._counts = self._counts, {}
        for code, count in counts.items():
            self._metric.inc(count, {"code": code})


REFUSALS = RefusalCounter()


class ErrorDetail(BaseModel):
    """An error, for programs and for people."""

    code: str
    message: str


class ErrorBody(BaseModel):
    """The body of every response that is not a success."""

    error: ErrorDetail


class ApiError(Exception):
    """A request is refused for a reason that the client can act on.

    The code identifies the reason for programs and is stable; the message explains it to people.
    """

    def __init__(self, status: HTTPStatus, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, headers


def add_error_handlers(app: FastAPI) -> None:
    """Makes an application respond to every error, also the framework's own, with an `ErrorBody`."""
    for kind in (ApiError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, _respond)


def error_response(
    status: HTTPStatus, code: str, message: str, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """A response whose body is an `ErrorBody`; it is counted."""
    REFUSALS.count(code)
    return JSONResponse(ErrorBody(error=ErrorDetail(code=code, message=message)).model_dump(), status, headers)


async def _respond(request: Request, error: Exception) -> JSONResponse:
    headers: Mapping[str, str] | None = None
    match error:
        case ApiError():
            status, code, message, headers = error.status, error.code, error.message, error.headers
        case HTTPException():
            status, headers = HTTPStatus(error.status_code), error.headers
            code, message = status.name.lower(), f"{request.method} {request.url.path}: {error.detail}; see /docs"
        case RequestValidationError():
            status, code = HTTPStatus.UNPROCESSABLE_ENTITY, "invalid_request"
            message = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        case _:
            # The framework raises the error again after this response, and Ray Serve logs it.
            status, code = HTTPStatus.INTERNAL_SERVER_ERROR, "internal_error"
            message = "the service failed on this request; see its log"
    return error_response(status, code, message, headers)
