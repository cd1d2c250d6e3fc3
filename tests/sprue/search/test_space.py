"""What is varied, around a recipe or as a parameter file says."""

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from pydantic import ValidationError

from sprue.config import SearchSettings
from sprue.errors import SprueError
from sprue.search.space import current_point, search_space


def test_without_a_space_depth_width_noise_and_learning_rate_vary_around_the_recipe(case):
    space = search_space(case.spec, SearchSettings(trials=1))
    assert space == {
        "flow.steps": CategoricalDistribution([1, 2]),
        "flow.bottleneck": CategoricalDistribution([4, 8, 16]),
        "flow.noise": FloatDistribution(0.0, 0.5),
        "fit.learning_rate": FloatDistribution(0.0025, 0.04, log=True),
    }


def test_a_space_is_read_from_the_parameters(case):
    space = search_space(
        case.spec,
        SearchSettings(trials=1, space={"flow.steps": {"low": 1, "high": 4}, "flow.noise": {"low": 0.0, "high": 1}}),
    )
    assert space == {"flow.steps": IntDistribution(1, 4), "flow.noise": FloatDistribution(0.0, 1.0)}


@pytest.mark.parametrize(
    ("space", "match"),
    [
        ({"flow.depth": [1]}, r"class brick has no setting 'flow\.depth'; allowed: flow\.channels, .*fit\.epochs"),
        ({"flow.steps": [2, 4]}, r"search\.space\.flow\.steps: the recipe's own value 1 is not in it"),
        ({"flow.noise": {"low": 0.2, "high": 0.5}}, "own value 0.1 is not in it"),
        ({"flow.noise": {"low": 0.5, "high": 0.0}}, r"search\.space\.flow\.noise: "),
        ({"fit.learning_rate": {"low": 0.0, "high": 1.0, "log": True}}, r"search\.space\.fit\.learning_rate: "),
    ],
)
def test_a_space_that_can_not_be_searched_is_refused_by_name(case, space, match):
    with pytest.raises(SprueError, match=match):
        search_space(case.spec, SearchSettings(trials=1, space=space))


@pytest.mark.parametrize("domain", [3, [], {"low": 0.0, "high": 0.5, "step": 2}])
def test_what_is_neither_a_list_nor_a_range_is_no_space(domain):
    with pytest.raises(
        ValidationError, match=r"space\.flow\.steps: give a list of values or a mapping with low and high"
    ):
        SearchSettings(trials=1, space={"flow.steps": domain})


def test_the_current_point_is_the_plan_s(case):
    point = {"flow.steps": 3, "fit.learning_rate": 0.5}
    assert current_point(case.spec, point) == {"flow.steps": 1, "fit.learning_rate": 0.01}
    assert current_point(case.spec.with_values(point), point) == point
