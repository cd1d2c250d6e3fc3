"""What a search varies, and how a point of that space becomes a request."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from defectflow import FLOWS
from sprue.errors import SprueError
from sprue.training.loop import FitSettings
from sprue.training.worker import FitRequest

Point = Mapping[str, Any]
"""Values by the parameters' names, such as ``flow.steps`` and ``fit.learning_rate``."""


@dataclass(frozen=True)
class SearchConfig:
    """How a class's flow is searched.

    Attributes:
        trials: How many points are tried, the recipe's own first; 0 for no search.
        epochs: Of a whole trial; the fit's if None.
        minutes: After which no epoch of a class's search is begun; no limit if None.
        seed: Of the points that are tried.
        space: What each parameter may be: a list of values, or a mapping with ``low``, ``high`` and perhaps ``log``. If
            empty, depth, width, noise and learning rate vary around the recipe's; see `default_space`.
    """

    trials: int = 0
    epochs: int | None = None
    minutes: float | None = None
    seed: int = 0
    space: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            SprueError: If a setting is out of range.
        """
        if self.trials < 0 or (self.epochs is not None and self.epochs < 1):
            raise SprueError(f"search: trials is not below 0, epochs at least 1; got {self.trials} and {self.epochs}")
        if self.minutes is not None and self.minutes <= 0:
            raise SprueError(f"search.minutes: {self.minutes} is not above 0")


def default_space(point: Point) -> dict[str, Any]:
    """Half to twice a recipe's depth and width, a quarter to four times its learning rate, noise from none to 0.5.

    A width of 0, which leaves it to the flow, is not varied.

    >>> default_space({"flow.steps": 4, "flow.noise": 0.3, "flow.hidden": 0})
    {'flow.steps': [2, 4, 8], 'flow.noise': {'low': 0.0, 'high': 0.6}}
    """
    space: dict[str, Any] = {}
    for name, value in point.items():
        match name:
            case "fit.learning_rate":
                space[name] = {"low": value / 4, "high": value * 4, "log": True}
            case "flow.noise":
                space[name] = {"low": 0.0, "high": max(0.5, 2 * value)}
            case _ if value:
                space[name] = sorted({max(1, value // 2), value, 2 * value})
    return space


def current_point(request: FitRequest, names: Iterable[str]) -> dict[str, Any]:
    """The values that a request gives to some parameters.

    Raises:
        SprueError: If there is no such parameter.
    """
    known = request.params()
    for name in names:
        if name not in known:
            raise SprueError(
                f"search.space: class {request.class_name} has no parameter {name!r}; there are: "
                f"{', '.join(each for each in known if each.startswith(('flow.', 'fit.')))}"
            )
    return {name: known[name] for name in names}


def search_space(request: FitRequest, config: SearchConfig) -> dict[str, BaseDistribution]:
    """What is varied for a class.

    Raises:
        SprueError: If a parameter is unknown, its range can't be read, or the recipe's own value is not in it.
    """
    searchable = [f"flow.{name}" for name in FLOWS[request.flow_name].searchable]
    point = current_point(request, config.space or [*searchable, "fit.learning_rate"])
    space = {name: _distribution(name, domain) for name, domain in (config.space or default_space(point)).items()}
    for name, value in point.items():
        if not _contains(space[name], value):
            raise SprueError(
                f"search.space.{name}: the recipe's own value {value} is not in it; add it, to compare with"
            )
    return space


def _contains(distribution: BaseDistribution, value: Any) -> bool:
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    return bool(distribution.low <= value <= distribution.high)


def _distribution(name: str, domain: Any) -> BaseDistribution:
    if isinstance(domain, list) and domain:
        return CategoricalDistribution(domain)
    if isinstance(domain, Mapping) and {"low", "high"} <= set(domain) <= {"low", "high", "log"}:
        whole = all(isinstance(domain[bound], int) for bound in ("low", "high"))
        try:
            return (IntDistribution if whole else FloatDistribution)(**domain)
        except (TypeError, ValueError) as error:
            raise SprueError(f"search.space.{name}: {error}") from error
    raise SprueError(f"search.space.{name}: {domain!r} is neither a list of values nor a mapping with low and high")


def at_point(request: FitRequest, point: Point, epochs: int | None = None) -> FitRequest:
    """The request with some parameters changed.

    Args:
        request: The recipe's.
        point: The values.
        epochs: Of the fit; as in the request if None.

    Raises:
        SprueError: If a value is out of its parameter's range.
    """
    flow = {name.removeprefix("flow."): value for name, value in point.items() if name.startswith("flow.")}
    fit = {name.removeprefix("fit."): value for name, value in point.items() if name.startswith("fit.")}
    settings = {**asdict(request.settings), **fit} | ({"epochs": epochs} if epochs else {})
    return replace(request, flow_config={**request.flow_config, **flow}, settings=FitSettings(**settings))
