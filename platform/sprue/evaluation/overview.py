"""The page over all classes: how well each does, its worst errors, what failed and what needs a decision.

It has one row a class; its thumbnails are files beside the classes' reports, so that it stays small with hundreds.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sprue.config import CalibrationSettings
from sprue.data.layouts import SkippedFile
from sprue.evaluation.baseline import COMPARED, in_words
from sprue.evaluation.metrics import Estimate
from sprue.evaluation.outliers import undecided
from sprue.evaluation.report import MEANINGS, PAGES, shown
from sprue.evaluation.summary import FALSE_ALARM, MISS, Errors, Summary
from sprue.inference.calibration import RATE_COVERAGE

TITLES = {
    "sample_auroc": "AUROC of parts",
    "image_auroc": "AUROC of images",
    "pixel_aupro": "AUPRO",
    "detection_rate": "defective parts found",
    "false_alarm_rate": "false alarms",
}
"""The metrics of a row, in its order; the class's report has the others."""

TRUE_RATE = "of all good parts raise a false alarm; the number of calibration samples tells between which rates that is"
OVER_GAUSSIAN = "more than the Gaussian of the same features, without a flow; nothing is shown if the interval holds 0"

LISTED = 20
"""Copies of test images that are listed, at most."""


class FailedClass(NamedTuple):
    """A class that could not be evaluated, the stage in which it failed, and why."""

    class_name: str
    stage: str
    reason: str


@dataclass(frozen=True)
class ClassResult:
    """What the evaluation of a class has stored: estimates, metrics (see `Evaluation.metrics`) and summary."""

    estimates: Mapping[str, Estimate]
    metrics: Mapping[str, float]
    summary: Summary


class Bar(NamedTuple):
    """An estimate as a bar on a scale.

    Attributes:
        title: Of the metric.
        meaning: Of the metric, in a sentence.
        estimate: Value and interval; the value may be missing.
        low: Value at the bar's left end.
        high: Value at its right end.
        mark: A value that is marked: alpha, or no difference.
        kind: ``good`` where more is better, ``bad`` where less is, ``difference`` to the Gaussian.
    """

    title: str
    meaning: str
    estimate: Estimate
    low: float = 0.0
    high: float = 1.0
    mark: float | None = None
    kind: str = "good"

    def at(self, value: float) -> float:
        """Where a value is on the bar, in 0..100; values beyond its ends are at them."""
        return round(100 * (min(max(value, self.low), self.high) - self.low) / (self.high - self.low), 2)

    @property
    def has_value(self) -> bool:
        """Whether there is a value, or an interval alone."""
        return bool(np.isfinite(self.estimate.value))

    @property
    def value(self) -> str:
        """The value in words; for an interval alone, the alpha that was set."""
        if not self.has_value:
            return f"alpha {100 * (self.mark or 0):.3g} %"
        value = 100 * self.estimate.value
        return f"{value:+.1f} points" if self.kind == "difference" else f"{value:.1f} %"

    @property
    def interval(self) -> str:
        """The interval in words; empty if it has no width."""
        low, high = 100 * self.estimate.low, 100 * self.estimate.high
        if not low < high:
            return ""
        if not self.has_value:
            return f"{low:.3g} to {high:.3g} %"
        return f"{low:+.1f} to {high:+.1f}" if self.kind == "difference" else f"{low:.1f} to {high:.1f}"


def overview(
    dataset: str,
    results: Mapping[str, ClassResult],
    settings: CalibrationSettings,
    failures: Sequence[FailedClass] = (),
    copies: Sequence[SkippedFile] = (),
    keep: Collection[str] = (),
) -> str:
    """The page; it links to ``<class>/report.html`` and shows ``<class>/miss.webp`` and ``<class>/false_alarm.webp``.

    Args:
        dataset: The dataset.
        results: Of each class that was evaluated.
        settings: What the thresholds promise.
        failures: The classes that were not. Those of the stage ``features`` wait for a decision about foreign images.
        copies: Training images that were skipped as copies of test images.
        keep: Paths of images that the user has called good; outliers among them are decided.
    """
    foreign = [failure for failure in failures if failure.stage == "features"]
    lowest_first = sorted(results, key=lambda name: (_auroc(results[name]), name))
    outliers = {name: undecided(results[name].summary.outliers, keep) for name in sorted(results)}
    outliers = {name: found for name, found in outliers.items() if found}
    return PAGES.get_template("overview.html").render(
        dataset=dataset,
        rows=[_row(name, results[name]) for name in lowest_first],
        means=_means(results),
        settings=settings,
        foreign=foreign,
        failed=[failure for failure in failures if failure.stage != "features"],
        outliers=outliers,
        decisions=len(foreign) + len(outliers) + len(copies),
        copies=copies[:LISTED],
        more_copies=max(0, len(copies) - LISTED),
        miss=MISS,
        false_alarm=FALSE_ALARM,
    )


class _Row(NamedTuple):
    class_name: str
    metrics: Mapping[str, float]
    misses: Errors
    false_alarms: Errors
    bars: list[Bar]
    over_gaussian: str


def _row(class_name: str, result: ClassResult) -> _Row:
    summary, line = result.summary, in_words(result.summary.flow_name, result.metrics)
    return _Row(class_name, result.metrics, summary.misses, summary.false_alarms, _bars(result), line)


def _auroc(result: ClassResult) -> float:
    estimate = result.estimates.get("sample_auroc")
    return estimate.value if estimate else np.inf


def _bars(result: ClassResult) -> list[Bar]:
    """A class's bars: its metrics, between which rates its false alarms truly lie, and what its flow adds."""
    estimates, metrics = shown(result.estimates), result.metrics
    bars = [Bar(TITLES[name], MEANINGS[name], estimates[name]) for name in TITLES if name in estimates]
    if "false_alarm_rate" in estimates:  # the last of TITLES
        bars[-1] = bars[-1]._replace(mark=metrics["alpha"], kind="bad")
    true_rate = Estimate(np.nan, metrics["false_alarm_rate_low"], metrics["false_alarm_rate_high"])
    bars.append(
        Bar(
            f"true false-alarm rate ({100 * RATE_COVERAGE:.3g} %)",
            TRUE_RATE,
            true_rate,
            mark=metrics["alpha"],
            kind="bad",
        )
    )
    for name, title in COMPARED.items():
        if f"{name}_over_gaussian" in metrics:
            difference = Estimate(*(metrics[f"{name}_over_gaussian{end}"] for end in ("", "_low", "_high")))
            bars.append(
                Bar(f"{title} over the Gaussian's", OVER_GAUSSIAN, difference, -0.5, 0.5, mark=0.0, kind="difference")
            )
    return bars


def _means(results: Mapping[str, ClassResult]) -> list[tuple[str, float, int]]:
    """The mean of each metric over the classes that have it, and their number."""
    means = []
    for name, title in TITLES.items():
        values = [
            found[name].value for found in (shown(result.estimates) for result in results.values()) if name in found
        ]
        if values:
            means.append((title, float(np.mean(values)), len(values)))
    return means
