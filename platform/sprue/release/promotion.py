"""Decides whether a challenger becomes champion, by a paired test; `sprue.release.aliases` then changes it."""

import hashlib
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from upath import UPath

from sprue.data.labelled import LabelledSample, read_labelled, with_synthetic_defects
from sprue.errors import SprueError
from sprue.evaluation.metrics import Estimate, auroc_difference, score_estimates
from sprue.inference.detector import Detector
from sprue.inference.engines import Engine
from sprue.release.aliases import promote, reconcile, version_for_alias
from sprue.release.false_alarms import chance_of
from sprue.release.shadowing import Shadowing, read_shadowing
from sprue.tracking.backbones import registered_engine
from sprue.tracking.lineage import Lineage
from sprue.tracking.lock import alias_lock
from sprue.tracking.registry import CHAMPION, RegisteredDetector, find_registered, load_detector

AT_ONCE = 16
"""Samples that are decoded and scored together."""

TIMED = 20
"""Samples that are scored one at a time, for the latency."""

ENOUGH = 20
"""Samples of a kind that a decision needs. With fewer the interval of a difference is too narrow: at 5 of each, half of
the challengers that are 5 percentage points worse would pass; at 20 of each, one in a hundred."""


@dataclass(frozen=True)
class Rules:
    """What a challenger must satisfy.

    Attributes:
        margin: The 95 % interval of its AUROC less the champion's must not reach below minus this; of live samples, it
            must not call more of this fraction anomalous than the champion does.
        significance: So many false alarms must be at least this likely under its guarantee.
        latency_s: Median seconds a sample on the machine that decides.
    """

    margin: float = 0.01
    significance: float = 0.05
    latency_s: float = 1.0


@dataclass(frozen=True)
class PromotionReport:
    """What was measured of a challenger.

    Attributes:
        good: Good samples.
        defective: Defective ones.
        synthetic: Whether the defects are synthetic, since no sample was defective.
        auroc: The challenger's.
        difference: Its AUROC less the champion's; None if there is no champion.
        alarms: Good samples that it calls anomalous.
        chance: Probability of that many false alarms or more, if its guarantee holds.
        alpha: The rate that it guarantees.
        latency_s: Seconds a sample.
        shadowing: What it said of live samples; None if it has shadowed none.
    """

    good: int
    defective: int
    synthetic: bool
    auroc: float
    difference: Estimate | None
    alarms: int
    chance: float
    alpha: float
    latency_s: float
    shadowing: Shadowing | None = None

    def objections(self, rules: Rules) -> list[str]:
        """Why it may not become champion; none if it may."""
        found = []
        for count, what in ((self.good, "good"), (self.defective, "defective")):
            if count < ENOUGH:
                found.append(f"{count} {what} samples are too few; give at least {ENOUGH}")
        if self.difference is not None and not self.difference.low >= -rules.margin:
            estimate = self.difference
            found.append(
                f"its AUROC may be {-estimate.low:.2%} below the champion's (measured {estimate.value:+.2%}, 95 % "
                f"interval {estimate.low:+.2%} to {estimate.high:+.2%}); {rules.margin:.2%} are allowed: fit a better "
                "one, or give more images"
            )
        if self.chance < rules.significance:
            found.append(
                f"it called {self.alarms} of {self.good} good samples anomalous, which alpha {self.alpha:.1%} "
                f"makes {self.chance:.2%} likely: calibrate it on images like these"
            )
        live = self.shadowing
        if live and live.chance < rules.significance and live.excess > rules.margin:
            found.append(
                f"{live}: it alarms more often. Look at the images that it alone calls anomalous, such as "
                f"{', '.join(live.alarms[:3])}; if these are defects, promote it with --force"
            )
        if not self.latency_s <= rules.latency_s:
            found.append(f"it takes {self.latency_s:.2f} s a sample here; {rules.latency_s:.2f} s are allowed")
        return found

    def __str__(self) -> str:
        """What was measured, in words."""
        against, defects = "", "synthetic defects" if self.synthetic else "defective samples"
        if self.difference is not None:
            estimate = self.difference
            against = f", {estimate.value:+.2%} against the champion's ({estimate.low:+.2%} to {estimate.high:+.2%})"
        live = f"; {self.shadowing}" if self.shadowing else ""
        return (
            f"AUROC {self.auroc:.2%}{against} on {self.good} good and {self.defective} {defects}; "
            f"{self.alarms} false alarms at alpha {self.alpha:.1%} (so many or more: {self.chance:.0%}); "
            f"{1000 * self.latency_s:.0f} ms a sample{live}"
        )

    def metrics(self) -> dict[str, float]:
        """The same as numbers."""
        metrics = {"good": self.good, "defective": self.defective, "synthetic": self.synthetic, "auroc": self.auroc}
        metrics |= {"false_alarms": self.alarms, "chance_of_false_alarms": self.chance, "latency_s": self.latency_s}
        if self.difference is not None:
            metrics["auroc_difference"] = self.difference.value
            metrics |= {"auroc_difference_low": self.difference.low, "auroc_difference_high": self.difference.high}
        if self.shadowing is not None:
            metrics |= self.shadowing.metrics()
        return {name: float(value) for name, value in metrics.items()}


@dataclass(frozen=True)
class Decision:
    """What was decided about a challenger.

    Attributes:
        model: The registered model.
        version: The challenger.
        champion: The version that was champion; None if there was none.
        report: What was measured; None if the promotion was forced.
        objections: Why it was not promoted; none if it was.
    """

    model: str
    version: int
    champion: int | None
    report: PromotionReport | None
    objections: list[str]

    def __str__(self) -> str:
        """The decision in words."""
        lines = [f"{self.model}: version {self.version} against champion {self.champion or 'none'}"]
        if self.report is not None:
            lines.append(str(self.report))
        if self.report is not None and self.report.synthetic:
            lines.append("no image is defective: the defects are synthetic, and tell less than real ones would")
        if not self.objections:
            lines.append(f"{self.model}: version {self.version} is champion")
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """The decision as JSON takes it."""
        report = None if self.report is None else self.report.metrics()
        return {
            "model": self.model,
            "version": self.version,
            "previous_champion": self.champion,
            "promoted": not self.objections,
            "objections": self.objections,
            "metrics": report,
        }


def decide(name: str, version: str, images: Path, rules: Rules, store: UPath) -> Decision:
    """Makes a version champion if it passes the test on labelled images; records the decision.

    `images` holds ``good`` and a folder for each defect; see `sprue.data.labelled.read_labelled`. What the version has
    said of live samples is in `store`, if the service lets challengers shadow champions.

    Raises:
        SprueError: If the version is champion already, or an image was used by one of the two versions.
    """
    challenger, number = _challenger(name, version)
    model = challenger.model_name
    champion = find_registered(model, str(number)) if number is not None else None
    detector = load_detector(challenger)
    samples = read_labelled(images, detector.views)
    for registered in (challenger, champion):
        if registered is not None:
            _require_unseen(samples, registered)
    report = measure(detector, load_detector(champion) if champion else None, samples)
    if champion:
        shadowing = read_shadowing(store, model, challenger.version, champion.version)
        report = replace(report, shadowing=shadowing)
    objections = report.objections(rules)
    if objections:
        with alias_lock(model):
            history = reconcile(model)
            current, reason = history.champion, "; ".join(objections)
            history.append("refused", current, current, reason, challenger.version, report.metrics())
    else:
        promote(model, challenger.version, number, "promoted", str(report), report.metrics())
    return Decision(model, challenger.version, number, report, objections)


def force(name: str, version: str, reason: str) -> Decision:
    """Makes a version champion without a test; records why.

    Raises:
        SprueError: If there is no reason, or the version is champion already.
    """
    if not reason.strip():
        raise SprueError("a forced promotion needs a reason")
    challenger, number = _challenger(name, version)
    promote(challenger.model_name, challenger.version, number, "forced", reason)
    return Decision(challenger.model_name, challenger.version, number, None, [])


def _challenger(name: str, version: str) -> tuple[RegisteredDetector, int | None]:
    """The version, and the present champion's number."""
    challenger = find_registered(name, version)
    number = version_for_alias(challenger.model_name, CHAMPION)
    if number == challenger.version:
        raise SprueError(f"{challenger} is champion already")
    return challenger, number


def _require_unseen(samples: list[LabelledSample], registered: RegisteredDetector) -> None:
    """Refuses images that a version was fitted, calibrated or evaluated with."""
    images = Lineage.read(registered).images
    split_of = dict(zip(images["sha256"], images["split"], strict=True))
    for sample in samples:
        for path in sample.paths:
            split = split_of.get(hashlib.sha256(path.read_bytes()).hexdigest())
            if split:
                raise SprueError(
                    f"{path} is a {split} image of {registered}; decide on images that neither version has seen"
                )


def measure(challenger: Detector, champion: Detector | None, samples: list[LabelledSample]) -> PromotionReport:
    """Scores samples with both detectors; if none is defective, synthetic defects on them take their place."""
    synthetic = not any(sample.label for sample in samples)
    if synthetic:
        samples = with_synthetic_defects(samples)
    label_N = np.array([sample.label for sample in samples])
    engine = registered_engine(challenger)
    score_N, is_anomalous_N = _predict(challenger, engine, samples)
    difference = None
    if champion is not None:
        same = champion.spec.fingerprint == challenger.spec.fingerprint
        champion_N, _ = _predict(champion, engine if same else registered_engine(champion), samples)
        group_N = np.array([sample.group for sample in samples]) if synthetic else None
        difference = auroc_difference(score_N, champion_N, label_N, group_N)
    good, alarms = int((label_N == 0).sum()), int(is_anomalous_N[label_N == 0].sum())
    calibration = challenger.calibration
    return PromotionReport(
        good=good,
        defective=int(label_N.sum()),
        synthetic=synthetic,
        auroc=score_estimates(score_N, label_N)["auroc"].value,
        difference=difference,
        alarms=alarms,
        chance=chance_of(alarms, calibration, good),
        alpha=calibration.alpha,
        latency_s=_latency(challenger, engine, samples[:TIMED]),
    )


def _predict(
    detector: Detector, engine: Engine, samples: Sequence[LabelledSample]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Scores and decisions [N]; of large images, a few samples fit into memory at once."""
    found = [
        detector.predict([sample.read() for sample in samples[start : start + AT_ONCE]], engine)
        for start in range(0, len(samples), AT_ONCE)
    ]
    return np.concatenate([each.score_B for each in found]), np.concatenate([each.is_anomalous_B for each in found])


def _latency(detector: Detector, engine: Engine, samples: Sequence[LabelledSample]) -> float:
    """Median seconds of a sample alone; the first is scored twice, to warm up."""
    seconds = []
    for sample in (samples[0], *samples):
        images = sample.read()
        started = time.perf_counter()
        detector.predict([images], engine)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])
