"""The scoring service: a FastAPI application on Ray Serve that batches requests of all classes."""

import asyncio
import base64
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Annotated, Any

import mlflow
import ray
import torch
from fastapi import Query, Request, Response
from fastapi_offline import FastAPIOffline
from ray import serve

from sprue.inference.detector import BATCH
from sprue.serving import answers, documentation
from sprue.serving.batching import Batcher
from sprue.serving.errors import ApiError, answer_errors_in_json
from sprue.serving.lineup import Lineup, Served, load_lineup, score_together
from sprue.serving.schemas import Health, Score, ServedClasses
from sprue.serving.upload import ServiceLimits, decode_pictures, read_pictures

logger = logging.getLogger(__name__)

# The pages of /docs come from the service itself: plants are seldom online.
app = FastAPIOffline(**documentation.APPLICATION)
answer_errors_in_json(app)


@dataclass(frozen=True)
class ServiceConfig:
    """What a replica needs to know.

    Attributes:
        tracking_uri: The tracking server whose champions are served.
        limits: What a request may cost.
        refresh_s: How often the registry is asked for new champions, in seconds.
    """

    tracking_uri: str
    limits: ServiceLimits = field(default_factory=ServiceLimits)
    refresh_s: float = 15.0


# Ray copies the class when it is decorated, with the globals that exist by then: its helpers stand above it.


def _node_cpus() -> int:
    """The CPUs that this process may use: the cores it is allowed, at most what Ray counts on this node."""
    node_id = ray.get_runtime_context().get_node_id()
    counted = sum(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["NodeID"] == node_id)
    return max(1, min(len(os.sched_getaffinity(0)), int(counted)))


@serve.deployment(name="scoring", max_ongoing_requests=4 * BATCH, max_constructor_retry_count=2)
@serve.ingress(app)
class ScoringService:
    """Holds all champions, scores samples with them, and follows the registry."""

    async def __init__(self, config: ServiceConfig) -> None:  # type: ignore[misc]
        """Loads the champions; see `sprue.serving.lineup.load_lineup` for what can go wrong."""
        self.config = config
        self.threads = _node_cpus()
        # Ray gives a process as many threads as its actor reserves; the flow may use the cores that the engine uses.
        torch.set_num_threads(self.threads)
        # Pictures are decoded here and not on asyncio's own pool, whose size is no bound for their memory.
        self.decoders = ThreadPoolExecutor(self.threads, "picture")
        mlflow.set_tracking_uri(config.tracking_uri)
        mlflow.set_registry_uri(config.tracking_uri)
        self.batcher = Batcher(score_together, BATCH)
        self.registry_error: str | None = None
        self.lineup: Lineup = await asyncio.to_thread(load_lineup, self.threads)
        self.refresher = asyncio.create_task(self._follow_registry())

    async def _follow_registry(self) -> None:
        """Swaps in new champions when they are loaded; when the registry fails, the old ones go on."""
        while True:
            await asyncio.sleep(self.config.refresh_s)
            try:
                self.lineup = await asyncio.to_thread(load_lineup, self.threads, self.lineup)
                self.registry_error = None
            except Exception as error:
                if str(error) != self.registry_error:
                    logger.error("champions not refreshed, the old ones go on: %s", error)
                self.registry_error = str(error)

    @app.post("/v1/classes/{class_name}/score", response_model=Score, **documentation.SCORE)
    async def score(
        self,
        class_name: str,
        request: Request,
        response: Response,
        heatmap: Annotated[bool, Query(description="Also return the heat map, laid over the picture")] = False,
        view: Annotated[
            str | None, Query(description="Heat map of this view; of the highest score if left out")
        ] = None,
    ) -> Any:
        """Scores one sample with the champion of its class.

        The body is the picture's bytes (PNG, JPEG, BMP, TIFF or WebP; any size and mode), or a form with the picture
        as its file. Where the class's samples have several pictures, it is a form with all of them: under the names of
        their views, or under other names in the views' order. With `heatmap=true` and `Accept: image/png` the answer
        is the heat map itself and the figures are in its `X-Sprue-` headers; otherwise the answer is JSON.
        """
        served, limits = self._served(class_name), self.config.limits
        detector = served.detector
        if view is not None and view not in detector.views:
            message = f"class {class_name!r} has no view {view!r}; it has: {', '.join(detector.views)}"
            raise ApiError(HTTPStatus.UNPROCESSABLE_ENTITY, "unknown_view", message)
        pictures = await read_pictures(request, detector.views, limits.max_bytes)
        started = time.perf_counter()
        images, inputs_VSS3 = await self._in_pool(
            decode_pictures, pictures, limits.max_pixels, detector.spec.input_size
        )
        if not heatmap:
            del images  # Up to 150 MB each, and many requests may wait for their batch.
        decoded = time.perf_counter()
        predictions, batch = await self.batcher((served, inputs_VSS3))
        scored = time.perf_counter()
        score = answers.score(served, predictions)
        headers = {
            "Server-Timing": f"decode;dur={1e3 * (decoded - started):.1f}, score;dur={1e3 * (scored - decoded):.1f};"
            f'desc="batch of {batch}"'
        }
        if heatmap:
            place = answers.shown_view(served, predictions, view)
            score.heatmap_view = detector.views[place] or None
            png, score.marked_share = await self._in_pool(
                answers.heatmap_png, served, predictions, images[place], place
            )
            headers["Vary"] = "Accept"
            if answers.wants_png(request.headers.get("accept", "")):
                return Response(png, media_type="image/png", headers=headers | answers.figures(score))
            score.heatmap_png = base64.b64encode(png).decode()
        response.headers.update(headers)
        return score

    @app.get("/v1/classes", response_model=ServedClasses, response_model_exclude_none=True, tags=["service"])
    async def classes(self) -> Any:
        """Lists the classes that can be scored, and their champions."""
        return ServedClasses(classes=[answers.summary(served) for served in self.lineup.served.values()])

    @app.get("/healthz", response_model=Health, tags=["service"])
    async def healthz(self) -> Any:
        """Tells whether the service serves what the registry names; 200 as long as it serves anything."""
        lineup = self.lineup
        return Health(
            status="degraded" if lineup.failures or self.registry_error else "ok",
            classes=len(lineup.served),
            engines=len(lineup.engines),
            failures=dict(lineup.failures),
            registry_error=self.registry_error,
        )

    async def _in_pool(self, function: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.decoders, function, *arguments)

    def _served(self, class_name: str) -> Served:
        lineup = self.lineup
        if class_name in lineup.served:
            return lineup.served[class_name]
        if class_name in lineup.failures:
            message = f"class {class_name!r} can't be scored now: {lineup.failures[class_name]}"
            raise ApiError(HTTPStatus.SERVICE_UNAVAILABLE, "class_unavailable", message)
        known = ", ".join(sorted(lineup.served))
        raise ApiError(HTTPStatus.NOT_FOUND, "unknown_class", f"there is no class {class_name!r}; there are: {known}")


def build_app(config: ServiceConfig, replicas: int = 1, gpus: float = 0.0) -> serve.Application:
    """The application, for `ray.serve.run`.

    Args:
        config: What the replicas need to know.
        replicas: How many processes share the requests; each holds all champions.
        gpus: Share of a GPU that a replica reserves.
    """
    options = {"num_cpus": 1, "num_gpus": gpus}
    return ScoringService.options(  # type: ignore[attr-defined]
        num_replicas=replicas, ray_actor_options=options
    ).bind(config)
