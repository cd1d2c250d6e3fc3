"""The route by which a tracking server says that champions have changed: nobody waits for the next look."""

import asyncio
import logging
from http import HTTPStatus
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from ray import serve

from sprue.errors import SprueError
from sprue.serving import openapi
from sprue.serving.errors import ApiError
from sprue.serving.parsing import limited
from sprue.tracking.webhook import ROUTE, verify

if TYPE_CHECKING:
    from sprue.serving.app import ScoringService

logger = logging.getLogger(__name__)

MAX_BYTES, BODY_S = 2**18, 5.0
"""Size of a message, and the time that it may take."""

router = APIRouter()


def add_to(app: FastAPI) -> None:
    """Adds the route to the service."""
    app.include_router(router)


def _replica() -> "ScoringService":
    """The replica that this process is."""
    return serve.get_replica_context().servable_object


@router.post(ROUTE, status_code=HTTPStatus.NO_CONTENT, response_class=Response, **openapi.REGISTRY_EVENT)
async def registry_event(request: Request, replica: Annotated[Any, Depends(_replica)]) -> None:
    """Takes an event of MLflow's registry, signed with the webhook's secret, and looks into the registry.

    No key is needed. The event says only that there is something to see: what is served comes from the registry.
    """
    if replica.webhook_secret is None:
        message = "this service takes no events of the registry: it was started without --webhook-secret"
        raise ApiError(HTTPStatus.NOT_FOUND, "no_webhook", message)
    try:
        async with asyncio.timeout(BODY_S):
            body = b"".join([part async for part in limited(request.stream(), MAX_BYTES)])
    except TimeoutError as error:
        message = f"the body has not arrived in {BODY_S:.0f} s"
        raise ApiError(HTTPStatus.REQUEST_TIMEOUT, "slow_body", message, {"Connection": "close"}) from error
    try:
        verify(replica.webhook_secret, request.headers, body)
    except SprueError as error:
        raise ApiError(HTTPStatus.UNAUTHORIZED, "bad_signature", str(error)) from error
    try:
        await replica.follower.look()
    except Exception as error:  # the server tries again, and polling goes on
        logger.error("an event of the registry could not be passed on: %s", error)
        message = "the event could not be passed on; try again in 1 s"
        raise ApiError(HTTPStatus.SERVICE_UNAVAILABLE, "unavailable", message, {"Retry-After": "1"}) from error
