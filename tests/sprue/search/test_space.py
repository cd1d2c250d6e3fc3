"""What is varied, around a recipe or as a parameter file says."""

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from sprue.errors import SprueError
from sprue.search.space import SearchConfig, at_point, current_point, search_space
from sprue.training.loop import FitSettings
from sprue.training.record import fit_key


def test_without_a_space_depth_width_noise_and_learning_rate_vary_around_the_recipe(case):
    space = search_space(case.request, SearchConfig(trials=1))
    assert space == {
        "flow.steps": CategoricalDistribution([1, 2]),
        "flow.bottleneck": CategoricalDistribution([4, 8, 16]),
        "flow.noise": FloatDistribution(0.0, 0.5),
        "fit.learning_rate": FloatDistribution(0.0025, 0.04, log=True),
    }


def test_a_space_is_read_from_the_parameters(case):
    space = search_space(
        case.request,
        SearchConfig(trials=1, space={"flow.steps": {"low": 1, "high": 4}, "flow.noise": {"low": 0.0, "high": 1}}),
    )
    assert space == {"flow.steps": IntDistribution(1, 4), "flow.noise": FloatDistribution(0.0, 1.0)}


@pytest.mark.parametrize(
    ("space", "match"),
    [
        ({"flow.depth": [1]}, r"class brick has no parameter 'flow\.depth'; there are: flow\.channels, .*fit\.epochs"),
        ({"flow.steps": [2, 4]}, r"search\.space\.flow\.steps: the recipe's own value 1 is not in it"),
        ({"flow.noise": {"low": 0.2, "high": 0.5}}, "own value 0.1 is not in it"),
        (
            {"flow.steps": 3},
            r"search\.space\.flow\.steps: 3 is neither a list of values nor a mapping with low and high",
        ),
        ({"flow.steps": []}, "is neither a list"),
        ({"flow.noise": {"low": 0.0, "high": 0.5, "step": 2}}, "is neither a list"),
        ({"flow.noise": {"low": 0.5, "high": 0.0}}, r"search\.space\.flow\.noise: "),
        ({"fit.learning_rate": {"low": 0.0, "high": 1.0, "log": True}}, r"search\.space\.fit\.learning_rate: "),
    ],
)
def test_a_space_that_can_not_be_searched_is_refused_by_name(case, space, match):
    with pytest.raises(SprueError, match=match):
        search_space(case.request, SearchConfig(trials=1, space=space))


@pytest.mark.parametrize("settings", [{"trials": -1}, {"epochs": 0}, {"minutes": 0}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(SprueError, match=f"search.*{next(iter(settings))}"):
        SearchConfig(**settings)


def test_a_point_changes_the_fit_and_its_key(case):
    point = {"flow.steps": 3, "fit.learning_rate": 0.5}
    moved = at_point(case.request, point, epochs=7)
    assert moved.flow_config == {**case.request.flow_config, "steps": 3}
    assert moved.settings == FitSettings(epochs=7, batch_size=8, learning_rate=0.5)
    assert current_point(moved, point) == point
    assert fit_key(moved) != fit_key(case.request) == fit_key(at_point(case.request, {}))
    with pytest.raises(SprueError, match="learning_rate"):
        at_point(case.request, {"fit.learning_rate": -1.0})
