"""The metrics of fits. Ray exports them for Prometheus on the node of the stage, with the prefix ``ray_``.

They come from the process that runs the stage, which sees every epoch and every outcome, and are gone from a node's
export soon after it ends; Prometheus keeps what it has read.
"""

import time
from collections import Counter
from collections.abc import Sequence

from ray.util import metrics
from ray.util.metrics import Gauge, Histogram

from sprue.tracking.names import label
from sprue.training.loop import Epoch
from sprue.training.spec import FitSpec

MOST_CLASSES = 100
"""Fits of a run whose losses are exported: each is a series, and Ray keeps them until the run ends."""

SECONDS = [10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 14400, 43200]

FITS = Gauge("sprue_fits", "Fits of the running stage by state: waiting, running, done or failed", ("dataset", "state"))
EPOCHS = metrics.Counter("sprue_fit_epochs", "Epochs that were finished", ("dataset",))
LOSSES = Gauge("sprue_fit_loss", "Loss of a fit's last epoch in nats per dimension", ("model", "split"))
DURATIONS = Histogram("sprue_fit_seconds", "Seconds from a fit's start to its outcome", SECONDS, ("dataset", "outcome"))
IMAGES = Gauge("sprue_fit_images_per_second", "Training images a second in a fit's last epoch", ("model",))

STATES = ("waiting", "running", "done", "failed")


class FitMetrics:
    """Follows the fits of one stage.

    A fit starts, as far as is seen here, one epoch before its first report.
    """

    def __init__(self, dataset: str, specs: Sequence[FitSpec]) -> None:
        """All fits wait."""
        self._dataset = label(dataset)
        self._counts = Counter(waiting=len(specs))
        self._running: set[str] = set()
        self._shown = {spec.name for spec in specs[:MOST_CLASSES]}
        self._started: dict[str, float] = {}
        self._report()

    def epoch(self, name: str, epoch: Epoch) -> None:
        """Takes a fit's epoch."""
        self._started.setdefault(name, time.monotonic() - epoch.seconds)
        if name not in self._running:
            self._running.add(name)
            self._move("waiting", "running")
        EPOCHS.inc(1, {"dataset": self._dataset})
        if name in self._shown:
            model = {"model": f"{self._dataset}.{label(name)}"}
            LOSSES.set(epoch.train_nll, model | {"split": "train"})
            LOSSES.set(epoch.validation_nll, model | {"split": "validation"})
            IMAGES.set(epoch.images_per_second, model)
        self._report()

    def outcome(self, name: str, failed: bool) -> None:
        """Takes a fit's end."""
        self._move("running" if name in self._running else "waiting", "failed" if failed else "done")
        self._running.discard(name)
        if (started := self._started.pop(name, None)) is not None:
            DURATIONS.observe(
                time.monotonic() - started, {"dataset": self._dataset, "outcome": "failed" if failed else "done"}
            )
        self._report()

    def _move(self, before: str, after: str) -> None:
        self._counts[before] -= 1
        self._counts[after] += 1

    def _report(self) -> None:
        for state in STATES:
            FITS.set(self._counts[state], {"dataset": self._dataset, "state": state})
