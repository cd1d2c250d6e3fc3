"""What a finished search leaves in the store: its trials, and the fit of the best one."""

from dataclasses import asdict, dataclass
from typing import Any, Self

from upath import UPath

from sprue.config import SearchSettings
from sprue.errors import SprueError
from sprue.formats import SEARCH
from sprue.search.run import SearchOutcome, TrialOutcome
from sprue.store import read_json, write_json
from sprue.training.record import FitRecord
from sprue.training.spec import FitSpec


@dataclass(frozen=True)
class SearchRecord:
    """A finished search.

    Attributes:
        class_name: The product class.
        key: See `sprue.search.run.search_key`.
        best: Number of the best trial.
        trials: All trials, the first with the recipe's own values.
    """

    class_name: str
    key: str
    best: int
    trials: list[TrialOutcome]

    @property
    def best_trial(self) -> TrialOutcome:
        """The trial whose settings are the plan's."""
        return self.trials[self.best - 1]

    @property
    def origin(self) -> str:
        """How the plan's settings were found, in words."""
        return (
            f"the best of {len(self.trials)} trials, by synthetic defects on good validation images "
            f"(AUROC {self.best_trial.objective:.1%}; the recipe's own {self.trials[0].objective:.1%})"
        )

    def plan(self, spec: FitSpec, settings: SearchSettings) -> FitSpec:
        """The recipe's plan with the best trial's values."""
        return spec.with_values(self.best_trial.point, settings.epochs, self.origin)

    @classmethod
    def of(cls, outcome: SearchOutcome) -> Self:
        """The record of an outcome."""
        return cls(outcome.class_name, outcome.key, outcome.best.number, outcome.trials)

    def write(self, folder: UPath, fit: FitRecord) -> None:
        """Writes the best trial's fit, then ``search.json``, whose presence means that the search is complete."""
        fit.write(folder / "fit")
        write_json(folder / "search.json", SEARCH.stamped(asdict(self)))

    @classmethod
    def read(cls, folder: UPath) -> Self:
        """Reads what `write` wrote.

        Raises:
            SprueError: If there is no finished search.
        """
        content = _read(folder / "search.json")
        try:
            return cls(**content | {"trials": [TrialOutcome(**trial) for trial in content["trials"]]})
        except (KeyError, TypeError) as error:
            raise SprueError(
                f"{folder} is not a finished search: {error}; delete it and run the search again"
            ) from error

    @staticmethod
    def is_current(folder: UPath, key: str) -> bool:
        """Whether a finished search with that key is there."""
        file = folder / "search.json"
        return file.is_file() and _read(file).get("key") == key


def _read(file: UPath) -> dict[str, Any]:
    return SEARCH.current(read_json(file, made_by="search"), file)
