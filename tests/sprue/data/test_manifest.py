"""A manifest is written and read back as it was, and says what it holds."""

import os
import shutil
import subprocess
import sys

import pytest
from upath import UPath

from sprue.config import CalibrationSettings, ManifestSettings
from sprue.data.build import build_manifest
from sprue.data.manifest import Manifest
from sprue.errors import SprueError


def build(folder, **settings):
    return build_manifest(folder.upath, "bottles", ManifestSettings(**settings), CalibrationSettings())


def test_writes_the_same_bytes_again_and_reads_back_the_same(bottles, tmp_path):
    bottles.raw("bottle/train/good/readme.txt", b"hello")
    first, second = tmp_path / "a/manifest.parquet", tmp_path / "b/manifest.parquet"
    manifest = build(bottles, seed=3)
    manifest.write(UPath(first))
    build(bottles, seed=3).write(UPath(second))
    assert first.read_bytes() == second.read_bytes()
    assert [file.name for file in first.parent.iterdir()] == ["manifest.parquet"]
    read = Manifest.read(UPath(first))
    assert read.frame.equals(manifest.frame)
    assert list(read.frame.dtypes) == list(manifest.frame.dtypes)
    assert (read.dataset, read.settings, read.skipped) == (manifest.dataset, manifest.settings, manifest.skipped)
    assert read.settings == ManifestSettings(seed=3)


def test_another_process_and_another_folder_give_the_same_bytes(bottles, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(bottles.root, moved)
    script = (
        "import sys; from upath import UPath; from sprue.data.build import build_manifest\n"
        "from sprue.config import CalibrationSettings, ManifestSettings\n"
        "manifest = build_manifest(UPath(sys.argv[1]), 'bottles', ManifestSettings(), CalibrationSettings())\n"
        "manifest.write(UPath(sys.argv[2]))"
    )
    written = tmp_path / "other.parquet"
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", script, str(moved), str(written)], check=True, env=environment)
    build(bottles).write(UPath(tmp_path / "here.parquet"))
    assert written.read_bytes() == (tmp_path / "here.parquet").read_bytes()


def test_settings_change_the_bytes(bottles, tmp_path):
    for seed in (0, 1):
        build(bottles, seed=seed).write(UPath(tmp_path / f"{seed}.parquet"))
    assert (tmp_path / "0.parquet").read_bytes() != (tmp_path / "1.parquet").read_bytes()


def test_writes_and_reads_remotely(bottles):
    path = UPath("memory://manifests/deep/manifest.parquet")
    build(bottles).write(path)
    assert Manifest.read(path).classes == ["bottle"]
    assert [child.name for child in path.parent.iterdir()] == ["manifest.parquet"]


def test_classes_and_select(bottles):
    bottles.add_class("anvil", first_key=5000)
    manifest = build(bottles)
    assert manifest.classes == ["anvil", "bottle"]
    calibration = manifest.select("anvil", "calibration")
    assert len(calibration) == 19
    assert list(calibration.index) == list(range(19))
    assert set(calibration["class_name"]) == {"anvil"}
    assert len(manifest.select("anvil", "test")) == 0
    with pytest.raises(SprueError, match=r"'cup' is not in the manifest, which holds anvil, bottle"):
        manifest.select("cup", "train")


def test_a_class_with_few_images_has_the_alpha_that_it_can_promise(bottles):
    bottles.add_class("toy", good=20, first_key=3000)
    for number in range(5):
        bottles.image(f"toy/train/good/copy{number}.png", 3000 + number)
    manifest = build(bottles)
    assert {"train", "validation", "calibration"} == set(manifest.frame.query("class_name == 'toy'")["split"])
    assert manifest.select("toy", "calibration")["sha256"].nunique() == 9
    wanted = CalibrationSettings(alpha=0.05)
    assert manifest.calibration("bottle", wanted) == wanted
    assert manifest.calibration("toy", wanted) == CalibrationSettings(alpha=0.1)
    assert manifest.calibration("toy", CalibrationSettings(alpha=0.2)).alpha == 0.2


def test_reading_what_is_no_manifest(tmp_path):
    with pytest.raises(SprueError, match="there is no manifest at"):
        Manifest.read(UPath(tmp_path / "manifest.parquet"))
    for content in (b"", b"hello world, this is no parquet file"):
        (tmp_path / "other.parquet").write_bytes(content)
        with pytest.raises(SprueError, match="is no manifest"):
            Manifest.read(UPath(tmp_path / "other.parquet"))


def test_reading_another_parquet_file(tmp_path, bottles):
    build(bottles).frame.to_parquet(tmp_path / "frame.parquet", engine="fastparquet")
    with pytest.raises(SprueError, match="is no manifest"):
        Manifest.read(UPath(tmp_path / "frame.parquet"))


def test_the_manifest_of_a_class_alone_says_the_same_of_it(bottles):
    bottles.add_class("anvil", good=30, first_key=5000)
    manifest = build(bottles)
    alone = manifest.of_class("anvil")
    assert alone.classes == ["anvil"]
    assert alone.select("anvil", "calibration").equals(manifest.select("anvil", "calibration"))
    assert alone.calibration_rows("anvil").equals(manifest.calibration_rows("anvil"))
    assert len(manifest.rows("anvil")) == 30
    with pytest.raises(SprueError, match="class 'cup' is not in the manifest, which holds anvil, bottle"):
        manifest.of_class("cup")
