"""A test image that was saved again in another way is no training image; parts that are merely alike are."""

import io
import shutil
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from skimage import data
from upath import UPath

from sprue.config import CalibrationSettings, ManifestSettings
from sprue.data.build import build_manifest
from sprue.data.inspection import thumbnail
from sprue.demo.textures import write_textures

SIDE = 160


def photograph(number):
    """One of 40 pieces of a photograph, all alike: each is a few pixels beside another."""
    left = 4 * number
    return Image.fromarray(data.brick()[100 : 100 + SIDE, left : left + SIDE])


@pytest.fixture
def parts(folder):
    """A class of 40 training images of alike parts, and two test images of others."""
    for number in range(40):
        folder.put(f"part/train/good/{number:02}.png", photograph(number))
    folder.put("part/test/good/00.png", photograph(60))
    folder.put("part/test/crack/00.png", photograph(70))
    return folder


def build(folder, **settings):
    return build_manifest(folder.upath, "parts", ManifestSettings(**settings), CalibrationSettings(alpha=0.2))


def skipped(manifest):
    return {entry.path: entry.reason for entry in manifest.skipped}


@pytest.mark.parametrize("copy", ["jpeg75", "jpeg90", "bmp", "png", "half", "colour"])
def test_a_test_image_that_was_saved_again_is_skipped(parts, copy):
    original = Image.open(parts.root / "part/test/good/00.png")
    path = f"part/train/good/copy.{'jpg' if copy.startswith('jpeg') else 'bmp' if copy == 'bmp' else 'png'}"
    file = parts.root / path
    if copy.startswith("jpeg"):
        original.save(file, quality=int(copy.removeprefix("jpeg")))
    elif copy == "half":
        original.resize((SIDE // 2, SIDE // 2), Image.Resampling.LANCZOS).save(file)
    else:
        original.convert("RGB" if copy == "colour" else "L").save(file, **({"optimize": True} if copy == "png" else {}))
    manifest = build(parts)
    if copy == "png" and file.read_bytes() == (parts.root / "part/test/good/00.png").read_bytes():
        pytest.fail("the copy has the same bytes, so that the test says nothing")
    assert skipped(manifest) == {
        path: "a copy of the test image part/test/good/00.png, saved in another way; "
        "if it is another part, add its images to manifest.keep"
    }
    assert path not in set(manifest.frame["path"])
    assert len(manifest.frame) == 42
    kept = build(parts, keep=[path])
    assert skipped(kept) == {}
    assert path in set(kept.frame["path"])


def test_copies_of_test_images_are_found_among_many_equal_files(parts):
    for number in range(40):
        for again in range(5):
            shutil.copy(
                parts.root / f"part/train/good/{number:02}.png", parts.root / f"part/train/good/{number:02}-{again}.png"
            )
    for again in range(5):
        Image.open(parts.root / "part/test/good/00.png").save(parts.root / f"part/train/good/copy{again}.jpg")
    leaked = [path for path, reason in skipped(build(parts)).items() if "saved in another way" in reason]
    assert leaked == [f"part/train/good/copy{again}.jpg" for again in range(5)]


def test_alike_parts_are_no_copies(parts):
    assert skipped(build(parts)) == {}
    pixels = [np.asarray(thumbnail(photograph(number))) for number in (0, 1)]
    assert 2 < np.sqrt(((pixels[0] - pixels[1]) ** 2).mean()) < 40


def test_the_demo_has_no_copies(tmp_path):
    write_textures(tmp_path / "textures")
    manifest = build_manifest(UPath(tmp_path / "textures"), "textures", ManifestSettings(), CalibrationSettings())
    assert manifest.skipped == ()


def test_parts_that_a_fixed_camera_can_not_tell_apart_are_all_trained_on(folder):
    still = np.asarray(photograph(0), np.float32)
    for number in range(40):
        noise = np.random.default_rng(number).normal(0, 2, still.shape)
        split = "train" if number < 36 else "test"
        folder.put(f"part/{split}/good/{number:02}.png", Image.fromarray((still + noise).clip(0, 255).astype(np.uint8)))
    manifest = build(folder)
    assert skipped(manifest) == {}
    assert Counter(manifest.frame["split"]).keys() == {"train", "calibration", "validation", "test"}


def test_uniform_images_are_no_copies(parts):
    parts.put("part/train/good/gray.png", Image.new("L", (SIDE, SIDE), 90))
    parts.put("part/test/good/gray.png", Image.new("L", (SIDE + 1, SIDE), 90))
    assert skipped(build(parts)) == {}


def test_copies_among_the_training_images_share_a_split_and_calibrate_once(parts):
    for number in range(0, 40, 2):
        buffer = io.BytesIO()
        photograph(number).save(buffer, "JPEG", quality=75)
        parts.raw(f"part/train/good/{number:02}again.jpg", buffer.getvalue())
    manifest = build(parts)
    split_of = dict(manifest.frame[["path", "split"]].to_numpy())
    trained = []
    for number in range(0, 40, 2):
        first, again = f"part/train/good/{number:02}.png", f"part/train/good/{number:02}again.jpg"
        if split_of[first] == "calibration":
            assert skipped(manifest)[again] == f"a copy of {first}, which calibrates"
        else:
            assert split_of[again] == split_of[first]
            trained.append(again)
    assert len(manifest.skipped) == 20 - len(trained) > 0
    # To keep a part that looks unusual is no word on its copies.
    kept = build(parts, keep=[manifest.skipped[0].path.replace("again.jpg", ".png")])
    assert kept.skipped == manifest.skipped


def of_views(folder, sample, number, suffix="png"):
    """Puts a sample of two views: a part, and a part of the machine that looks the same but for the noise."""
    noise = np.random.default_rng(number).normal(0, 2, (SIDE, SIDE))
    machine = (np.asarray(photograph(0), np.float32) + noise).clip(0, 255).astype(np.uint8)
    for view, image in (("a", Image.fromarray(machine)), ("b", photograph(number))):
        folder.put(f"box/{sample}/{view}.{suffix}", image)


@pytest.fixture
def boxes(folder):
    """A class of 40 training samples and a test sample; one view is the same in all, but for the noise."""
    for number in range(40):
        of_views(folder, f"train/good/{number:02}", number)
    of_views(folder, "test/good/00", 60)
    return folder


def test_a_view_that_is_alike_in_all_samples_makes_no_copies_and_hides_none(boxes):
    views = {"layout": "mvtec-views"}
    assert skipped(build(boxes, **views)) == {}
    of_views(boxes, "train/good/again", 60, suffix="jpg")
    reason = "a copy of the test image box/test/good/00/b.png, saved in another way; "
    assert skipped(build(boxes, **views)) == {
        "box/train/good/again": reason + "if it is another part, add its images to manifest.keep"
    }
    kept = build(boxes, keep=["box/train/good/again/a.jpg"], **views)
    assert skipped(kept) == {}


def test_a_sample_with_a_view_of_a_test_sample_and_another_of_its_own_is_no_copy(boxes):
    boxes.put("box/train/good/07/a.png", photograph(50))
    boxes.put("box/train/good/07/b.png", photograph(60))
    assert skipped(build(boxes, layout="mvtec-views")) == {}


def test_copies_of_a_training_sample_share_a_split_whatever_a_bland_view_shows(boxes):
    for number in range(0, 40, 2):
        of_views(boxes, f"train/good/{number:02}again", number, suffix="jpg")
    manifest = build(boxes, layout="mvtec-views")
    split_of = dict(manifest.frame[["sample_id", "split"]].to_numpy())
    again = [sample for sample in split_of if sample.endswith("again")]
    assert {split_of[sample] for sample in again} == {"train", "validation"}
    assert all(split_of[sample] == split_of[sample.removesuffix("again")] for sample in again)
    assert len(again) + len(manifest.skipped) == 20
    assert manifest.calibration_rows("box")["sample_id"].nunique() == 4


def test_dropped_images_are_skipped_and_kept_ones_stay(parts):
    path = "part/train/good/07.png"
    manifest = build(parts, drop=[path], keep=["part/train/good/08.png"])
    assert skipped(manifest) == {path: "dropped by manifest.drop"}
    assert len(manifest.frame) == 41


def test_a_dropped_test_image_leaks_nothing(parts):
    shutil.copy(parts.root / "part/test/good/00.png", parts.root / "part/train/good/same.png")
    assert skipped(build(parts, drop=["part/test/good/00.png"])) == {
        "part/test/good/00.png": "dropped by manifest.drop"
    }
