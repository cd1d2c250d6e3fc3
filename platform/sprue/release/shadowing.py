"""What a challenger has said of live samples, held against the champion's answers; `sprue serve --shadow` keeps it."""

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
from scipy.stats import binomtest
from upath import UPath

from sprue.release.decision_store import FOLDER as DECISIONS
from sprue.release.decision_store import DecisionStore

FOLDER = "sprue-shadow"
"""Of the store; a dataset can't have this name."""


@dataclass(frozen=True)
class Shadowing:
    """Samples that both a champion and a challenger have decided about.

    Attributes:
        samples: How many.
        both: How many both called anomalous.
        challenger_alone: How many the challenger alone did.
        champion_alone: How many the champion alone did.
    """

    samples: int
    both: int
    challenger_alone: int
    champion_alone: int

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
        return {f"shadow_{name}": float(value) for name, value in vars(self).items()}


def read_shadowing(store: UPath, model_name: str, challenger: int, champion: int) -> Shadowing | None:
    """What the versions of a model have decided about the same samples; None if there are none.

    Raises:
        SprueError: If a part of the decisions is damaged.
    """
    key = ["request_id", "at"]
    challengers = DecisionStore(store / FOLDER).of_version(model_name, challenger).select([*key, "is_anomalous"])
    if not challengers.num_rows:
        return None
    champions = DecisionStore(store / DECISIONS).of_version(model_name, champion).select([*key, "is_anomalous"])
    rows = challengers.join(champions, key, join_type="inner", right_suffix="_champion")
    mine, theirs = rows["is_anomalous"], rows["is_anomalous_champion"]

    def count(mask: pa.ChunkedArray) -> int:
        return int(pc.sum(mask).as_py() or 0)

    both = count(pc.and_(mine, theirs))
    return Shadowing(rows.num_rows, both, count(mine) - both, count(theirs) - both) if rows.num_rows else None
