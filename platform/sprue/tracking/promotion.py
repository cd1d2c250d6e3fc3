"""Whether a challenger may become champion: a paired test on pictures that neither has learnt from."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sprue.data.labelled import LabelledSample, with_drawn_defects
from sprue.evaluation.alarms import chance_of
from sprue.evaluation.metrics import Figure, auroc_difference, image_figures
from sprue.inference.detector import Detector
from sprue.inference.engines import Engine

TIMED = 20
"""Samples that are scored one at a time, for the latency."""

ENOUGH = 20
"""With fewer pictures of a kind, the interval of a difference is far too narrow: at 5 of each, half of the challengers
that are 5 percentage points worse would pass, at 20 of each, one in a hundred."""


@dataclass(frozen=True)
class Rules:
    """What a challenger has to keep to.

    Attributes:
        margin: Its AUROC may be this much lower than the champion's; a difference that could be larger, by its 95 %
            interval, is too much.
        significance: Its false alarms may be so many that their guarantee makes them at least this likely.
        latency_s: A sample is scored within this time, in the median, on the machine that decides.
    """

    margin: float = 0.01
    significance: float = 0.05
    latency_s: float = 1.0


@dataclass(frozen=True)
class Evidence:
    """What was measured of a challenger.

    Attributes:
        good: Good samples.
        defective: Defective ones.
        drawn: Whether the defects are drawn, for there were none.
        auroc: The challenger's.
        difference: Its AUROC less the champion's; None if there is no champion.
        alarms: Good samples that it calls anomalous.
        chance: Of that many or more, if its guarantee holds.
        alpha: The rate that it guarantees.
        latency_s: Seconds a sample.
    """

    good: int
    defective: int
    drawn: bool
    auroc: float
    difference: Figure | None
    alarms: int
    chance: float
    alpha: float
    latency_s: float

    def objections(self, rules: Rules) -> list[str]:
        """Why it may not become champion; none if it may."""
        found = []
        for count, what in ((self.good, "good"), (self.defective, "defective")):
            if count < ENOUGH:
                found.append(f"{count} {what} samples tell too little; name at least {ENOUGH}")
        if self.difference is not None and not self.difference.low >= -rules.margin:
            figure = self.difference
            found.append(
                f"its AUROC may be {-figure.low:.2%} lower than the champion's (found {figure.value:+.2%}, 95 % "
                f"interval {figure.low:+.2%} to {figure.high:+.2%}); {rules.margin:.2%} are allowed: fit a better one, "
                "or name more pictures"
            )
        if self.chance < rules.significance:
            found.append(
                f"it called {self.alarms} of {self.good} good samples anomalous; with the {self.alpha:.1%} that it "
                f"guarantees, so many have a chance of {self.chance:.2%}: calibrate it on pictures like these"
            )
        if not self.latency_s <= rules.latency_s:
            found.append(f"it takes {self.latency_s:.2f} s a sample here; {rules.latency_s:.2f} s are allowed")
        return found

    def __str__(self) -> str:
        """What was measured, in words."""
        against, defects = "", "drawn defects" if self.drawn else "defective samples"
        if self.difference is not None:
            figure = self.difference
            against = f", {figure.value:+.2%} against the champion's ({figure.low:+.2%} to {figure.high:+.2%})"
        return (
            f"AUROC {self.auroc:.2%}{against} on {self.good} good and {self.defective} {defects}; "
            f"{self.alarms} false alarms at alpha {self.alpha:.1%} (so many or more: {self.chance:.0%}); "
            f"{1000 * self.latency_s:.0f} ms a sample"
        )

    def figures(self) -> dict[str, float]:
        """The same as numbers."""
        figures = {"good": self.good, "defective": self.defective, "drawn": self.drawn, "auroc": self.auroc}
        figures |= {"false_alarms": self.alarms, "chance_of_false_alarms": self.chance, "latency_s": self.latency_s}
        if self.difference is not None:
            figures["auroc_difference"] = self.difference.value
            figures |= {"auroc_difference_low": self.difference.low, "auroc_difference_high": self.difference.high}
        return {name: float(value) for name, value in figures.items()}


def measure(challenger: Detector, champion: Detector | None, samples: list[LabelledSample]) -> Evidence:
    """Scores samples with both detectors; where none is defective, with defects drawn on them too."""
    drawn = not any(sample.label for sample in samples)
    if drawn:
        samples = with_drawn_defects(samples)
    label_N = np.array([sample.label for sample in samples])
    engine = challenger.build_engine()
    score_N, is_anomalous_N = _predict(challenger, engine, samples)
    difference = None
    if champion is not None:
        same = champion.spec.fingerprint == challenger.spec.fingerprint
        champion_N, _ = _predict(champion, engine if same else champion.build_engine(), samples)
        group_N = np.array([sample.group for sample in samples]) if drawn else None
        difference = auroc_difference(score_N, champion_N, label_N, group_N)
    good, alarms = int((label_N == 0).sum()), int(is_anomalous_N[label_N == 0].sum())
    calibration = challenger.calibration
    return Evidence(
        good=good,
        defective=int(label_N.sum()),
        drawn=drawn,
        auroc=image_figures(score_N, label_N)["auroc"].value,
        difference=difference,
        alarms=alarms,
        chance=chance_of(alarms, len(calibration.scores), calibration.alpha, good),
        alpha=calibration.alpha,
        latency_s=_latency(challenger, engine, samples[:TIMED]),
    )


def _predict(
    detector: Detector, engine: Engine, samples: Sequence[LabelledSample]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    predictions = detector.predict([sample.images for sample in samples], engine)
    return predictions.score_B, predictions.is_anomalous_B


def _latency(detector: Detector, engine: Engine, samples: Sequence[LabelledSample]) -> float:
    """The median time of a sample alone, the first being scored twice, for it warms up."""
    seconds = []
    for sample in (samples[0], *samples):
        started = time.perf_counter()
        detector.predict([sample.images], engine)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])
