"""Extraction on a real Ray: each picture goes through the backbone once."""

import hashlib

import numpy as np
import pandas as pd
import pytest
import ray
from PIL import Image
from upath import UPath

from sprue.errors import SprueError
from sprue.features.extraction import Extraction, extract, place_engines
from sprue.features.tables import FeatureTable
from sprue.inference.backbone import resolve
from sprue.inference.engines import build_engine
from sprue.inference.images import model_input, open_image
from sprue.inference.spec import FeatureSpec

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.fixture(scope="module")
def spec():
    return resolve(FeatureSpec(input_size=64, blocks=(2, 3), scales=(1.0,)))


def add_pictures(root, class_name, start, count):
    """Writes pictures of noise and returns their rows."""
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
    pictures = pd.concat([add_pictures(root, "brick", 0, 19), add_pictures(root, "grass", 0, 3)], ignore_index=True)
    # The same picture under a second path.
    pictures = pd.concat([pictures, pictures[:1].assign(path="brick/1.png")], ignore_index=True)
    done = extract(spec, pictures, UPath(root), UPath(features))
    assert (done.stored, done.extracted) == (0, 22)
    assert (
        FeatureSpec.from_mapping(pd.read_json(features / spec.fingerprint / "spec.json", typ="series").to_dict())
        == spec
    )

    engine = build_engine(spec, threads=2)
    for class_name, count in (("brick", 19), ("grass", 3)):
        table = FeatureTable(UPath(features / spec.fingerprint / class_name))
        assert len(table) == count
        rows = pictures[pictures["class_name"] == class_name].drop_duplicates("sha256")
        images = [open_image((root / path).read_bytes(), path) for path in rows["path"]]
        expected = engine(np.stack([model_input(image, 64) for image in images]))
        for ours, theirs in zip(table.read(rows["sha256"].tolist()), expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-3)

    before = parts(features)
    again = extract(spec, pictures, UPath(root), UPath(features))
    assert (again.stored, again.extracted) == (22, 0)
    assert parts(features) == before

    grown = pd.concat([pictures, add_pictures(root, "grass", 3, 2)], ignore_index=True)
    more = extract(spec, grown, UPath(root), UPath(features))
    assert (more.stored, more.extracted) == (22, 2)
    assert before.items() < parts(features).items()
    assert len(FeatureTable(UPath(features / spec.fingerprint / "grass"))) == 5


def test_a_picture_that_changed_since_the_manifest_is_refused(spec, tmp_path):
    pictures = add_pictures(tmp_path / "data", "brick", 0, 2)
    Image.new("L", (50, 40)).save(tmp_path / "data" / "brick" / "1.png")
    with pytest.raises(SprueError, match=r"brick/1\.png has changed since the manifest was written") as caught:
        extract(spec, pictures, UPath(tmp_path / "data"), UPath(tmp_path / "features"))
    assert "\n" not in str(caught.value)


def test_a_picture_that_is_gone_is_named(spec, tmp_path):
    pictures = add_pictures(tmp_path / "data", "brick", 0, 1)
    (tmp_path / "data" / "brick" / "0.png").unlink()
    with pytest.raises(SprueError, match=r"brick/0\.png can't be read: .*No such file"):
        extract(spec, pictures, UPath(tmp_path / "data"), UPath(tmp_path / "features"))


def test_nothing_to_extract_is_no_error(spec, tmp_path):
    nothing = pd.DataFrame({"class_name": [], "sha256": [], "path": []})
    done = extract(spec, nothing, UPath(tmp_path), UPath(tmp_path / "features"))
    assert isinstance(done, Extraction)
    assert (done.stored, done.extracted) == (0, 0)


def test_an_engine_leaves_a_core_to_decoding():
    gpus = ray.cluster_resources().get("GPU", 0)
    placement = place_engines()
    if gpus:
        assert (placement.workers, placement.num_gpus) == (gpus, 1)
    else:
        assert (placement.workers, placement.num_cpus, placement.num_gpus, placement.threads) == (1, 1, 0, 2)
