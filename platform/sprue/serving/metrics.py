"""The service's metrics. Ray exports them for Prometheus on each node, with the prefix ``ray_``.

Labels are few: phases, routes and statuses, and the models and versions that are served. Errors are counted in
`sprue.serving.errors`.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from ray.util.metrics import Counter, Gauge, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sprue.inference.calibration import Calibration
from sprue.release.decision_store import Decision
from sprue.serving.admission import Admission
from sprue.serving.champions import Champions
from sprue.serving.decision_log import DecisionLog
from sprue.serving.tracing import add_phase
from sprue.tracking.names import label

Task = TypeVar("Task")
Result = TypeVar("Result")

STATE_S = 1.0
"""Seconds between two looks at the queue and other states."""

SECONDS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0]
P_VALUES = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0]
RELATIVE_SCORES = [0.1, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0]

REQUESTS = Counter("sprue_requests", "Requests by route (score or other) and status", ("route", "status"))
PHASES = Histogram("sprue_phase_seconds", "Seconds of a request's phases, and of a batch", SECONDS, ("phase",))
BATCHES = Histogram("sprue_batch_samples", "Samples that are scored together", [1, 2, 4, 8, 16], ())
QUEUED = Gauge("sprue_queued", "Requests that wait for their score or have it and are not answered yet", ())
READING = Gauge("sprue_reading", "Requests whose body is being read", ())
CACHE = Counter("sprue_model_cache", "Requests whose class was loaded (hit), or had to be (miss)", ("outcome",))
DECISIONS = Counter("sprue_decisions", "Samples that were scored", ("model", "version", "decision"))
SHADOWED = Counter(
    "sprue_shadowed",
    "Samples that a challenger was to score, too: its decision is the same, or one of the two alarms alone, or neither",
    ("model", "version", "outcome"),
)
SCORES = Histogram(
    "sprue_relative_score",
    "Scores, where 0 is the lowest calibration score and 1 the threshold",
    RELATIVE_SCORES,
    ("model", "version"),
)
P = Histogram("sprue_p_value", "Conformal p-values", P_VALUES, ("model", "version"))
ALPHA = Gauge("sprue_alpha", "The false-alarm rate that a model is calibrated for", ("model",))
VERSIONS = Gauge("sprue_champion_version", "The version that is served; it changes with a swap", ("model",))
CLASSES = Gauge("sprue_classes", "Classes that are served", ())
FAILURES = Gauge("sprue_failures", "Classes whose champion can't be loaded", ())
REGISTRY_AGE = Gauge("sprue_registry_age_seconds", "Seconds since the registry was last read", ())
WAITING = Gauge("sprue_decisions_waiting", "Decisions that are not in the store yet", ())
DROPPED = Gauge("sprue_decisions_dropped", "Rows, and samples' images, that the store did not take in time", ("what",))


class PhaseTimer:
    """Measures a request's phases, one after the other, and adds them to its trace."""

    def __init__(self) -> None:
        """Starts the first phase."""
        self.seconds: dict[str, float] = {}
        self._started = self._last = time.perf_counter()
        self._epoch = time.time() - self._started

    def end(self, phase: str) -> None:
        """Ends a phase and starts the next."""
        now = time.perf_counter()
        add_phase(phase, self._epoch + self._last, self._epoch + now)
        self.seconds[phase], self._last = now - self._last, now

    @property
    def total(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._started


def relative_score(score: float, calibration: Calibration) -> float:
    """A score on a scale that all classes share: 0 is the lowest calibration score, or below it, and 1 the threshold.

    >>> calibration = Calibration(tuple(map(float, range(19))), alpha=0.05, low=0.0, high=1.0, pixel_threshold=1.0)
    >>> relative_score(9.0, calibration)
    0.5
    """
    lowest = calibration.scores[0]
    # Ray's histograms take no negative values.
    return max(0.0, score - lowest) / max(calibration.threshold - lowest, 1e-12)


def observe(decision: Decision, seconds: Mapping[str, float], calibration: Calibration) -> None:
    """Counts a decision; `seconds` are its request's phases."""
    model = {"model": label(decision.model_name)}
    labels = model | {"version": str(decision.version)}
    DECISIONS.inc(1, labels | {"decision": "anomalous" if decision.is_anomalous else "normal"})
    SCORES.observe(relative_score(decision.score, calibration), labels)
    P.observe(decision.p_value, labels)
    ALPHA.set(decision.alpha, model)
    for phase, duration in seconds.items():
        PHASES.observe(duration, {"phase": phase})
    PHASES.observe(decision.latency_s, {"phase": "total"})


def measured(score_batch: Callable[[Sequence[Task]], list[Result]]) -> Callable[[Sequence[Task]], list[Result]]:
    """Counts the batches that a function scores, and measures their time."""

    def score(tasks: Sequence[Task]) -> list[Result]:
        started = time.perf_counter()
        results = score_batch(tasks)
        BATCHES.observe(len(tasks))
        PHASES.observe(time.perf_counter() - started, {"phase": "batch"})
        return results

    return score


def report_state(admission: Admission, models: Champions, log: DecisionLog | None, registry_age_s: float) -> None:
    """Sets the metrics that are states of a replica rather than events; all of them, since Ray may miss a value."""
    QUEUED.set(admission.queued)
    REGISTRY_AGE.set(registry_age_s)
    READING.set(admission.reading)
    if log:
        WAITING.set(log.waiting)
        DROPPED.set(log.dropped_rows, {"what": "rows"})
        DROPPED.set(log.dropped_images, {"what": "images"})
    available = models.available
    CLASSES.set(len(available))
    FAILURES.set(len(models.failures))
    for champion in available:
        VERSIONS.set(champion.version, {"model": label(champion.model_name)})


class CountRequests:
    """Counts all requests by the status of their response; 499 for those whose client has gone."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 499

        async def send_and_see(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_and_see)
        except Exception:  # Starlette answers outside of this
            status = 500
            raise
        finally:
            route = "score" if scope["path"].endswith("/score") else "other"
            REQUESTS.inc(1, {"route": route, "status": str(status)})
