"""Scores a kept sample again with the version that decided, and compares the results."""

from dataclasses import dataclass
from typing import Any

from sprue.errors import SprueError
from sprue.inference.images import open_image
from sprue.release.decision_store import Decision, DecisionStore
from sprue.tracking.backbones import registered_engine
from sprue.tracking.digests import file_digests
from sprue.tracking.registry import find_registered, load_detector

ROUNDING = 1e-4
"""Relative difference of two scores that rounding explains: sums of 32-bit floats come in another order where a sample
is scored in a batch of another size, or on another processor."""


@dataclass(frozen=True)
class Replay:
    """A decision and its repetition.

    Attributes:
        decision: What was recorded.
        score: The score now.
        p_value: The p-value now.
        is_anomalous: The decision now.
        engine: What ran the backbone now.
        same_id: Number of decisions of that day with the same identifier; the last one is repeated.
    """

    decision: Decision
    score: float
    p_value: float
    is_anomalous: bool
    engine: str
    same_id: int

    @property
    def identical(self) -> bool:
        """Whether score, p-value and decision are equal bit for bit."""
        recorded = self.decision
        now = (self.score, self.p_value, self.is_anomalous)
        return now == (recorded.score, recorded.p_value, recorded.is_anomalous)

    @property
    def difference(self) -> float:
        """The scores' difference, relative to the recorded one."""
        return abs(self.score - self.decision.score) / max(abs(self.decision.score), 1e-12)

    @property
    def equal(self) -> bool:
        """Whether the decision is the same, and the score up to `ROUNDING`."""
        return self.is_anomalous == self.decision.is_anomalous and self.difference <= ROUNDING

    def as_json(self) -> dict[str, Any]:
        """The comparison as JSON takes it."""
        return {
            "decision": self.decision.as_json(),
            "replay": {
                "score": self.score,
                "p_value": self.p_value,
                "is_anomalous": self.is_anomalous,
                "engine": self.engine,
            },
            "equal": self.equal,
            "identical": self.identical,
            "difference": self.difference,
            "same_id": self.same_id,
        }

    def __str__(self) -> str:
        """The comparison for people."""
        recorded = self.decision
        verdict = "different"
        if self.equal:
            verdict = "equal, bit for bit" if self.identical else f"equal up to rounding ({self.difference:.1e})"
        words = {True: "anomalous", False: "normal"}
        lines = [
            f"{recorded.request_id}  {recorded.at:%Y-%m-%d %H:%M:%S} UTC  {recorded.model_name} version "
            f"{recorded.version}  station {recorded.station or '-'}  kept as {recorded.kept}",
            f"recorded  score {recorded.score!r}  p {recorded.p_value:.4g}  {words[recorded.is_anomalous]}  "
            f"(threshold {recorded.threshold!r}, batch of {recorded.batch}, {recorded.engine})",
            f"now       score {self.score!r}  p {self.p_value:.4g}  {words[self.is_anomalous]}  ({self.engine})",
            verdict,
        ]
        if self.same_id > 1:
            lines.append(f"{self.same_id} decisions of that day have this identifier; this is the last")
        return "\n".join(lines)


def replay(store: DecisionStore, request_id: str) -> Replay:
    """Repeats a decision in this process.

    Raises:
        SprueError: If there is no such decision, its images were not kept or are gone, or its version is gone or has
            other files than those that decided.
    """
    found = store.find(request_id)
    return repeat(store, found[-1], len(found))


def repeat(store: DecisionStore, recorded: Decision, same_id: int = 1) -> Replay:
    """Repeats a decision of which `same_id` have its identifier; see `replay`."""
    kept = zip(recorded.images, store.read_images(recorded), strict=True)
    images = [open_image(data, f"image {digest[:16]}") for digest, data in kept]
    registered = find_registered(recorded.model_name, str(recorded.version))
    if file_digests(registered.tags) != recorded.files:
        raise SprueError(f"{registered} has other files now than those that decided {recorded.request_id}")
    detector = load_detector(registered)
    engine = registered_engine(detector)
    predictions = detector.predict([images], engine)
    return Replay(
        recorded,
        float(predictions.score_B[0]),
        float(predictions.p_value_B[0]),
        bool(predictions.is_anomalous_B[0]),
        engine.name,
        same_id,
    )
