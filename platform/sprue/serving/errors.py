"""What the service answers when it can't: one JSON shape for every error."""

from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from sprue.serving.schemas import ErrorBody, ErrorDetail


class ApiError(Exception):
    """A refusal that the client can act on.

    Attributes:
        status: The HTTP status.
        code: A word for programs, which does not change.
        message: A sentence for people.
    """

    def __init__(self, status: HTTPStatus, code: str, message: str) -> None:
        """See the class."""
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


def answer_errors_in_json(app: FastAPI) -> None:
    """Makes an application answer every error, its framework's own among them, with an `ErrorBody`."""
    app.add_exception_handler(ApiError, _refusal)
    app.add_exception_handler(HTTPException, _framework_refusal)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(Exception, _failure)


def _response(status: int, code: str, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    body = ErrorBody(error=ErrorDetail(code=code, message=message))
    return JSONResponse(body.model_dump(), status, headers)


async def _refusal(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return _response(error.status, error.code, error.message)


async def _framework_refusal(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}; /docs describes what there is"
    return _response(error.status_code, HTTPStatus(error.status_code).name.lower(), message, dict(error.headers or {}))


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    message = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
    return _response(HTTPStatus.UNPROCESSABLE_ENTITY, "invalid_request", message)


async def _failure(request: Request, error: Exception) -> JSONResponse:
    # The framework raises the error again after this answer, and Ray Serve logs it.
    return _response(
        HTTPStatus.INTERNAL_SERVER_ERROR, "internal_error", "the service failed on this request; its log says why"
    )
