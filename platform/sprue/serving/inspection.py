"""The inspection page and what it asks for: calibrations, past decisions with their images, and reviews."""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from http import HTTPStatus
from itertools import islice
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI, Path, Query, Request, Response
from pydantic import ValidationError
from ray import serve
from starlette.responses import FileResponse
from starlette.staticfiles import StaticFiles
from upath import UPath

from sprue.errors import SprueError
from sprue.release.decision_store import Decision, DecisionStore
from sprue.release.reviews import Review, ReviewStore, mask_digests, read_review
from sprue.serving import openapi, responses
from sprue.serving.errors import ApiError, error_response
from sprue.serving.keys import Credentials
from sprue.serving.parsing import limited
from sprue.serving.schemas import ClassCalibration, NewReview, PastDecisions, PastReview
from sprue.store import StoreError, location
from sprue.tracking.summary import Summary

if TYPE_CHECKING:
    from sprue.serving.app import ScoringService

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

PAGE = FilePath(__file__).parent / "page"

MASK_BYTES = 4 * 2**20
"""Size of a review, for each view: masks of few colours are far smaller."""

STORE_S = 20.0
"""How long the page waits for the store."""

STORE_THREADS = 4
"""Requests of the page that look into the store at once."""

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}
"""Of the page: it loads nothing from elsewhere, runs no script but its own, and stands in no other page."""

router = APIRouter()
# Threads of their own: those of others must not wait for a store.
_readers = ThreadPoolExecutor(STORE_THREADS, "store")


def add_to(app: FastAPI) -> None:
    """Adds the page and its routes to the service."""
    app.include_router(router)
    app.add_exception_handler(StoreError, _store_unavailable)
    app.mount("/page", StaticFiles(directory=PAGE), name="page")


async def _store_unavailable(_: Request, error: Exception) -> Response:
    logger.warning("%s", error)
    message = "the store of decisions does not answer; try again in 5 s"
    return error_response(HTTPStatus.SERVICE_UNAVAILABLE, "store_unavailable", message, {"Retry-After": "5"})


def _replica() -> "ScoringService":
    """The replica that this process is."""
    return serve.get_replica_context().servable_object


Replica = Annotated[Any, Depends(_replica)]


def _store(replica: "ScoringService") -> UPath:
    """Where decisions are kept; raises ApiError 404 if they are not."""
    if replica.config.decisions is None:
        message = "this service keeps no decisions: it was started with --no-decisions"
        raise ApiError(HTTPStatus.NOT_FOUND, "no_decisions", message)
    return location(replica.config.decisions.folder)


async def in_store(function: Callable[..., Result], *arguments: Any) -> Result:
    """Calls a function that reads or writes the store; raises StoreError if that takes too long."""
    try:
        async with asyncio.timeout(STORE_S):
            return await asyncio.get_running_loop().run_in_executor(_readers, function, *arguments)
    except TimeoutError as error:
        raise StoreError(f"the store of decisions did not answer within {STORE_S:.0f} s") from error


@router.get("/", include_in_schema=False)
async def page() -> Response:
    """The inspection page."""
    return FileResponse(PAGE / "index.html", headers=HEADERS)


@router.get("/v1/classes/{name}/calibration", response_model=ClassCalibration, **openapi.CALIBRATION)
async def calibration(
    name: Annotated[str, Path(description=openapi.NAME)], replica: Replica, credentials: Credentials
) -> Any:
    """What a class's scores and anomaly maps are compared with."""
    replica.keys.require(credentials, "score")
    return responses.calibration(await replica.models.load(replica.models.find(name)))


@router.get("/v1/classes/{name}/decisions", response_model=PastDecisions, **openapi.DECISIONS)
async def decisions(
    name: Annotated[str, Path(description=openapi.NAME)],
    replica: Replica,
    credentials: Credentials,
    queue: Annotated[
        bool, Query(description="Only alarms and near misses with kept images that nobody has reviewed")
    ] = False,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
) -> Any:
    """The last decisions about a class, of the last seven days that have any.

    They are there some seconds after the answer.
    """
    replica.keys.require(credentials, "review")
    store = _store(replica)
    model_name = replica.models.find(name).model_name
    try:
        return PastDecisions(decisions=await in_store(_last, store, model_name, queue, limit))
    except SprueError as error:
        logger.error("%s", error)
        message = "the store of decisions is damaged; the service's log names the file"
        raise ApiError(HTTPStatus.SERVICE_UNAVAILABLE, "store_damaged", message) from error


def _last(store: UPath, model_name: str, queue: bool, limit: int) -> list[Any]:
    reviews, by_day = ReviewStore(store), {}

    def review(decision: Decision) -> UPath | None:
        day = decision.at.date()
        if day not in by_day:
            by_day[day] = reviews.reviewed(day)
        return by_day[day].get(decision.key)

    found = DecisionStore(store).newest(model_name, limit, ("alarm", "near") if queue else ())
    chosen = islice((each for each in found if not (queue and review(each))), limit)
    pairs = [(each, review(each)) for each in chosen]
    return [responses.past_decision(each, read_review(path) if path else None) for each, path in pairs]


@router.get("/v1/images/{digest}", **openapi.IMAGE)
async def image(
    digest: Annotated[str, Path(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the image")],
    at: Annotated[datetime, Query(description="When the decision was made")],
    replica: Replica,
    credentials: Credentials,
) -> Response:
    """An image of a decision, as it came."""
    replica.keys.require(credentials, "review")
    store = DecisionStore(_store(replica))
    try:
        data = await in_store(store.read_image, _utc(at), digest)
    except SprueError as error:
        raise ApiError(HTTPStatus.NOT_FOUND, "image_gone", str(error)) from error
    return Response(data, media_type="application/octet-stream", headers={"X-Content-Type-Options": "nosniff"})


@router.post("/v1/classes/{name}/reviews", response_model=PastReview, **openapi.REVIEW)
async def review(
    name: Annotated[str, Path(description=openapi.NAME)], request: Request, replica: Replica, credentials: Credentials
) -> Any:
    """Keeps a verdict on a decision, with who gave it and when. A later one replaces it; both are kept."""
    reviewer = replica.keys.require(credentials, "review")
    store, champion = _store(replica), replica.models.find(name)
    views = Summary.read(champion.tags, champion).views
    # Pages of other origins can't send JSON without asking, so none can review in somebody's name.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        message = "send the review with Content-Type: application/json"
        raise ApiError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "not_json", message)
    async with replica.admission.admit(request.headers, scored=False) as admitted:
        body = b"".join([part async for part in limited(admitted.read(request.stream()), MASK_BYTES * len(views))])
    try:
        given = NewReview.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        message = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise ApiError(HTTPStatus.UNPROCESSABLE_ENTITY, "invalid_request", message) from error
    try:
        kept = await in_store(_keep, store, champion.model_name, given, reviewer, views)
    except SprueError as error:
        raise ApiError(HTTPStatus.UNPROCESSABLE_ENTITY, "not_reviewable", str(error)) from error
    if replica.access:
        what = f"{kept.verdict}: decision {given.key}, request {kept.decision.request_id}"
        replica.access.add("reviewed", reviewer, credentials.address, what, champion.model_name)
    return PastReview(verdict=kept.verdict, reviewer=kept.reviewer, at=kept.at)


def _keep(store: UPath, model_name: str, given: NewReview, reviewer: str, views: tuple[str, ...]) -> Review:
    decisions = DecisionStore(store)
    decision = decisions.get(_utc(given.at), given.key)
    if decision.model_name != model_name:
        raise SprueError(f"decision {given.key} is about {decision.model_name}, not {model_name}")
    masks = given.masks or [b""] * len(views)
    if given.verdict == "good" and any(masks):
        raise SprueError("a good sample has no defect to mark: send no masks, or another verdict")
    if not len(decision.images) == len(views) == len(masks):
        raise SprueError(f"the class's samples have {len(views)} images; the decision has {len(decision.images)}, and "
                         f"{len(masks)} masks are given")  # fmt: skip
    digests = mask_digests(masks, decisions.read_images(decision))
    found = Review(decision, given.verdict, reviewer, datetime.now(UTC), views, digests)
    ReviewStore(store).add(found, masks)
    return found


def _utc(at: datetime) -> datetime:
    try:
        return at.astimezone(UTC) if at.tzinfo else at.replace(tzinfo=UTC)
    except OverflowError as error:  # in the first or the last year that there is
        raise SprueError(f"nothing was decided at {at.isoformat()}") from error
