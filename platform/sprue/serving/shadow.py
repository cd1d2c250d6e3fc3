"""Shadowing: a fraction of the traffic is scored by the challengers, too. Nobody is answered with that or waits for it.

A sample that has been answered is scored by its class's challenger at a moment at which no request waits. What the
challenger decides is a row like the champion's, with the same identifier and time, in a folder of its own;
`sprue.release.shadowing` holds the two against each other. Images are kept by the same rules, so that those about which
the two disagree are there.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from sprue.errors import SprueError
from sprue.inference.detector import Predictions
from sprue.release.decision_store import Decision
from sprue.release.shadowing import FOLDER
from sprue.serving import responses
from sprue.serving.agreement import Entry
from sprue.serving.decision_log import DecisionLog, DecisionLogSettings, decision_of
from sprue.serving.loading import Loader
from sprue.serving.metrics import SHADOWED
from sprue.serving.model_cache import ModelCache, ServedModel, score_together
from sprue.serving.parsing import decode_inputs
from sprue.store import location
from sprue.tracking.names import label
from sprue.tracking.registry import RegisteredDetector

logger = logging.getLogger(__name__)

WAITING = 4
"""Samples that wait for their turn, with their images; more are skipped."""

PATIENCE_S = 10.0
"""How long a sample waits for its turn, and for a moment without requests; then it is skipped."""

SHARE = 0.25
"""Of the memory for loaded champions, and of the space for kept images, that challengers get besides."""

LOOK_S = 0.02
"""Seconds between two looks for such a moment."""

RETRY_S = 900.0
"""Until a challenger that could not be loaded is tried again."""


@dataclass(frozen=True)
class ShadowSettings:
    """What challengers score.

    Attributes:
        fraction: Of the samples of classes that have a challenger.
        decisions: Where champions' decisions are kept; those of challengers are kept beside them.
        max_bytes: Memory of the champions that are loaded.
        max_pixels: As of `sprue.serving.parsing.ServiceLimits`.
    """

    fraction: float
    decisions: DecisionLogSettings
    max_bytes: int
    max_pixels: int


class Shadow:
    """The challengers of a replica; used on its event loop."""

    def __init__(
        self,
        settings: ShadowSettings,
        loader: Loader,
        is_busy: Callable[[], bool],
    ) -> None:
        """Starts without a challenger.

        Args:
            settings: What is scored.
            loader: The replica's, so that challengers share the champions' engines.
            is_busy: Whether requests wait.
        """
        self._settings, self._loader, self._is_busy = settings, loader, is_busy
        folder = str(location(settings.decisions.folder).parent / FOLDER)
        image_bytes = int(SHARE * settings.decisions.image_bytes)
        self.log = DecisionLog(replace(settings.decisions, folder=folder, image_bytes=image_bytes, sample=0.0))
        """The challengers' decisions, on their way to the store."""
        self._challengers: dict[str, RegisteredDetector] = {}
        self._cache = ModelCache(int(SHARE * settings.max_bytes))
        self._turn = asyncio.Lock()
        self._retry_at: dict[RegisteredDetector, float] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._chosen = random.Random()

    def apply(self, entries: Mapping[str, Entry]) -> None:
        """Takes what has changed of what is agreed."""
        for name, entry in entries.items():
            if entry.challenger is None:
                self._challengers.pop(name, None)
                self._cache.drop(name)
            else:
                self._challengers[name] = entry.challenger
        present = set(self._challengers.values())
        self._retry_at = {each: at for each, at in self._retry_at.items() if each in present}

    def offer(self, decision: Decision, views: tuple[str, ...], images: Sequence[bytes]) -> None:
        """Perhaps takes a sample that a champion of these views has decided about; returns at once."""
        challenger = self._challengers.get(decision.model_name)
        if challenger is None or challenger.version == decision.version:
            return
        if self._chosen.random() >= self._settings.fraction:
            return
        if len(self._tasks) >= WAITING:
            _count(challenger, "skipped")
            return
        task = asyncio.create_task(self._score(challenger, decision, views, images))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self, timeout_s: float) -> None:
        """Lets the samples that wait be scored, and writes their rows; what takes longer is lost."""
        end = time.monotonic() + timeout_s
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s / 2)
        await asyncio.to_thread(self.log.close, end - time.monotonic())

    async def _score(
        self, challenger: RegisteredDetector, decision: Decision, views: tuple[str, ...], images: Sequence[bytes]
    ) -> None:
        try:
            async with asyncio.timeout(PATIENCE_S):
                await self._turn.acquire()
        except TimeoutError:
            _count(challenger, "skipped")
            return
        try:
            outcome = await self._compare(challenger, decision, views, images)
        except Exception as error:  # one challenger's; champions go on
            logger.error(
                "%s does not shadow the champion: %s", challenger, error, exc_info=not isinstance(error, SprueError)
            )
            self._retry_at[challenger] = time.monotonic() + RETRY_S
            outcome = "failed"
        finally:
            self._turn.release()
        _count(challenger, outcome)

    async def _compare(
        self, challenger: RegisteredDetector, decision: Decision, views: tuple[str, ...], images: Sequence[bytes]
    ) -> str:
        if self._retry_at.get(challenger, 0.0) > time.monotonic():
            return "failed"
        if not await self._is_quiet():
            return "skipped"
        served = await self._load(challenger)
        if served.detector.views != views:
            raise SprueError(f"its views are {', '.join(served.detector.views)}, the champion's {', '.join(views)}")
        side = served.detector.spec.input_size
        inputs_VSS3 = await asyncio.to_thread(decode_inputs, images, self._settings.max_pixels, side)
        if not await self._is_quiet():
            return "skipped"
        started = time.perf_counter()
        # Not in the requests' batches: they would wait for it, and fail with it.
        (predictions,) = await asyncio.to_thread(score_together, [(served, inputs_VSS3)])
        self.log.add(_decision(decision, served, predictions, time.perf_counter() - started), images)
        is_anomalous = bool(predictions.is_anomalous_B[0])
        if is_anomalous == decision.is_anomalous:
            return "same"
        return "challenger_alarms" if is_anomalous else "champion_alarms"

    async def _is_quiet(self) -> bool:
        """Waits for a moment without requests; False if there is none."""
        patient_until = time.monotonic() + PATIENCE_S
        while self._is_busy():
            if time.monotonic() > patient_until:
                return False
            await asyncio.sleep(LOOK_S)
        return True

    async def _load(self, challenger: RegisteredDetector) -> ServedModel:
        served = self._cache.use(challenger.model_name)
        if served is None or served.champion != challenger:
            served = await asyncio.to_thread(self._loader, challenger)
            self._cache.put(served, is_used=True)
            if challenger.model_name not in self._cache:
                raise SprueError("there is no memory for its flow; serve with a larger --cache-gb")
        return served


def _decision(champions: Decision, served: ServedModel, predictions: Predictions, seconds: float) -> Decision:
    """What a challenger decides where a champion has decided."""
    headers = {"x-request-id": champions.request_id, "x-station": champions.station}
    score = responses.score(served, predictions)
    return replace(decision_of(served, score, headers, seconds, 1, champions.images), at=champions.at)


def _count(challenger: RegisteredDetector, outcome: str) -> None:
    labels = {"model": label(challenger.model_name), "version": str(challenger.version), "outcome": outcome}
    SHADOWED.inc(1, labels)
