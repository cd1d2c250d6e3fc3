"""Hands decisions to the store in the background: no request waits for it or fails with it, and its memory is bounded.

Each replica has a queue and one thread, which writes what waits every few seconds. While the store is slow or down the
queue grows to its limit; then the oldest rows are dropped, and counted.
"""

import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime
from itertools import islice, takewhile

import pyarrow as pa

from sprue.release.decision_store import SCHEMA, Decision, DecisionStore, Kept, rows_of
from sprue.serving.model_cache import ServedModel
from sprue.serving.schemas import Score
from sprue.store import location
from sprue.tracking.digests import file_digests

logger = logging.getLogger(__name__)

FLUSH_S = 5.0
"""Seconds between two writes; between two attempts while the store is down."""

MAX_ROWS = 10_000
"""Rows that wait; a row takes about a kilobyte."""

MAX_IMAGE_BYTES = 128 * 2**20
"""Memory of the images that wait."""

BATCH_ROWS = 1000
"""Rows that are written together."""

PART_ROWS = 10_000
"""Rows of a part. A part is written again with each batch until it has them, or the day is over: few files, and all of
them recent."""

SWEEP_S = 3600.0
"""Seconds between two looks for what is too old or too much; fewer when a tenth of all images has been written."""

RETRY_SWEEP_S = 60.0
"""Seconds until the next look after one that has failed."""

REPORT_S = 60.0
"""Seconds between two lines in the log about what was dropped."""

NEAR = 2.0
"""Samples whose p-value is at most this many times alpha are near the threshold."""


@dataclass(frozen=True)
class DecisionLogSettings:
    """What is kept, and how long.

    Attributes:
        folder: Folder or s3 URL.
        keep_days: Age in days at which rows and images are deleted.
        image_bytes: Size of all images, beyond which the oldest are deleted.
        sample: Fraction of the samples that are neither alarms nor near the threshold whose images are kept.
    """

    folder: str
    keep_days: int = 90
    image_bytes: int = 20 * 10**9
    sample: float = 0.01


def decision_of(
    served: ServedModel, score: Score, headers: Mapping[str, str], latency_s: float, batch: int, images: tuple[str, ...]
) -> Decision:
    """The decision that an answer states; `headers` are the request's, `images` the digests of what it sent."""
    return Decision(
        # Ray Serve's proxy gives a request the identifier that its answer has.
        request_id=headers.get("x-request-id", ""),
        at=datetime.now(UTC),
        station=headers.get("x-station", ""),
        dataset=score.dataset,
        class_name=score.class_name,
        version=score.model.version,
        files=file_digests(served.champion.tags),
        engine=served.engine.name,
        score=score.score,
        p_value=score.p_value,
        alpha=score.alpha,
        threshold=score.threshold,
        is_anomalous=score.is_anomalous,
        latency_s=latency_s,
        batch=batch,
        images=images,
    )


def why_kept(decision: Decision, sample: float) -> Kept:
    """Why a sample's images are kept; the fraction `sample` is chosen by the first image's digest."""
    if decision.is_anomalous:
        return "alarm"
    if decision.p_value <= NEAR * decision.alpha:
        return "near"
    return "sample" if int(decision.images[0][:8], 16) < sample * 2**32 else ""


@dataclass
class _Part:
    """The part that grows."""

    day: date
    name: str
    rows: pa.Table = field(default_factory=SCHEMA.empty_table)


class DecisionLog:
    """The decisions of a replica, on their way to the store.

    Attributes:
        dropped_rows: Decisions that were dropped, since the store did not take them in time.
        dropped_images: Samples whose images were not kept, since those that wait filled the memory for them.
        error: Why the store could not be written to the last time.
        sweep_error: Why what is too old or too much could not be deleted the last time.
    """

    def __init__(self, settings: DecisionLogSettings) -> None:
        """Starts the thread; raises SprueError for a URL of another scheme than s3."""
        self.dropped_rows = self.dropped_images = 0
        self.error: str | None = None
        self.sweep_error: str | None = None
        self._settings, self._store = settings, DecisionStore(location(settings.folder))
        self._waiting: deque[tuple[Decision, Sequence[bytes]]] = deque()
        self._image_bytes = self._written = 0
        self._lock, self._wake, self._closing = threading.Lock(), threading.Event(), False
        self._replica, self._parts, self._part = uuid.uuid4().hex[:12], 0, _Part(date.min, "")
        self._next_sweep, self._next_report, self._reported = 0.0, 0.0, (0, 0)
        self._thread = threading.Thread(target=self._run, name="decisions", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Decisions that are not in the store yet."""
        return len(self._waiting)

    def add(self, decision: Decision, images: Sequence[bytes]) -> None:
        """Takes a decision and its sample's images; returns at once."""
        kept = why_kept(decision, self._settings.sample)
        size = sum(map(len, images)) if kept else 0
        with self._lock:
            if self._image_bytes + size > MAX_IMAGE_BYTES:
                self.dropped_images += 1
                kept, size = "", 0
            self._image_bytes += size
            self._waiting.append((replace(decision, kept=kept), images if kept else ()))
            self._drop_oldest()
            urgent = len(self._waiting) >= BATCH_ROWS or self._image_bytes > MAX_IMAGE_BYTES / 4
        if urgent and not self.error:
            self._wake.set()

    def close(self, timeout_s: float) -> None:
        """Writes what waits and ends; what the store does not take in that time is lost, and said in the log."""
        self._closing = True
        self._wake.set()
        self._thread.join(timeout_s)
        if self._waiting or self._thread.is_alive():
            logger.error("the service stops before the store has taken its last decisions: %s", self.error or "slow")

    def _drop_oldest(self) -> None:
        while len(self._waiting) > MAX_ROWS:
            _, images = self._waiting.popleft()
            self._image_bytes -= sum(map(len, images))
            self.dropped_rows += 1

    def _run(self) -> None:
        while True:
            self._wake.wait(FLUSH_S)
            self._wake.clear()
            last = self._closing
            try:
                while self._write_batch():
                    pass
                self.error = None
            except Exception as error:  # whatever a store's library raises; the rows are still there
                if self.error is None:
                    logger.error("decisions wait, since %s can't be written to: %s", self._settings.folder, error)
                self.error = str(error) or type(error).__name__
            if not (last or self.error):
                self._sweep()
            self._report()
            if last:
                return

    def _write_batch(self) -> bool:
        """Writes the oldest rows, all of one day; puts them back if that fails. False if there are none."""
        with self._lock:
            if not self._waiting:
                return False
            day = self._waiting[0][0].at.date()
            batch = list(islice(takewhile(lambda each: each[0].at.date() == day, self._waiting), BATCH_ROWS))
            for _ in batch:
                self._waiting.popleft()
        try:
            self._write(day, batch)
        except BaseException:
            with self._lock:
                self._waiting.extendleft(reversed(batch))
                self._drop_oldest()
            raise
        with self._lock:
            self._image_bytes -= sum(len(image) for _, images in batch for image in images)
        return True

    def _write(self, day: date, batch: Sequence[tuple[Decision, Sequence[bytes]]]) -> None:
        """Writes images before the rows that tell of them."""
        for decision, images in batch:
            for digest, image in zip(decision.images, images, strict=False):  # none, or all
                self._store.write_image(decision.at, digest, image)
                self._written += len(image)
        if self._part.day != day or self._part.rows.num_rows >= PART_ROWS:
            self._parts += 1
            self._part = _Part(day, f"{batch[0][0].at:%H%M%S}-{self._replica}-{self._parts:04}")
        rows = pa.concat_tables([self._part.rows, rows_of([decision for decision, _ in batch])])
        self._store.write_part(day, self._part.name, rows)
        self._part.rows = rows

    def _sweep(self) -> None:
        if time.monotonic() < self._next_sweep and self._written <= self._settings.image_bytes / 10:
            return
        self._next_sweep, self._written = time.monotonic() + SWEEP_S, 0
        today = datetime.now(UTC).date()
        try:
            deleted = self._store.delete_old(today, self._settings.keep_days, self._settings.image_bytes)
            self.sweep_error = None
        except Exception as error:  # whatever a store's library raises
            if self.sweep_error is None:
                logger.error("old decisions can't be deleted from %s: %s", self._settings.folder, error)
            self.sweep_error = str(error) or type(error).__name__
            self._next_sweep = time.monotonic() + RETRY_SWEEP_S
        else:
            if deleted:
                logger.info("deleted %d days and images, from %s on", len(deleted), deleted[0])

    def _report(self) -> None:
        dropped = self.dropped_rows, self.dropped_images
        if dropped != self._reported and (self._closing or time.monotonic() >= self._next_report):
            self._next_report, self._reported = time.monotonic() + REPORT_S, dropped
            logger.error("dropped %d decisions and the images of %d samples since the start", *dropped)
