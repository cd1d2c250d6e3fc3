"""The scoring service: a FastAPI application on Ray Serve that batches requests of all classes."""

import asyncio
import base64
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path as FilePath
from typing import Annotated, Any

import ray
import torch
from fastapi import Path, Query, Request, Response
from fastapi_offline import FastAPIOffline
from ray import serve

from sprue.inference.detector import BATCH, Predictions
from sprue.inference.images import open_image
from sprue.release.decision_store import image_digests
from sprue.serving import inspection, metrics, openapi, registry_events, responses, tracing
from sprue.serving.access_writer import AccessWriter
from sprue.serving.admission import Admission, AdmissionLimits
from sprue.serving.batching import Batcher
from sprue.serving.champions import CacheSettings, Champions
from sprue.serving.coordinator import CoordinatorSettings, use_registry
from sprue.serving.decision_log import DecisionLog, DecisionLogSettings, decision_of
from sprue.serving.errors import ApiError, add_error_handlers
from sprue.serving.follower import Follower
from sprue.serving.hosts import AllowedHosts, HeaderGuard, listen_on_node_address
from sprue.serving.keys import Credentials, KeyFile
from sprue.serving.model_cache import ServedModel, score_together
from sprue.serving.parsing import ServiceLimits, decode_inputs, read_uploads
from sprue.serving.rates import Rate, RateLimiter
from sprue.serving.schemas import Liveness, Readiness, Score, ServedClasses
from sprue.serving.shadow import Shadow, ShadowSettings
from sprue.tracking.registry import RegisteredDetector
from sprue.tracking.webhook import read_secret

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 4096
"""Connections that a replica accepts; idle ones cost a socket each."""

HEALTH_S = 3.0
"""How often Ray Serve asks a replica for its health; it replaces one that has said no three times."""

CLOSE_S = 10.0
"""Time for what waits to be written when a replica ends: its last decisions, those of challengers, and spans."""

# The service itself holds the files of /docs: plants are seldom online.
app = FastAPIOffline(**openapi.APPLICATION, telemetry=tracing.TELEMETRY)
add_error_handlers(app)
inspection.add_to(app)
registry_events.add_to(app)


@dataclass(frozen=True)
class ServiceConfig:
    """Settings of a replica; see `sprue.serving.launch.serve_champions`."""

    coordinator: CoordinatorSettings
    limits: ServiceLimits
    admission: AdmissionLimits
    cache: CacheSettings
    keys: FilePath | None
    hosts: AllowedHosts
    decisions: DecisionLogSettings | None
    shadow: float
    allow_empty: bool
    rate: Rate | None
    access_log: str | None
    webhook_secret: FilePath | None


def _allowed_hosts() -> AllowedHosts:
    """Those of the replica that this process is."""
    return serve.get_replica_context().servable_object.config.hosts


def _replicas() -> int:
    """How many share the requests."""
    return serve.get_replica_context().world_size or 1


app.add_middleware(HeaderGuard, allowed=_allowed_hosts)
app.add_middleware(metrics.CountRequests)

# Ray copies the class with the globals that exist when it is decorated: its helpers have to stand above it.


def _node_cpus() -> int:
    """CPUs that this process may use: its cores, but at most as many as Ray counts on this node."""
    node_id = ray.get_runtime_context().get_node_id()
    counted = sum(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["NodeID"] == node_id)
    return max(1, min(len(os.sched_getaffinity(0)), int(counted)))


# The limit of Ray Serve counts connections whose body is still to come, and lets others wait in silence; what is scored
# is decided by `sprue.serving.admission`.
@serve.deployment(
    name="scoring", max_ongoing_requests=MAX_CONNECTIONS, max_constructor_retry_count=2, health_check_period_s=HEALTH_S
)
@serve.ingress(app)
class ScoringService:
    """Scores samples with champions; loads them when they are asked for, changes them together with other replicas."""

    async def __init__(self, config: ServiceConfig) -> None:  # type: ignore[misc]
        """Loads the champions that are agreed on; raises as `sprue.serving.follower.Follower.start`."""
        self.decisions = self.shadow = None
        listen_on_node_address()
        tracing.send_traces()
        self.config = config
        self.decisions = DecisionLog(config.decisions) if config.decisions else None
        self.access = AccessWriter(config.access_log) if config.access_log else None
        self.keys = KeyFile(config.keys, config.rate, RateLimiter(_replicas), self.access)
        self.webhook_secret = read_secret(config.webhook_secret) if config.webhook_secret else None
        self.threads = _node_cpus()
        # Ray sets as many threads as the actor reserves CPUs; the flow may use the cores that the engine uses.
        torch.set_num_threads(self.threads)
        # Not asyncio's own pool: its size would not bound the memory of the images that are decoded at once.
        self.decoders = ThreadPoolExecutor(self.threads, "image")
        use_registry(config.coordinator.tracking_uri)
        self.batcher = Batcher(metrics.measured(score_together), BATCH)
        self.admission = Admission(config.admission, lambda: self.batcher.seconds_per_task)
        self.models = Champions(config.cache, self.threads)
        self.shadow = self._make_shadow(config)
        self.follower = Follower(config.coordinator, self.models, self.shadow)
        await self.follower.start(config.allow_empty)
        self.reporter = asyncio.create_task(self._report_state())

    def _make_shadow(self, config: ServiceConfig) -> Shadow | None:
        if not (config.shadow and config.decisions):
            return None
        settings = ShadowSettings(config.shadow, config.decisions, config.cache.max_bytes, config.limits.max_pixels)
        return Shadow(settings, self.models.loader, lambda: self.admission.queued > 0)

    async def __del__(self) -> None:
        """Ray Serve calls this when the last request is answered, before it ends the replica."""
        closing = [asyncio.to_thread(tracing.send_last, CLOSE_S)]
        closing += [asyncio.to_thread(self.decisions.close, CLOSE_S)] if self.decisions else []
        closing += [self.shadow.close(CLOSE_S)] if self.shadow else []
        await asyncio.gather(*closing)

    async def _report_state(self) -> None:
        failure = ""
        while True:
            try:
                metrics.report_state(self.admission, self.models, self.decisions, self.follower.registry_age_s)
            except Exception as error:  # a defect; the gauges go on with the next look
                if str(error) != failure:
                    logger.exception("the service's state could not be reported")
                failure = str(error)
            await asyncio.sleep(metrics.STATE_S)

    @app.post("/v1/classes/{name}/score", response_model=Score, **openapi.SCORE)
    async def score(
        self,
        name: Annotated[str, Path(description=openapi.NAME)],
        request: Request,
        response: Response,
        credentials: Credentials,
        heatmap: Annotated[bool, Query(description="Also return the image with its heat map over it")] = False,
        view: Annotated[
            str | None, Query(description="Heat map of this view; by default of the view with the highest score")
        ] = None,
        maps: Annotated[bool, Query(description="Also return the anomaly maps as numbers")] = False,
        record: Annotated[
            bool, Query(description="Keep and count the decision; `false` needs the scope `review`")
        ] = True,
    ) -> Any:
        """Scores one sample with the champion of its class.

        The body is the image's bytes (PNG, JPEG, BMP, TIFF or WebP; any size and mode), or a form with the image
        as its file. Where the class's samples have several images, it is a form with all of them: under the names of
        their views, or under other names in the views' order. With `heatmap=true` and `Accept: image/png` the
        response is the heat map as a PNG, with the score in its `X-Sprue-` headers; otherwise it is JSON.
        """
        timer = metrics.PhaseTimer()
        self.keys.require(credentials, "score", *(() if record else ("review",)))
        champion = self.models.find(name)
        async with self.admission.admit(request.headers) as admitted:
            metrics.CACHE.inc(1, {"outcome": "hit" if self.models.is_loaded(champion) else "miss"})
            views = (await self.models.load(champion)).detector.views
            timer.end("load")
            responses.require_view(champion, views, view)
            body = admitted.read(request.stream())
            uploads = await read_uploads(request.headers, body, views, self.config.limits.max_bytes)
            admitted.enqueue()
            served = await self._load_again(champion, views)
            timer.end("receive")
            predictions, batch, digests = await self._predict(served, uploads, timer)
            score, headers = responses.score(served, predictions), responses.timing_headers(timer.seconds, batch)
            png = b""
            if heatmap:
                headers["Vary"] = "Accept"
                png = await self._draw_heatmap(served, predictions, uploads, view, score)
                timer.end("heatmap")
        model = score.model
        tracing.describe(
            model=model.name, version=model.version, is_anomalous=score.is_anomalous, batch=batch, recorded=record
        )
        try:
            if record:
                decision = decision_of(served, score, request.headers, timer.total, batch, digests)
                if self.decisions:
                    self.decisions.add(decision, uploads)
                if self.shadow:
                    self.shadow.offer(decision, views, uploads)
                metrics.observe(decision, timer.seconds, served.detector.calibration)
        except Exception:  # a defect; the client gets its answer all the same
            logger.exception("a decision could not be recorded")
        if png and responses.wants_png(request.headers.get("accept", "")):
            return Response(png, media_type="image/png", headers=headers | responses.score_headers(score))
        score.heatmap_png = base64.b64encode(png).decode() or None
        score.maps = responses.anomaly_maps(served, predictions) if maps else None
        response.headers.update(headers)
        return score

    async def _load_again(self, champion: RegisteredDetector, views: tuple[str, ...]) -> ServedModel:
        """The loaded champion when the body is read: requests that are being read keep none in memory.

        Raises:
            ApiError: 503 if it can't be loaded, or has been replaced by one of other views.
        """
        served = await self.models.load(champion)
        if served.detector.views != views:
            message = f"class {champion.class_name!r} has just got other views: {', '.join(served.detector.views)}"
            raise ApiError(HTTPStatus.SERVICE_UNAVAILABLE, "class_unavailable", message, {"Retry-After": "1"})
        return served

    async def _predict(
        self, served: ServedModel, uploads: list[bytes], timer: metrics.PhaseTimer
    ) -> tuple[Predictions, int, tuple[str, ...]]:
        """A sample's predictions, made together with those of other requests; the batch's size; the images' digests."""
        limits, side = self.config.limits, served.detector.spec.input_size

        def prepare() -> tuple[Any, tuple[str, ...]]:
            return decode_inputs(uploads, limits.max_pixels, side), image_digests(uploads if self.decisions else ())

        inputs_VSS3, digests = await self._in_pool(prepare)
        timer.end("decode")
        predictions, batch = await self.batcher((served, inputs_VSS3))
        timer.end("score")
        return predictions, batch, digests

    async def _draw_heatmap(
        self, served: ServedModel, predictions: Predictions, uploads: list[bytes], view: str | None, score: Score
    ) -> bytes:
        """Draws the heat map of a view as a PNG, and says in the score which one it is of."""
        index = responses.shown_view(served, predictions, view)

        def draw() -> tuple[bytes, float]:
            # Decoded again rather than kept: an image may take 150 MB, and many requests wait for their scores.
            image = open_image(uploads[index], "the image", self.config.limits.max_pixels)
            return responses.heatmap_png(served, predictions, image, index)

        png, score.predicted_mask_fraction = await self._in_pool(draw)
        score.heatmap_view = served.detector.views[index] or None
        return png

    @app.get("/v1/classes", response_model=ServedClasses, **openapi.CLASSES)
    async def classes(self, credentials: Credentials) -> Any:
        """Lists the classes that can be scored, the version of each that all replicas serve, and since when."""
        self.keys.require(credentials, "score")
        models = self.models
        return ServedClasses(classes=[responses.summary(each, models.since(each)) for each in models.available])

    async def check_health(self) -> None:
        """Raises what a backbone raises, if it no longer runs: a device that has failed stays so for its process."""
        if self.batcher.has_failed:
            await self._in_pool(self.models.loader.try_engines)

    @app.get("/livez", response_model=Liveness, tags=["service"])
    async def livez(self) -> Any:
        """Answers as long as the service runs, however many requests wait."""
        return Liveness(status="alive")

    @app.get("/readyz", response_model=Readiness, response_model_exclude_none=True, tags=["service"])
    async def readyz(self, credentials: Credentials) -> Any:
        """Reports whether every champion is served, as far as they have been loaded, and decisions are kept; why not.

        A degraded service still scores, with the champions that it has. Where the service has keys, only those with the
        scope `admin` learn more than that it is ready.
        """
        if not self.keys.allows(credentials, "admin"):
            return Readiness(status="ready")
        models = self.models
        decisions_error = self.decisions.error or self.decisions.sweep_error if self.decisions else None
        errors = models.failures, self.follower.error, self.keys.error, decisions_error
        return Readiness(
            status="degraded" if any(errors) else "ready",
            classes=len(models.available),
            loaded=models.loaded,
            loaded_bytes=models.bytes,
            engines=models.engines,
            failures=models.failures,
            registry_error=self.follower.error or None,
            registry_age_s=self.follower.registry_age_s,
            keys_error=self.keys.error,
            decisions_error=decisions_error,
        )

    async def _in_pool(self, function: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.decoders, function, *arguments)
