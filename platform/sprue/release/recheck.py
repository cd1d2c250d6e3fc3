"""Checks a champion again, as each night: its files, what it decides about kept images, and its alarms."""

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import date
from typing import Any

from mlflow.exceptions import MlflowException

from sprue.errors import SprueError
from sprue.release.decision_store import DecisionStore, ImageGone
from sprue.release.false_alarms import chance_of
from sprue.release.replay import repeat
from sprue.store import StoreError
from sprue.tracking.registry import RegisteredDetector, load_detector, require_registered_files

UNLIKELY = 0.001
"""Chance of as many alarms among good samples, below which they are a finding."""


@dataclass(frozen=True)
class Recheck:
    """What was found about a champion.

    Attributes:
        model_name: The registered model's name.
        version: The champion's version.
        samples: How many it has decided about in the days that were asked for.
        alarms: How many of them it called anomalous.
        chance: The probability of at least as many alarms, if all samples are good; None without samples.
        replayed: Kept samples that were scored again.
        findings: What is wrong, in words; empty if all is well.
    """

    model_name: str
    version: int
    samples: int = 0
    alarms: int = 0
    chance: float | None = None
    replayed: int = 0
    findings: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """The result as JSON takes it."""
        return asdict(self)

    def __str__(self) -> str:
        """A line for each finding, below what was checked."""
        alarms = f"{self.alarms} alarms among {self.samples} samples" if self.samples else "no samples"
        head = f"{self.model_name} version {self.version}: {alarms}, {self.replayed} scored again"
        return "\n  ".join([f"{head}, {'look at it' if self.findings else 'well'}", *self.findings])


def recheck(champions: list[RegisteredDetector], store: DecisionStore, first: date, replays: int) -> Iterator[Recheck]:
    """Checks champions one after the other; one that fails does not stop the others.

    Args:
        champions: The versions that are served.
        store: Where their decisions are kept.
        first: The first day whose decisions count.
        replays: How many of the newest kept samples of each are scored again.
    """
    counts = store.count_alarms(first)
    for champion in champions:
        samples, alarms = counts.get((champion.model_name, champion.version), (0, 0))
        found = Recheck(champion.model_name, champion.version, samples, alarms)
        try:
            require_registered_files(champion)
            yield _check_decisions(found, champion, store, first, replays)
        except (SprueError, StoreError, MlflowException) as error:
            yield replace(found, findings=(str(error),))


def _check_decisions(
    found: Recheck, champion: RegisteredDetector, store: DecisionStore, first: date, replays: int
) -> Recheck:
    """What a champion whose files are intact has decided."""
    calibration, chance = load_detector(champion).calibration, None
    findings = []
    if found.samples:
        chance = chance_of(found.alarms, calibration, found.samples)
        if chance < UNLIKELY:
            findings.append(
                f"{found.alarms / found.samples:.1%} of the samples are alarms; among good ones alone, the chance of "
                f"as many is {chance:.1g} at alpha {calibration.alpha:g}. Review them; if they are good, the parts, "
                "the camera or the light have changed: calibrate anew"
            )
    replayed = 0
    kept = store.newest(champion.model_name, replays, ("alarm", "near", "sample"), first) if replays else ()
    for decision in kept:
        if replayed == replays:
            break
        if decision.version != champion.version:
            continue
        with contextlib.suppress(ImageGone):
            repeated, replayed = repeat(store, decision), replayed + 1
            if not repeated.equal:
                findings.append(
                    f"{decision.request_id} of {decision.at:%Y-%m-%d %H:%M} has the score {repeated.score!r} now, "
                    f"and had {decision.score!r}"
                )
    return replace(found, chance=chance, replayed=replayed, findings=tuple(findings))
