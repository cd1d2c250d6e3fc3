"""The features stage refuses a class with foreign images until the user has decided about each of them."""

from pathlib import Path

import numpy as np
import pytest
import ray
from PIL import Image
from ruamel.yaml import YAML
from skimage import data

from sprue.errors import SprueError
from sprue.stages import features, manifest
from sprue.stages.failures import read_failures
from sprue.stages.runtime import read_context

RECIPE = Path(__file__).parents[3] / "models/recipes/patchflow-cpu.yaml"
FOREIGN = ("brick/train/good/grass.png", "brick/train/good/tiny.png")


def write_images(root):
    """Two classes of 30 good images; among those of brick are a 1x1 image and one of the other class."""
    for seed, name in enumerate(("brick", "grass")):
        rng, pixels = np.random.default_rng(seed), getattr(data, name)()
        (root / name / "train/good").mkdir(parents=True)
        for number in range(31):
            top, left = rng.integers(0, pixels.shape[0] - 96, 2)
            place = f"{name}/train/good/{number:02}.png" if number < 30 else FOREIGN[0]
            if number < 30 or name == "grass":
                Image.fromarray(pixels[top : top + 96, left : left + 96]).save(root / place)
    Image.new("RGB", (1, 1), "white").save(root / FOREIGN[1])


def context(folder, **decisions):
    settings = YAML(typ="safe").load(RECIPE)
    settings["features"] |= {"blocks": [2, 3], "scales": [1.0], "input_size": 128}
    settings["manifest"] = {"calibration": 0.2, "validation": 0.1, **decisions}
    settings["calibration"] = {"alpha": 0.2}
    path = folder / "params.yaml"
    YAML().dump({"datasets": {"walls": settings}}, path)
    return read_context(path, None, str(folder / "data"), str(folder / "store"))


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs both stages with decisions; returns the failures and the page."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    write_images(tmp_path / "data")

    def stages(**decisions):
        of_stage = context(tmp_path, **decisions)
        manifest.main(of_stage)
        try:
            features.main(of_stage)
        finally:
            ray.shutdown()
        return read_failures(of_stage.folder, "features"), (of_stage.features / "screening.html").read_text()

    return stages


def test_foreign_images_need_a_decision(run, caplog):
    failures, page = run()
    assert failures.keys() == {"brick"}
    assert "has 2 good training images that look foreign" in failures["brick"]
    assert all(path in failures["brick"] and path in page for path in FOREIGN)
    assert "looks like class 'grass'" in failures["brick"]
    assert "datasets.walls.manifest.drop or datasets.walls.manifest.keep" in failures["brick"]
    assert page.count("data:image/jpeg;base64,") == 5
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert any(failures["brick"] in each for each in warnings)
    assert any("screening.html" in each for each in warnings)

    failures, page = run(drop=[FOREIGN[0]], keep=[FOREIGN[1]])
    assert failures == {} and "base64" not in page


def test_a_decision_about_no_image_is_a_mistake_of_the_manifest_stage(tmp_path):
    write_images(tmp_path / "data")
    with pytest.raises(SprueError, match=r"manifest\.drop: 'brick/grass\.png' is no image of the dataset"):
        manifest.main(context(tmp_path, drop=["brick/grass.png"]))
    assert not (tmp_path / "store").exists()
