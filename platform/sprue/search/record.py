"""What a finished search leaves in the store: its trials, and the fit of the best one."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from upath import UPath

from sprue.errors import SprueError
from sprue.inference.detector import Scoring
from sprue.search.search import SearchOutcome, TrialOutcome, search_key
from sprue.search.space import SearchConfig, at_point
from sprue.store import read_json, write_json
from sprue.training.record import FitRecord
from sprue.training.worker import FitRequest


@dataclass(frozen=True)
class SearchRecord:
    """A finished search.

    Attributes:
        class_name: The product class.
        key: See `sprue.search.search.search_key`.
        best: Number of the best trial.
        trials: All trials, the first with the recipe's own values.
    """

    class_name: str
    key: str
    best: int
    trials: list[TrialOutcome]

    @property
    def point(self) -> Mapping[str, Any]:
        """The best trial's values."""
        return self.trials[self.best - 1].point

    @classmethod
    def of(cls, outcome: SearchOutcome) -> Self:
        """What is kept of a search."""
        return cls(outcome.class_name, outcome.key, outcome.best.number, outcome.trials)

    def write(self, folder: UPath, fit: FitRecord) -> None:
        """Writes the best trial's fit, then ``search.json``, which says that the search is whole."""
        fit.write(folder / "fit")
        write_json(folder / "search.json", asdict(self))

    @classmethod
    def read(cls, folder: UPath) -> Self:
        """Reads what `write` wrote.

        Raises:
            SprueError: If there is no finished search.
        """
        facts = read_json(folder / "search.json", made_by="search")
        try:
            return cls(**facts | {"trials": [TrialOutcome(**trial) for trial in facts["trials"]]})
        except (KeyError, TypeError) as error:
            raise SprueError(
                f"{folder} is not a finished search: {error}; delete it and run the search again"
            ) from error

    @staticmethod
    def is_current(folder: UPath, key: str) -> bool:
        """Whether a finished search with that key is there."""
        file = folder / "search.json"
        return file.is_file() and read_json(file, made_by="search").get("key") == key


def with_winners(
    requests: Sequence[FitRequest], searches: UPath, config: SearchConfig, scoring: Scoring
) -> list[FitRequest]:
    """The requests at the points that their classes' searches found best; as they are, if there is no search.

    Args:
        requests: The recipe's.
        searches: Folder with a `SearchRecord` for each class.
        config: How flows are searched.
        scoring: How a score is made.

    Raises:
        SprueError: If a class has not been searched with these parameters.
    """
    if not config.trials:
        return list(requests)
    found = []
    for request in requests:
        record = SearchRecord.read(searches / request.class_name)
        if record.key != search_key(request, config, scoring):
            raise SprueError(
                f"class {request.class_name}: {searches / request.class_name} was searched on other pictures or with "
                "other parameters than there are now; run the search stage again"
            )
        found.append(at_point(request, record.point, config.epochs))
    return found
