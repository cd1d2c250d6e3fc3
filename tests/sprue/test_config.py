"""Settings: what is accepted, what is refused by name, and the schemas that editors read."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
from pydantic import ValidationError

from defectflow import FLOWS
from sprue.config import (
    FLOW_SETTINGS,
    CalibrationSettings,
    FeatureSettings,
    FitSettings,
    FlowName,
    ManifestSettings,
    Params,
    Recipe,
    ScoringSettings,
    SearchSettings,
    json_schema,
)

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "docs/reference"
RECIPES = sorted((ROOT / "models/recipes").glob("*.yaml"))
FEATURES = {"backbone": "b", "weights": "hub:in1k", "blocks": [2, 3], "scales": [1.0, 0.5], "input_size": 64}
FLOW = {"name": "patchflow"}


def errors_of(kind, **settings):
    """The paths and the messages of a section's mistakes, given as JSON, as a parameter file is."""
    with pytest.raises(ValidationError) as error:
        kind.model_validate_json(json.dumps(settings))
    return {".".join(map(str, each["loc"])): each["msg"] for each in error.value.errors()}


@pytest.mark.parametrize(
    ("kind", "setting", "allowed"),
    [
        (FitSettings, {"epochs": 0}, "greater than or equal to 1"),
        (FitSettings, {"epochs": 2.5}, "valid integer"),
        (FitSettings, {"epochs": "many"}, "valid integer"),
        (FitSettings, {"epochs": True}, "valid integer"),
        (FitSettings, {"epochs": None}, "valid integer"),
        (FitSettings, {"batch_size": 0}, "greater than or equal to 1"),
        (FitSettings, {"batch_size": 16.0}, "valid integer"),
        (FitSettings, {"recompute": "no"}, "valid boolean"),
        (FitSettings, {"recompute": 1}, "valid boolean"),
        (FitSettings, {"learning_rate": 0.0}, "greater than 0"),
        (FitSettings, {"learning_rate": "1e-3"}, "valid number"),
        (FitSettings, {"learning_rate": float("nan")}, "finite number"),
        (FitSettings, {"gradient_norm": 0.0}, "greater than 0"),
        (FitSettings, {"epsilon": 0.0}, "greater than 0"),
        (FitSettings, {"weight_decay": -1.0}, "greater than or equal to 0"),
        (FitSettings, {"warmup": 1.0}, "less than 1"),
        (FitSettings, {"patience": -1}, "greater than or equal to 0"),
        (FitSettings, {"workers": 0}, "greater than or equal to 1"),
        (FitSettings, {"memory": 0.0}, "greater than 0"),
        (FitSettings, {"schedule": "linear"}, "'cosine' or 'constant'"),
        (FitSettings, {"optimizer": "sgd"}, "'adam' or 'adamw'"),
        (ScoringSettings, {"score_type": "loss"}, "'latent' or 'likelihood'"),
        (ScoringSettings, {"top": 0.0}, "greater than 0"),
        (ScoringSettings, {"top": 1.5}, "less than or equal to 1"),
        (SearchSettings, {"trials": -1}, "greater than or equal to 0"),
        (SearchSettings, {"epochs": 0}, "greater than or equal to 1"),
        (SearchSettings, {"minutes": 0}, "greater than 0"),
        (CalibrationSettings, {"alpha": "much"}, "valid number"),
        (CalibrationSettings, {"alpha": 1.0}, "less than 1"),
        (CalibrationSettings, {"guarantee": "always"}, "'marginal' or 'conditional'"),
        (CalibrationSettings, {"confidence": 1.0}, "less than 1"),
        (CalibrationSettings, {"folds": 2}, "greater than or equal to 3"),
        (ManifestSettings, {"layout": "coco"}, "'mvtec' or 'mvtec-views'"),
        (ManifestSettings, {"calibration": 0.0}, "greater than 0"),
        (ManifestSettings, {"sed": 1}, "not permitted"),
        (FeatureSettings, FEATURES | {"weights": "w.pth"}, "package|file|s3|hub"),
        (FeatureSettings, FEATURES | {"input_size": 16}, "greater than or equal to 32"),
    ],
)
def test_a_value_of_another_type_or_out_of_range_is_refused(kind, setting, allowed):
    ((path, message),) = errors_of(kind, **setting).items()
    assert path == list(setting)[-1] if kind is not FeatureSettings else path in setting
    assert allowed in message


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"blocks": [2, 2]}, "blocks: name each block once"),
        ({"scales": [0.3]}, "scales: 0.3 is not 1/k for a whole k that divides input_size 64"),
        ({"scales": [0.2], "input_size": 64}, "scales: 0.2 is not 1/k"),
    ],
)
def test_blocks_and_scales_must_suit_the_input(setting, message):
    assert message in errors_of(FeatureSettings, **FEATURES | setting)[""]


def test_folds_exclude_the_conditional_guarantee():
    message = errors_of(CalibrationSettings, folds=5, guarantee="conditional")[""]
    assert "folds: the conditional guarantee needs a held-out calibration set" in message


def test_a_number_may_be_written_without_a_point():
    assert FitSettings(learning_rate=1).learning_rate == 1.0
    assert FitSettings.model_validate_json('{"learning_rate": 1e-3}').learning_rate == 0.001


def test_a_search_space_is_of_lists_and_ranges():
    space = {
        "flow.steps": [1, 2],
        "flow.noise": {"low": 0.0, "high": 1},
        "fit.learning_rate": {"low": 1e-4, "high": 1, "log": True},
    }
    assert SearchSettings(space=space).space == space
    for domain in (3, [], {"low": 0.0}, {"low": 0.0, "high": 0.5, "step": 2}):
        assert (
            "space.flow.noise: give a list of values or a mapping"
            in errors_of(SearchSettings, space={"flow.noise": domain})[""]
        )


def test_the_splits_leave_training_images():
    assert (
        "validation: calibration and validation must sum to less than 1"
        in errors_of(ManifestSettings, calibration=0.6, validation=0.4)[""]
    )


def test_the_flows_are_those_that_there_are_with_all_their_settings():
    assert set(FLOW_SETTINGS) == set(FLOWS) == set(FlowName.__args__)
    for name, settings in FLOW_SETTINGS.items():
        config = {field.name for field in fields(FLOWS[name].config_class)}
        assert set(settings.model_fields) == {"name", *config} - {"channels"}


def recipe(**flow):
    return {"features": FEATURES, "flow": FLOW | flow}


@pytest.mark.parametrize(
    ("flow", "path", "message"),
    [
        ({"adapted": 1}, "adapted", "1 is below 2"),
        ({"adapted": "many"}, "adapted", "valid integer"),
        ({"depth": 2}, "depth", "not permitted"),
        ({"steps": 1.5}, "steps", "valid integer"),
        ({"neighbourhood": 2}, "neighbourhood", "2 is not an odd number from 1"),
        ({"noise_scheme": "loud"}, "noise_scheme", "'simplenet'"),
        ({"maps": [0, 1.5]}, "maps.1", "valid integer"),
        ({"channels": [3]}, "channels", "not permitted"),
    ],
)
def test_a_flow_s_bad_setting_is_refused_by_name(flow, path, message):
    found = errors_of(Recipe, **recipe(**flow))
    assert list(found) == [f"flow.patchflow.{path}"]
    assert message in found[f"flow.patchflow.{path}"]


def test_all_mistakes_of_a_flow_are_found_at_once():
    found = errors_of(Recipe, **recipe(adapted="many", steps=0, depth=1), fit={"epochs": 0})
    assert set(found) == {"flow.patchflow.adapted", "flow.patchflow.steps", "flow.patchflow.depth", "fit.epochs"}


def test_a_flow_must_suit_the_number_of_maps():
    assert Recipe.model_validate_json(json.dumps(recipe(maps=[0, 3])))
    assert "flow.maps: [4] are not indices of the 4 feature maps" in errors_of(Recipe, **recipe(maps=[4]))[""]


def test_a_fusion_is_scored_as_it_is_standardised():
    fusion = {"features": recipe()["features"], "flow": {"name": "fusion", "maps": [0], "gaussians": [[0]]}}
    for scoring in ({}, {"top": 0.01}):
        assert Recipe.model_validate_json(json.dumps(fusion | {"scoring": scoring}))
    found = errors_of(Recipe, **fusion, scoring={"top": 0.05})
    message = "scoring.top: a fusion standardises its members' scores at 0.01; leave it out"
    assert found == {"": f"Value error, {message}"}
    found = errors_of(Recipe, **fusion, scoring={"score_type": "likelihood"})
    assert found == {"": "Value error, scoring.score_type: a fusion standardises latent norms; set it to latent"}


def test_only_what_is_set_by_hand_overrides_the_published_settings():
    found = Recipe.model_validate_json(json.dumps(recipe(adapted=8, maps=[0])))
    assert found.flow.overrides == {"adapted": 8, "maps": (0,)}
    assert "top" not in found.scoring.model_dump(exclude_unset=True)


@pytest.mark.parametrize(("name", "kind"), [("params", Params), ("recipe", Recipe)])
def test_the_schema_in_the_repository_is_current(name, kind):
    text = json_schema(kind)
    assert (REFERENCE / f"{name}.schema.json").read_text() == text, f"write sprue.config.json_schema({kind.__name__})"
    assert json.loads(text)["additionalProperties"] is False


def test_every_file_of_settings_names_its_schema():
    files = {ROOT / "params.yaml": "docs/reference/params.schema.json"}
    files |= dict.fromkeys(RECIPES, "../../docs/reference/recipe.schema.json")
    for path, schema in files.items():
        assert path.read_text().splitlines()[0] == f"# yaml-language-server: $schema={schema}"
        assert (path.parent / schema).is_file()
