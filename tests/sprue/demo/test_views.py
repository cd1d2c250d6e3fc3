"""The embedded dataset of views: samples share no pixels, and their views agree except for defects."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage.morphology import dilation, footprint_rectangle
from upath import UPath

from sprue.config import CalibrationSettings, ManifestSettings
from sprue.data.build import build_manifest
from sprue.data.manifest import Manifest
from sprue.data.samples import views_of
from sprue.data.synthetic import KINDS, synthesize_defect
from sprue.demo import views
from sprue.demo.views import PARTS, SIDE, VIEWS, write_views


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "views"
    write_views(folder)
    return folder


@pytest.fixture(scope="module")
def manifest(root) -> Manifest:
    return build_manifest(UPath(root), "views", ManifestSettings(layout="mvtec-views"), CalibrationSettings())


def pixels(root, path) -> np.ndarray:
    with Image.open(root / path) as image:
        return np.asarray(image).astype(float)


def test_every_split_is_large_enough_and_no_tile_is_in_two_samples(manifest):
    assert manifest.classes == sorted(PARTS)
    assert manifest.skipped == ()
    for part in PARTS:
        rows = manifest.frame[manifest.frame["class_name"] == part]
        assert views_of(rows) == VIEWS
        samples = rows[rows["view"] == VIEWS[0]]
        assert Counter(samples["split"]) == {"train": 56, "calibration": 19, "validation": 13, "test": 56}
        assert Counter(samples[samples["split"] == "test"]["defect_type"]) == {"good": 24, **dict.fromkeys(KINDS, 8)}
        assert samples["sample_id"].str.split("/").str[-1].nunique() == 144
        assert set(rows["width"]) == set(rows["height"]) == {SIDE}


def test_one_or_two_cameras_see_a_defect_and_have_masks(root, manifest):
    test = manifest.frame[manifest.frame["label"] == 1]
    shown = test.groupby("sample_id")["mask_path"].agg(lambda paths: (paths != "").sum())
    assert Counter(shown).keys() == {1, 2}
    assert set(test[test["mask_path"] != ""]["view"]) == set(VIEWS)
    areas = []
    for path in test["mask_path"][test["mask_path"] != ""]:
        mask_HW = pixels(root, path)
        assert set(np.unique(mask_HW)) == {0, 255}
        areas.append((mask_HW == 255).mean())
    assert max(areas) > 10 * min(areas)


def test_views_of_a_sample_depend_on_each_other(root, manifest):
    """A part's brightness in the top view predicts its brightness in the others."""
    for part in PARTS:
        rows = manifest.select(part, "train")
        level_NV = np.array([pixels(root, path).mean() for path in rows["path"]]).reshape(-1, len(VIEWS))
        for view in (1, 2):
            assert np.corrcoef(level_NV[:, 0], level_NV[:, view])[0, 1] > 0.95


def test_a_defect_changes_only_views_with_a_mask_and_only_there(root, manifest, tmp_path, monkeypatch):
    def mask_only(image_HWC, *arguments):
        return image_HWC, synthesize_defect(image_HWC, *arguments)[1]

    monkeypatch.setattr(views, "synthesize_defect", mask_only)
    write_views(tmp_path / "good")
    for row in manifest.frame[manifest.frame["label"] == 1].itertuples():
        change_HW = np.abs(pixels(root, row.path) - pixels(tmp_path / "good", row.path))
        if not row.mask_path:
            assert not change_HW.any()
            continue
        mask_HW = pixels(root, row.mask_path) == 255
        # A pixel that is less than half defective, such as the end of a scratch, is not in the mask.
        assert change_HW[~dilation(mask_HW, footprint_rectangle((5, 5)))].sum() < 0.02 * change_HW.sum()
        assert change_HW[mask_HW].mean() > 2


def test_the_same_seed_writes_the_same_bytes_and_another_seed_others(root, tmp_path):
    for name, seed in (("again", 0), ("other", 1)):
        write_views(tmp_path / name, seed)
    first, again, other = (
        {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*.png")}
        for folder in (root, tmp_path / "again", tmp_path / "other")
    )
    assert again == first
    assert other != first
