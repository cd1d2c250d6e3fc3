"""What a fit depends on: its key, and what it refuses."""

import pytest
import torch
from upath import UPath

from defectflow import FLOWS
from sprue.config import FitSettings, ScoringSettings
from sprue.errors import SprueError
from sprue.training import spec as module


@pytest.fixture
def spec(make_spec, tmp_path):
    return make_spec(tmp_path)


def test_the_key_changes_with_everything_that_the_weights_depend_on(spec, monkeypatch):
    changes = [
        {"dataset": "other"},
        {"class_name": "grass"},
        {"features": spec.features.model_copy(update={"blocks": (1, 2)})},
        {"flow_name": "csflow"},
        {"flow_config": {**spec.flow_config, "adapted": 5}},
        {"fit": FitSettings(seed=1)},
        {"train": spec.train[:-1]},
        {"train": spec.train[::-1]},
        {"validation": spec.validation[:-1]},
    ]
    keys = {spec.key, *(spec.model_copy(update=change).key for change in changes)}
    with monkeypatch.context() as patch:
        patch.setattr(FLOWS["patchflow"], "version", -1)
        keys.add(spec.key)
    with monkeypatch.context() as patch:
        patch.setattr(module, "VERSION", -1)
        keys.add(spec.key)
    assert len(keys) == len(changes) + 3
    assert all(len(key) == 12 and int(key, 16) for key in keys)
    assert (spec.name, spec.checkpoints) == ("brick", f"brick-{spec.key}")


def test_the_key_stays_where_the_weights_do(spec):
    same = [
        {"scoring": ScoringSettings(top=0.5)},
        {"manifest": "1" * 64},
        {"origin": "the best of 12 trials"},
        {"fold": 2},
        {"fit": spec.fit.model_copy(update={"gpus": 0.25})},
        # The same weights from another place.
        {"features": spec.features.model_copy(update={"weights": "file:elsewhere.pth"})},
    ]
    assert {spec.model_copy(update=change).key for change in same} == {spec.key}


def test_a_plan_says_what_is_fitted(spec, plan_of, tmp_path):
    assert (spec.dataset, spec.class_name, spec.flow_name, spec.origin) == (
        "plant",
        "brick",
        "patchflow",
        "the recipe's own",
    )
    assert (spec.views, spec.images, len(spec.train), len(spec.validation)) == (1, 10, 10, 4)
    assert (spec.params["train_images"], spec.params["flow.adapted"], spec.params["fit.epochs"]) == (10, 6, 3)
    views = plan_of(
        tmp_path, views=2, flow={"name": "multiflow", "hidden": 4, "steps": 2, "views": 2, "adaptation": "whiten"}
    )
    assert (views.views, views.images, len(views.train), len(views.validation)) == (2, 10, 5, 2)


def test_the_same_plan_builds_the_same_flow(spec):
    first, second = (spec.build_flow().state_dict() for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_values_change_a_plan_and_are_checked(spec):
    changed = spec.with_values({"flow.steps": 3, "fit.learning_rate": 0.5}, epochs=7, origin="a search")
    assert changed.flow_config == {**spec.flow_config, "steps": 3}
    assert changed.fit == FitSettings(epochs=7, batch_size=5, learning_rate=0.5)
    assert (changed.origin, changed.train) == ("a search", spec.train)
    assert changed.key != spec.key
    assert spec.with_values({}) == spec
    for values, match in (
        ({"flow.adapted": 1}, "class brick: adapted: 1 is below 2"),
        ({"flow.depth": 1}, "class brick: .*depth"),
        ({"fit.learning_rate": -1.0}, "class brick: .*learning_rate"),
        ({"fit.epoch": 1}, "class brick: .*epoch"),
    ):
        with pytest.raises(SprueError, match=match) as error:
            spec.with_values(values)
        assert "\n" not in str(error.value)


def test_missing_features_are_named(plan_of, tmp_path):
    with pytest.raises(SprueError, match=r"class grass has no features in .*grass; run the features stage first"):
        plan_of(tmp_path, "grass")


def test_a_flow_that_does_not_suit_the_features_is_refused_by_name(spec, plan_of, tmp_path):
    # The features decide this: they have two maps.
    with pytest.raises(SprueError, match=r"class brick: flow: maps: \[2\] are not indices of the 2 feature maps"):
        plan_of(tmp_path, flow={"name": "patchflow", "maps": [2]}, blocks=(0, 1, 2))
    multiflow = {"name": "multiflow", "hidden": 4, "steps": 2, "adaptation": "whiten"}
    with pytest.raises(
        SprueError, match="class brick: its samples have 2 images each, and multiflow reads 3; set flow"
    ):
        plan_of(tmp_path, views=2, flow={**multiflow, "views": 3})
    with pytest.raises(SprueError, match="class brick: its samples have 2 images each, and patchflow reads 1; choose"):
        plan_of(tmp_path, views=2)


FUSION = {"name": "fusion", "maps": [1], "hidden": 4, "steps": 2, "adaptation": "whiten", "gaussians": [[0], [0, 1]]}


def test_a_search_may_change_a_flow_whose_settings_have_no_defaults(plan_of, spec, tmp_path):
    fusion = plan_of(tmp_path, flow=FUSION)
    changed = fusion.with_values({"flow.steps": 3, "flow.noise": 0.2})
    assert changed.flow_config == {**fusion.flow_config, "steps": 3, "noise": 0.2}
    assert fusion.with_values({}) == fusion


def test_a_fusion_depends_on_its_synthetic_defects_and_other_flows_do_not(plan_of, spec, tmp_path, monkeypatch):
    fusion = plan_of(tmp_path, flow=FUSION)
    keys = [fusion.key, spec.key]
    monkeypatch.setattr(module, "SYNTHETIC_VERSION", "other")
    assert fusion.key != keys[0] and spec.key == keys[1]
    with pytest.raises(SprueError, match=r"class brick lacks synthetic defects in .*; run the search stage first"):
        fusion.synthetic_maps(UPath(tmp_path) / "features")


def test_all_maps_that_a_fusion_reads_are_loaded(plan_of, spec, tmp_path):
    fusion = plan_of(tmp_path, flow=FUSION)
    dataloader = fusion.dataloader(fusion.table(UPath(tmp_path) / "features"), fusion.train)
    assert [len(map_BCHW) for map_BCHW in next(dataloader.ordered(4))] == [4, 4]
