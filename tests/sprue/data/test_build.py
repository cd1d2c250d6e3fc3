"""What of a dataset's folders becomes rows, what is skipped and what is refused."""

import hashlib
import shutil
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from upath import UPath

from sprue.config import CalibrationSettings, ManifestSettings
from sprue.data.build import build_manifest
from sprue.data.manifest import COLUMNS, Manifest
from sprue.errors import SprueError


def build(folder, **settings):
    return build_manifest(folder.upath, "bottles", ManifestSettings(**settings), CalibrationSettings())


def reasons(manifest):
    return {entry.path: entry.reason for entry in manifest.skipped}


def test_rows_say_what_the_folders_hold(bottles):
    frame = build(bottles).frame
    assert tuple(frame.columns) == COLUMNS
    assert list(frame["path"]) == sorted(frame["path"])
    assert Counter(frame["split"]) == {"train": 66, "calibration": 19, "validation": 15, "test": 4}
    test = frame[frame["split"] == "test"].set_index("path")
    assert dict(test["label"]) == {
        "bottle/test/crack/000.png": 1,
        "bottle/test/crack/001.png": 1,
        "bottle/test/good/000.png": 0,
        "bottle/test/good/001.png": 0,
    }
    assert test.loc["bottle/test/crack/000.png", "mask_path"] == "bottle/ground_truth/crack/000_mask.png"
    assert test.loc["bottle/test/crack/001.png", "mask_path"] == ""
    assert set(frame["width"]) == {20}
    assert set(frame["height"]) == {16}
    assert set(frame[frame["split"] != "test"]["label"]) == {0}


def test_digests_are_those_of_the_files(bottles):
    frame = build(bottles).frame
    for path, sha256 in zip(frame["path"], frame["sha256"], strict=True):
        assert sha256 == hashlib.sha256((bottles.root / path).read_bytes()).hexdigest()


def test_adding_images_leaves_most_rows_as_they_were(bottles):
    before = build(bottles).frame.set_index("path")
    for number in range(100, 105):
        bottles.image(f"bottle/train/good/{number}.png", number)
    after = build(bottles).frame.set_index("path")
    moved = (before["split"] != after.loc[before.index, "split"]).sum()
    assert moved <= 4
    assert (before["sha256"] == after.loc[before.index, "sha256"]).all()


@pytest.fixture
def copied(bottles):
    """Thirty of the training images are there twice."""
    for number in range(30):
        source = bottles.root / f"bottle/train/good/{number:03d}.png"
        shutil.copy(source, source.with_name(f"copy{number:03d}.png"))
    return bottles


def test_copies_of_an_image_share_a_split_and_calibrate_once(copied):
    manifest = build(copied)
    frame = manifest.frame
    assert (frame.groupby("sha256")["split"].nunique() == 1).all()
    calibrating = manifest.calibration_rows("bottle")
    assert len(calibrating) == calibrating["sha256"].nunique() == 19
    first = [path for path in calibrating["path"] if path < "bottle/train/good/030"]
    assert first
    copies = {path: path.replace("good/", "good/copy") for path in first}
    assert reasons(manifest) == {copy: f"a copy of {path}, which calibrates" for path, copy in copies.items()}
    assert len(frame) == 134 - len(first)


def test_copies_are_in_no_fold(copied):
    in_folds = CalibrationSettings(folds=5)
    manifest = build_manifest(copied.upath, "bottles", ManifestSettings(), in_folds)
    assert [len(fold) for fold in manifest.folds("bottle")] == [20] * 5
    assert manifest.calibration_rows("bottle")["sha256"].is_unique
    assert len(manifest.skipped) == 30
    assert manifest.calibration("bottle", in_folds).alpha == 0.05


def test_training_images_that_are_also_test_images_are_skipped(bottles):
    bottles.add_class("anvil", first_key=5000)
    good = bottles.root / "bottle/train/good"
    shutil.copy(good / "000.png", bottles.root / "bottle/test/crack/leak.png")
    shutil.copy(good / "001.png", bottles.root / "bottle/test/good/leak.png")
    bottles.root.joinpath("anvil/test/good").mkdir(parents=True)
    shutil.copy(good / "002.png", bottles.root / "anvil/test/good/leak.png")
    manifest = build(bottles)
    assert reasons(manifest) == {
        "bottle/train/good/000.png": "identical to the test image bottle/test/crack/leak.png",
        "bottle/train/good/001.png": "identical to the test image bottle/test/good/leak.png",
        "bottle/train/good/002.png": "identical to the test image anvil/test/good/leak.png",
    }
    tested = manifest.frame["split"] == "test"
    assert not set(manifest.frame[tested]["sha256"]) & set(manifest.frame[~tested]["sha256"])


def test_damaged_images_are_skipped(bottles):
    intact = bottles.image("bottle/train/good/whole.jpg", 7007, size=(200, 200)).read_bytes()
    bottles.raw("bottle/train/good/cut.jpg", intact[: len(intact) // 2])
    png = bottles.image("bottle/train/good/whole.png", 7008).read_bytes()
    bottles.raw("bottle/train/good/cut.png", png[:-40])
    bottles.raw("bottle/train/good/flipped.png", png[:-30] + bytes([png[-30] ^ 255]) + png[-29:])
    bottles.raw("bottle/train/good/empty.png", b"")
    bottles.raw("bottle/train/good/page.png", b"<html>404</html>")
    bottles.raw("bottle/train/good/Thumbs.db", b"\xd0\xcf\x11\xe0")
    bottles.raw("bottle/test/crack/readme.txt", b"hello")
    (bottles.root / "bottle/train/good/lost.png").symlink_to(bottles.root / "nowhere.png")
    manifest = build(bottles)
    found = reasons(manifest)
    assert found.pop("bottle/train/good/cut.jpg").startswith("the file is damaged: image file is truncated")
    assert found.pop("bottle/train/good/cut.png").startswith("the file is damaged: ")
    assert found.pop("bottle/train/good/flipped.png").startswith("the file is damaged: ")
    for name in ("bottle/train/good/page.png", "bottle/train/good/Thumbs.db", "bottle/test/crack/readme.txt"):
        assert found.pop(name).startswith("the file is not an image")
    assert found == {
        "bottle/train/good/empty.png": "zero bytes",
        "bottle/train/good/lost.png": "cannot be read: No such file or directory",
    }
    assert len(manifest.frame) == 106
    assert not set(manifest.frame["path"]) & {entry.path for entry in manifest.skipped}


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("size", "is_kept"), [((10_000, 9_500), True), ((10_001, 10_000), False), ((20_000, 20_000), False)]
)
def test_huge_images_are_skipped_before_decoding(bottles, size, is_kept):
    bottles.put("bottle/train/good/huge.png", Image.new("1", size))
    manifest = build(bottles)
    if is_kept:
        assert manifest.skipped == ()
    else:
        assert "pixels" in reasons(manifest)["bottle/train/good/huge.png"]


def test_links_to_images_are_read(bottles, tmp_path):
    target = bottles.image("../elsewhere.png", 77)
    (bottles.root / "bottle/train/good/link.png").symlink_to(target)
    assert "bottle/train/good/link.png" in set(build(bottles).frame["path"])


def test_a_damaged_mask_leaves_its_image_without_ground_truth(bottles):
    bottles.raw("bottle/ground_truth/crack/000_mask.png", b"")
    manifest = build(bottles)
    assert reasons(manifest) == {"bottle/ground_truth/crack/000_mask.png": "zero bytes"}
    test = manifest.select("bottle", "test").set_index("path")
    assert test.loc["bottle/test/crack/000.png", "mask_path"] == ""


def test_all_masks_of_another_size_are_named_with_both_sizes(bottles):
    bottles.mask("bottle/ground_truth/crack/000_mask.png", size=(16, 20))
    bottles.mask("bottle/ground_truth/crack/001_mask.png", size=(40, 32))
    with pytest.raises(SprueError) as caught:
        build(bottles)
    for number, size in (("000", "16x20"), ("001", "40x32")):
        assert (
            f"mask bottle/ground_truth/crack/{number}_mask.png is {size}, "
            f"its image bottle/test/crack/{number}.png is 20x16" in str(caught.value)
        )


def test_masks_of_another_size_refuse_their_class_alone(bottles):
    bottles.add_class("cup", first_key=3000)
    bottles.mask("bottle/ground_truth/crack/000_mask.png", size=(16, 20))
    manifest = build(bottles)
    assert manifest.classes == ["cup"]
    assert list(manifest.refused) == ["bottle"]
    assert "mask bottle/ground_truth/crack/000_mask.png is 16x20" in manifest.refused["bottle"]


@pytest.mark.parametrize(
    ("pixels", "suffix", "percent"),
    [
        (np.full((16, 20), 3, np.uint8), "png", "1.2"),
        (np.full((16, 20), 127, np.uint8), "png", "50"),
        (np.full((16, 20), 255, np.uint16), "png", "0.39"),
        (np.full((16, 20), 0.4, np.float32), "tif", "40"),
    ],
)
def test_masks_without_white_refuse_their_class(bottles, pixels, suffix, percent):
    bottles.add_class("cup", first_key=3000)
    (bottles.root / "bottle/ground_truth/crack/000_mask.png").unlink()
    bottles.put(f"bottle/ground_truth/crack/000_mask.{suffix}", Image.fromarray(pixels))
    manifest = build(bottles)
    assert manifest.classes == ["cup"]
    assert (
        f"the largest value of mask bottle/ground_truth/crack/000_mask.{suffix} is {percent} % of white"
        in (manifest.refused["bottle"])
    )


def test_a_black_mask_is_no_mistake(bottles):
    bottles.put("bottle/ground_truth/crack/000_mask.png", Image.new("L", (20, 16)))
    assert not build(bottles).refused


@pytest.mark.parametrize(
    ("bits", "suffix", "kept"),
    [
        (12, "png", False),
        (14, "png", False),
        (15, "png", True),
        (16, "png", True),
        (8, "tif", False),
        (12, "f.tif", False),
    ],
)
def test_a_class_whose_deep_images_use_little_of_their_scale_is_refused(bottles, bits, suffix, kept):
    for number in range(30):
        values = np.random.default_rng(number).integers(0, 2**bits, (16, 20))
        dtype = {"png": np.uint16, "tif": np.int32, "f.tif": np.float32}[suffix]
        deep = values.astype(dtype) / np.float32(65535) if suffix == "f.tif" else values.astype(dtype)
        bottles.put(f"cup/train/good/{number:02}.{suffix}", Image.fromarray(deep))
    bottles.image("cup/test/good/00.png", 4000)  # of 8 bits, so that it says nothing of the others' scale
    manifest = build(bottles)
    assert manifest.classes == (["bottle", "cup"] if kept else ["bottle"])
    if not kept:
        assert "'cup' has images of more than 8 bits, of which none goes beyond" in manifest.refused["cup"]


def test_one_bright_image_shows_that_the_scale_is_right_and_dark_8_bit_images_are_no_mistake(bottles):
    for number in range(30):
        values = np.random.default_rng(number).integers(0, 31, (16, 20))
        bottles.put(f"cup/train/good/{number:02}.png", Image.fromarray(values.astype(np.uint8)))
        bottles.put(f"jar/train/good/{number:02}.png", Image.fromarray((values * 100 + number).astype(np.uint16)))
    bottles.put("jar/train/good/bright.png", Image.fromarray(np.full((16, 20), 65535, np.uint16)))
    assert build(bottles).refused == {}


def test_floats_of_another_scale_are_skipped_by_name(bottles):
    bottles.put("bottle/train/good/float.tif", Image.fromarray(np.full((16, 20), 200, np.float32)))
    assert reasons(build(bottles))["bottle/train/good/float.tif"].startswith("the file has values above 1, ")


def test_classes_with_too_few_are_refused_by_name_and_the_others_go_on(bottles, tmp_path):
    alone = build(bottles).frame
    bottles.add_class("cup", good=11, first_key=3000)
    bottles.add_class("jar", good=12, first_key=4000)
    bottles.add_class("lid", good=3, first_key=5000)
    bottles.image("lid/test/good/000.png", 6000)
    (bottles.root / "mug/train/good").mkdir(parents=True)
    manifest = build(bottles)
    assert manifest.classes == ["bottle", "jar"]
    assert manifest.frame.query("class_name == 'bottle'").reset_index(drop=True).equals(alone)
    assert "'cup' has 11 good training images, but at least 12 distinct" in manifest.refused["cup"]
    assert "'lid' has 3 good training images, but at least 12 distinct" in manifest.refused["lid"]
    assert "'mug' has no images in mug/train/good: put its good images there" in manifest.refused["mug"]
    assert sorted(manifest.refused) == ["cup", "lid", "mug"]
    manifest.write(UPath(tmp_path / "manifest.parquet"))
    assert Manifest.read(UPath(tmp_path / "manifest.parquet")).refused == manifest.refused


def test_a_class_whose_images_are_all_damaged_is_named_with_the_reason(bottles):
    for number in range(3):
        bottles.raw(f"cup/train/good/{number}.png", b"")
    reason = build(bottles).refused["cup"]
    assert "'cup' has 0 good training images" in reason
    assert "Skipped training files: 3, the first cup/train/good/0.png (zero bytes)" in reason


def test_without_a_class_that_can_be_trained_there_is_no_manifest(folder):
    folder.add_class("cup", good=4)
    folder.add_class("jar", good=5, first_key=4000)
    with pytest.raises(SprueError) as caught:
        build(folder)
    cup, jar = str(caught.value).splitlines()
    assert "'cup' has 4 good training images" in cup and "'jar' has 5 good training images" in jar
