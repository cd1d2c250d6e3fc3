"""Every recipe is complete: its settings exist, say their source, and build the flow that it names."""

import pickle
from dataclasses import fields
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from defectflow import FLOWS, config_for_features
from sprue.config import Recipe
from sprue.errors import SprueError
from sprue.params import find_recipe, read_recipe, set_dataset

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "models/recipes").glob("*.yaml"))
CHANNELS = {"tf_efficientnet_b5": {2: 64, 3: 128, 5: 304}, "vit_base_patch8_224": {7: 768, 11: 768}}
STRIDES = {2: 8, 3: 16, 5: 32, 7: 8, 11: 8}
SECTIONS = ("published", "features", "flow", "fit", "scoring")


def sections(path):
    return YAML(typ="safe").load(path)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_setting_says_its_source(path):
    settings = [line for line in path.read_text().splitlines() if line.startswith("  ")]
    assert len(settings) > 8
    for line in settings:
        assert line.partition(" # ")[2].split(":")[0].split(";")[0] in ("paper", "code", "ours"), line
    assert "Published" in path.read_text() or path.stem.endswith("-cpu")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_settings_are_the_same_in_another_process(path):
    recipe = read_recipe(path)
    copy = pickle.loads(pickle.dumps(recipe))
    assert copy == recipe
    assert copy.flow.overrides == recipe.flow.overrides


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_settings_are_valid_and_suit_the_backbone(path):
    recipe = read_recipe(path)
    assert tuple(sections(path)) == SECTIONS == tuple(Recipe.model_fields)
    # The fusion and the baseline are of no paper.
    assert "AUROC on" in recipe.published or path.stem in ("fusion-cpu", "gaussian-cpu")
    spec, flow = recipe.features, sections(path)["flow"]
    name = flow.pop("name")
    assert set(flow) <= {field.name for field in fields(FLOWS[name].config_class)}
    if spec.backbone not in CHANNELS:
        return
    scales = [
        [
            (CHANNELS[spec.backbone][block], *[round(spec.input_size * scale) // STRIDES[block]] * 2)
            for block in spec.blocks
        ]
        for scale in spec.scales
    ]
    config = config_for_features(name, scales, 200, recipe.flow.overrides)
    assert config["steps"] == flow["steps"]
    if name == "patchflow":
        assert sum(config["channels"]) == 1488
    if name == "csflow":
        assert len(config["maps"]) == 3


def test_all_published_results_have_a_recipe():
    published = {path.stem for path in RECIPES if not path.stem.endswith("-cpu")}
    assert published == {
        "patchflow-mvtec", "patchflow-visa", "csflow-mvtec", "csflow-tiles", "dnfad-mvtec", "dnfad-btad", "dnfad-mpdd",
        "multiflow-realiad",
    }  # fmt: skip


@pytest.fixture
def parameter_file(tmp_path, monkeypatch):
    """A copy of the parameter file in a folder of its own, to work in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").symlink_to(ROOT / "models")
    path = tmp_path / "params.yaml"
    path.write_bytes((ROOT / "params.yaml").read_bytes())
    return path


def dataset_of(path, name):
    return sections(path)["datasets"][name]


def recipe_of(path, name):
    """The sections that a recipe is made of."""
    return {section: dataset_of(path, name)[section] for section in SECTIONS}


def test_a_recipe_replaces_its_sections_alone(parameter_file):
    before = dataset_of(parameter_file, "textures")
    set_dataset("textures", "csflow-tiles", path=parameter_file)
    after = dataset_of(parameter_file, "textures")
    assert recipe_of(parameter_file, "textures") == sections(ROOT / "models/recipes/csflow-tiles.yaml")
    for name in ("manifest", "search", "calibration"):
        assert after[name] == before[name]


def test_a_new_dataset_begins_with_a_recipe_and_a_known_one_keeps_its_settings(parameter_file):
    text = parameter_file.read_bytes()
    set_dataset("textures", path=parameter_file)
    assert parameter_file.read_bytes() == text
    set_dataset("parts", "multiflow-cpu", "mvtec-views", path=parameter_file)
    assert recipe_of(parameter_file, "parts") == sections(ROOT / "models/recipes/multiflow-cpu.yaml")
    assert dataset_of(parameter_file, "parts")["manifest"]["layout"] == "mvtec-views"
    parameter_file.write_text(parameter_file.read_text().replace("seed: 0", "seed: 7"))
    text = parameter_file.read_bytes()
    set_dataset("parts", path=parameter_file)
    assert parameter_file.read_bytes() == text
    set_dataset("tiles", path=parameter_file)
    assert recipe_of(parameter_file, "tiles") == sections(ROOT / "models/recipes/fusion-cpu.yaml")
    assert dataset_of(parameter_file, "tiles")["manifest"]["layout"] == "mvtec"


def test_the_parameter_file_holds_the_demos_recipe():
    assert recipe_of(ROOT / "params.yaml", "textures") == sections(ROOT / "models/recipes/patchflow-cpu.yaml")


def test_what_is_no_recipe_is_refused(tmp_path):
    (tmp_path / "half.yaml").write_text("flow: {name: csflow}\n")
    with pytest.raises(SprueError, match=r"half.yaml, line 1: features is missing"):
        find_recipe(str(tmp_path / "half.yaml"))
    with pytest.raises(SprueError, match="there is no recipe 'nice'"):
        find_recipe("nice")
