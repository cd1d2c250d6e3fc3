"""What a search varies."""

from collections.abc import Iterable, Mapping
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from defectflow import FLOWS
from sprue.config import SearchSettings
from sprue.errors import SprueError
from sprue.training.spec import FitSpec

Point = Mapping[str, Any]
"""Values by the settings' names, such as ``flow.steps`` and ``fit.learning_rate``."""


def default_space(point: Point) -> dict[str, Any]:
    """Half to twice a recipe's depth and width, a quarter to four times its learning rate, noise from none to 0.5.

    A width of 0 leaves the width to the flow and is not varied.

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


def current_point(spec: FitSpec, names: Iterable[str]) -> dict[str, Any]:
    """The spec's values of some settings.

    Raises:
        SprueError: If there is no such setting.
    """
    known = {name: value for name, value in spec.params.items() if name.startswith(("flow.", "fit."))}
    for name in names:
        if name not in known:
            raise SprueError(
                f"search.space: class {spec.class_name} has no setting {name!r}; allowed: {', '.join(known)}"
            )
    return {name: known[name] for name in names}


def search_space(spec: FitSpec, settings: SearchSettings) -> dict[str, BaseDistribution]:
    """What is varied for a class.

    Raises:
        SprueError: If a setting is unknown, its range is not valid, or the recipe's own value is not in it.
    """
    searchable = [f"flow.{name}" for name in FLOWS[spec.flow_name].searchable]
    point = current_point(spec, settings.space or [*searchable, "fit.learning_rate"])
    domains = settings.space or default_space(point)
    for name, domain in domains.items():
        for value in domain if isinstance(domain, list) else (domain["low"], domain["high"]):
            try:
                spec.with_values({name: value})
            except SprueError as error:
                raise SprueError(f"search.space.{name}: {error}") from error
    space = {name: _distribution(name, domain, point[name]) for name, domain in domains.items()}
    for name, distribution in space.items():
        if not _contains(distribution, point[name]):
            raise SprueError(
                f"search.space.{name}: the recipe's own value {point[name]} is not in it; add it, to compare with"
            )
    return space


def _contains(distribution: BaseDistribution, value: Any) -> bool:
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    return bool(distribution.low <= value <= distribution.high)


def _distribution(name: str, domain: Any, current: Any) -> BaseDistribution:
    """A list of values or a mapping with low and high, as `sprue.config.SearchSettings` has checked."""
    if isinstance(domain, list):
        return CategoricalDistribution(domain)
    try:
        return (IntDistribution if isinstance(current, int) else FloatDistribution)(**domain)
    except (TypeError, ValueError) as error:
        raise SprueError(f"search.space.{name}: {error}") from error
