"""Defects are drawn once on the validation pictures, and nothing else is read.

Shapes: H rows, W columns of a picture.
"""

import hashlib
import io
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from upath import UPath

from sprue.data.samples import samples_of
from sprue.errors import SprueError
from sprue.features.tables import FeatureTable, write_part
from sprue.inference.backbone import resolve
from sprue.inference.engines import build_engine
from sprue.inference.images import model_input
from sprue.inference.spec import FeatureSpec
from sprue.search.drawn import drawn_maps, extract_drawn, plan_defects


@pytest.fixture(scope="module")
def spec():
    return resolve(FeatureSpec(blocks=(2,), scales=(1.0,), input_size=64))


def write_rows(folder, samples, views):
    """Noisy pictures, and their rows as in a manifest."""
    rng = np.random.default_rng(0)
    rows = []
    for sample in range(samples):
        for view in range(views):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(90, 160, (80, 100, 3), np.uint8)).save(buffer, "png")
            path = f"{sample}-{view}.png"
            (folder / path).write_bytes(buffer.getvalue())
            digest = hashlib.sha256(buffer.getvalue()).hexdigest()
            rows.append({"path": path, "sha256": digest, "sample_id": f"s{sample}", "view": f"v{view}"})
    return pd.DataFrame(rows)


def test_each_sample_gets_a_defect_of_each_kind_and_features_are_made_once(spec, tmp_path):
    rows = write_rows(tmp_path, samples=3, views=1)
    folder = UPath(tmp_path / "drawn")
    assert extract_drawn(spec, rows, UPath(tmp_path), folder) == 12
    defects = plan_defects(samples_of(rows))
    assert [defect.kind for defect in defects[:4]] == ["scratch", "stain", "hole", "patch"]
    table = FeatureTable(folder)
    assert len(table) == len({defect.digest for defect in defects}) == 12

    path = tmp_path / rows["path"][0]
    drawn_HWC = defects[0].draw(np.asarray(Image.open(path)))
    assert 0 < (drawn_HWC != np.asarray(Image.open(path))).any(2).mean() < 0.5
    (expected,) = build_engine(spec)(model_input(Image.fromarray(drawn_HWC), 64)[None])
    np.testing.assert_allclose(table.read([defects[0].digest])[0], expected, rtol=1e-2, atol=1e-2)

    parts = {part.name: part.stat().st_mtime_ns for part in folder.iterdir()}
    for part in tmp_path.glob("*.png"):
        part.unlink()  # so that a second extraction would fail
    assert extract_drawn(spec, rows, UPath(tmp_path), folder) == 12
    assert {part.name: part.stat().st_mtime_ns for part in folder.iterdir()} == parts
    with pytest.raises(SprueError, match=r"0-0\.png can't be read"):
        extract_drawn(spec, rows, UPath(tmp_path), UPath(tmp_path / "elsewhere"))


def test_a_defect_is_on_one_view_and_the_others_are_as_they_were(tmp_path):
    samples = (("a0", "a1"), ("b0", "b1"))
    places = (1,)
    maps = [np.arange(4, dtype=np.float16).reshape(4, 1, 1, 1), 10 + np.arange(4, dtype=np.float16).reshape(4, 1, 1, 1)]
    write_part(UPath(tmp_path / "table"), ["a0", "a1", "b0", "b1"], maps)
    defects = plan_defects(samples)
    altered = np.full((8, 1, 1, 1), 99, np.float16)
    write_part(UPath(tmp_path / "drawn"), [defect.digest for defect in defects], [altered, altered])
    tables = (FeatureTable(UPath(tmp_path / name)) for name in ("table", "drawn"))
    first, second = (each.ravel() for each in drawn_maps(*tables, samples, places)[1::2])
    assert [defect.view for defect in defects] == [0, 1, 0, 1, 1, 0, 1, 0]
    assert first.tolist() == [99, 10, 99, 10, 12, 99, 12, 99]
    assert second.tolist() == [11, 99, 11, 99, 99, 13, 99, 13]


def test_a_defect_is_always_the_same_and_others_differ():
    picture_HWC = np.random.default_rng(0).integers(90, 160, (64, 64, 3), np.uint8)
    first, second = (plan_defects((("a",),))[0] for _ in range(2))
    np.testing.assert_array_equal(first.draw(picture_HWC), second.draw(picture_HWC))
    assert (first.draw(picture_HWC) != replace(first, picture="b").draw(picture_HWC)).any()
