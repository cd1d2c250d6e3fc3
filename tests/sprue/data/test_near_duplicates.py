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
        "if it is another part, add it to manifest.keep"
    }
    assert path not in set(manifest.frame["path"])
    assert len(manifest.frame) == 42
    kept = build(parts, keep=[path])
    assert skipped(kept) == {}
    assert path in set(kept.frame["path"])


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
            assert skipped(manifest).pop(again).startswith(f"a copy of {first}, which calibrates; ")
        else:
            assert split_of[again] == split_of[first]
            trained.append(again)
    assert len(manifest.skipped) == 20 - len(trained) > 0

    path = manifest.skipped[0].path
    kept = build(parts, keep=[path])
    assert path in set(kept.frame["path"])


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
