from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import data
from upath import UPath

from sprue.config import CalibrationSettings, ManifestSettings
from sprue.data.build import build_manifest
from sprue.data.manifest import Manifest
from sprue.data.synthetic import KINDS
from sprue.demo.textures import GRID, SCALE, TEXTURES, TILE, write_textures
from sprue.errors import SprueError


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "textures"
    write_textures(folder)
    return folder


@pytest.fixture(scope="module")
def manifest(root) -> Manifest:
    return build_manifest(UPath(root), "textures", ManifestSettings(), CalibrationSettings())


def contents(root: Path) -> dict[str, bytes]:
    return {str(file.relative_to(root)): file.read_bytes() for file in sorted(root.rglob("*")) if file.is_file()}


def pixels(root: Path, path: str) -> np.ndarray:
    return np.asarray(Image.open(root / path))


def region(path: str) -> tuple[int, int]:
    """Row and column in the photograph of an image's first pixel, from the image's name."""
    name = Path(path).stem
    return int(name[1:3]) * TILE, int(name[4:6]) * TILE


def test_the_photographs_come_without_a_download():
    shipped = Path(data.__file__).parent
    assert all((shipped / f"{texture}.png").is_file() for texture in TEXTURES)


def test_every_split_is_large_enough_at_the_default_settings(manifest):
    assert manifest.classes == sorted(TEXTURES)
    assert manifest.skipped == ()
    for texture in TEXTURES:
        rows = manifest.frame[manifest.frame["class_name"] == texture]
        assert Counter(rows["split"]) == {"train": 69, "calibration": 19, "validation": 16, "test": 40}
        assert Counter(rows[rows["split"] == "test"]["defect_type"]) == {"good": 16, **dict.fromkeys(KINDS, 6)}


def test_no_pixel_of_a_photograph_is_in_two_images(manifest):
    for texture in TEXTURES:
        used_HW = np.zeros(getattr(data, texture)().shape, int)
        for path in manifest.frame[manifest.frame["class_name"] == texture]["path"]:
            top, left = region(path)
            assert top + TILE <= used_HW.shape[0]
            assert left + TILE <= used_HW.shape[1]
            used_HW[top : top + TILE, left : left + TILE] += 1
        assert used_HW.max() == 1
        assert used_HW.sum() == (GRID * TILE) ** 2


def test_images_show_the_region_in_their_name_and_no_other(root, manifest):
    for texture in TEXTURES:
        photograph_HW = getattr(data, texture)()
        for path in manifest.select(texture, "train")["path"]:
            top, left = region(path)
            alone = Image.fromarray(photograph_HW[top : top + TILE, left : left + TILE])
            expected_HW = np.asarray(alone.resize((TILE * SCALE, TILE * SCALE), Image.Resampling.BICUBIC))
            assert np.array_equal(pixels(root, path), expected_HW)


def test_defective_images_differ_from_the_photograph_inside_their_mask_only(root, manifest):
    for texture in TEXTURES:
        photograph_HW = getattr(data, texture)()
        test = manifest.select(texture, "test")
        for path, mask_path in test.loc[test["label"] == 1, ["path", "mask_path"]].itertuples(index=False):
            top, left = region(path)
            good = Image.fromarray(photograph_HW[top : top + TILE, left : left + TILE])
            good_HW = np.asarray(good.resize((TILE * SCALE, TILE * SCALE), Image.Resampling.BICUBIC)).astype(int)
            mask_HW = pixels(root, mask_path)
            change_HW = np.abs(pixels(root, path) - good_HW)
            assert set(np.unique(mask_HW)) == {0, 255}
            assert not change_HW[mask_HW == 0].any()
            assert change_HW[mask_HW == 255].max() >= 8
            assert 0.0005 < (mask_HW == 255).mean() < 0.25


def test_defects_range_from_obvious_to_hard(root, manifest):
    test = manifest.frame[manifest.frame["label"] == 1]
    areas = [(pixels(root, path) > 0).mean() for path in test["mask_path"]]
    assert max(areas) > 10 * min(areas)


def test_the_same_seed_writes_the_same_bytes_and_another_seed_others(root, tmp_path):
    write_textures(tmp_path / "again")
    write_textures(tmp_path / "other", seed=1)
    assert contents(tmp_path / "again") == contents(root)
    assert contents(tmp_path / "other") != contents(root)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["again", "other"]


def test_an_existing_folder_is_not_touched(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(SprueError, match="exists already: remove it or give another folder"):
        write_textures(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]
