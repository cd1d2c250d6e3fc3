"""What a challenger has said of live samples, held against the champion's answers; `sprue serve --shadow` keeps it."""

from collections import Counter
from dataclasses import dataclass

from scipy.stats import binomtest
from upath import UPath

from sprue.release.decision_store import FOLDER as DECISIONS
from sprue.release.decision_store import DecisionStore

FOLDER = "sprue-shadow"
"""Of the store; a dataset can't have this name."""

SHOWN = 20
"""Images that are named."""


@dataclass(frozen=True)
class Shadowing:
    """Samples that both a champion and a challenger have decided about.

    Attributes:
        samples: How many.
        both: How many both called anomalous.
        challenger_alone: How many the challenger alone did.
        champion_alone: How many the champion alone did.
        alarms: Images that the challenger alone called anomalous: where they are kept, the newest first, at most
            `SHOWN`.
    """

    samples: int
    both: int
    challenger_alone: int
    champion_alone: int
    alarms: tuple[str, ...] = ()

    @property
    def excess(self) -> float:
        """By how much of the samples more the challenger alarms."""
        return (self.challenger_alone - self.champion_alone) / self.samples

    @property
    def chance(self) -> float:
        """Probability of so many alarms of the challenger among the disagreements, or more, if it alarms no more often.

        Source: McNemar, "Note on the sampling error of the difference between correlated proportions" (1947), in its
        exact form.
        """
        differing = self.challenger_alone + self.champion_alone
        if not differing:
            return 1.0
        return float(binomtest(self.challenger_alone, differing, alternative="greater").pvalue)

    def __str__(self) -> str:
        """The counts in words."""
        return (
            f"of {self.samples} live samples that it has shadowed, both call {self.both} anomalous, it alone "
            f"{self.challenger_alone}, the champion alone {self.champion_alone}"
        )

    def metrics(self) -> dict[str, float]:
        """The same as numbers."""
        names = ("samples", "both", "challenger_alone", "champion_alone")
        return {f"shadow_{name}": float(getattr(self, name)) for name in names}


def read_shadowing(store: UPath, model_name: str, challenger: int, champion: int) -> Shadowing | None:
    """What the versions of a model have decided about the same samples; None if there are none.

    Raises:
        SprueError: If a part of the decisions is damaged.
    """
    shadows, decisions = DecisionStore(store / FOLDER), DecisionStore(store / DECISIONS)
    counts: Counter[tuple[bool, bool]] = Counter()
    alarms: list[str] = []
    for day in reversed(shadows.days()):
        key = ["request_id", "at", "is_anomalous"]
        answers = {(row["request_id"], row["at"]): row["is_anomalous"]
                   for row in decisions.of_version(day, model_name, champion, key)}  # fmt: skip
        rows = shadows.of_version(day, model_name, challenger, [*key, "images"])
        for row in sorted(rows, key=lambda each: each["at"], reverse=True):
            answer = answers.get((row["request_id"], row["at"]))
            if answer is None:
                continue
            counts[row["is_anomalous"], answer] += 1
            if row["is_anomalous"] and not answer and len(alarms) < SHOWN:
                alarms.append(str(shadows.image_path(row["at"], row["images"][0])))
    if not counts:
        return None
    return Shadowing(counts.total(), counts[True, True], counts[True, False], counts[False, True], tuple(alarms))
