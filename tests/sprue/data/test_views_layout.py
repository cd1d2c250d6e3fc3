"""Datasets of several views: samples are complete, stay together, and are read in one order."""

import shutil
from collections import Counter

import pytest
from PIL import Image
from upath import UPath

from sprue.config import CalibrationSettings, ManifestSettings
from sprue.data.build import build_manifest
from sprue.data.layouts import LAYOUTS, SkippedFile
from sprue.data.manifest import Manifest
from sprue.data.samples import samples_of, views_of
from sprue.errors import SprueError

VIEWS = ("front", "left", "top")


def build(folder, **settings):
    of_views = ManifestSettings(layout="mvtec-views", **settings)
    return build_manifest(folder.upath, "boxes", of_views, CalibrationSettings())


def test_rows_hold_an_images_sample_view_and_mask(boxes):
    manifest = build(boxes)
    test = manifest.select("box", "test")
    assert list(test[["sample_id", "view", "label", "mask_path"]].itertuples(index=False, name=None)) == [
        ("box/test/dent/a", "front", 1, ""),
        ("box/test/dent/a", "left", 1, "box/ground_truth/dent/a/left_mask.png"),
        ("box/test/dent/a", "top", 1, "box/ground_truth/dent/a/top.png"),
        *(("box/test/dent/b", view, 1, "") for view in VIEWS),
        *(("box/test/good/a", view, 0, "") for view in VIEWS),
    ]
    assert (test["path"] == test["sample_id"] + "/" + test["view"] + ".png").all()
    assert manifest.skipped == ()
    assert views_of(test) == VIEWS
    assert samples_of(test)[1] == tuple(test["sha256"][3:6])


def test_the_images_of_a_sample_share_a_split_which_depends_on_their_content(boxes):
    frame = build(boxes).frame
    trained = frame[frame["split"] != "test"]
    assert (trained.groupby("sample_id")["split"].nunique() == 1).all()
    # 19 samples are needed to calibrate at alpha 0.05.
    assert Counter(trained["split"]) == {"calibration": 3 * 19, "validation": 3 * 6, "train": 3 * 15}
    (boxes.root / "box/train/good/000").rename(boxes.root / "box/train/good/zzz")
    renamed = build(boxes).frame
    before, after = (dict(zip(rows["sha256"], rows["split"], strict=True)) for rows in (frame, renamed))
    assert before == after
    assert before != dict(zip(frame["sha256"], build(boxes, seed=1).frame["split"], strict=True))


def test_the_views_of_a_sample_stay_in_one_order_whatever_their_files_are_called(boxes):
    for number in range(40):
        folder = boxes.root / f"box/train/good/{number:03d}"
        # "left-2.png" comes before "left.png", and "left.bmp" before both; names are compared without suffix.
        (folder / "top.png").rename(folder / "left-2.png")
        if number % 2:
            Image.open(folder / "left.png").save(folder / "left.bmp")
            (folder / "left.png").unlink()
    for sample in ("good/a", "dent/a", "dent/b"):
        folder = boxes.root / f"box/test/{sample}"
        (folder / "top.png").rename(folder / "left-2.png")
    (boxes.root / "box/ground_truth/dent/a/top.png").unlink()
    manifest = build(boxes)
    for split in ("train", "test"):
        rows = manifest.select("box", split)
        assert views_of(rows) == ("front", "left", "left-2")
        for sample, (_, images) in zip(samples_of(rows), rows.groupby("sample_id", sort=False), strict=True):
            assert sample == tuple(images.set_index("view").loc[["front", "left", "left-2"], "sha256"])


def test_a_sample_that_lacks_a_view_is_skipped_with_the_reason(boxes):
    boxes.raw("box/train/good/000/left.png", b"")
    (boxes.root / "box/train/good/001/front.png").unlink()
    (boxes.root / "box/train/good/001/top.png").unlink()
    boxes.image("box/train/good/003/stray.png", 5000)
    boxes.raw("box/train/good/004/notes.txt", b"hello")
    boxes.image("box/train/good/005/left.bmp", 5001)
    boxes.image("box/train/good/loose.png", 5002)
    boxes.raw("box/train/good/.cache", b"x")
    boxes.image("box/train/good/006/deep/left.png", 5003)
    manifest = build(boxes)
    found = {entry.path: entry.reason for entry in manifest.skipped}
    assert found.pop("box/train/good/004/notes.txt").startswith("the file is not an image")
    assert found == {
        "box/train/good/.cache": "hidden",
        "box/train/good/000": "the sample has no usable image of view left",
        "box/train/good/000/left.png": "zero bytes",
        "box/train/good/001": "the sample has no usable image of view front, top",
        "box/train/good/003/stray.png": "a view that most samples of its class do not have",
        "box/train/good/005/left.png": "box/train/good/005/left.bmp is already the view of this name",
        "box/train/good/006/deep": "a folder among the images",
        "box/train/good/loose.png": "a file among the samples' folders",
    }
    assert (manifest.frame.groupby("sample_id")["view"].agg(tuple) == VIEWS).all()
    samples = set(manifest.frame["sample_id"])
    assert {f"box/train/good/{number:03d}" for number in range(2, 40)} == {
        sample for sample in samples if "/train/" in sample
    }


def test_a_sample_is_identical_to_a_test_sample_only_in_all_views(boxes):
    for sample in sorted((boxes.root / "box").glob("t*/*/*")):
        boxes.put(f"{sample.relative_to(boxes.root)}/left.png", Image.new("L", (20, 16)))
    assert build(boxes).skipped == ()
    shutil.copytree(boxes.root / "box/test/good/a", boxes.root / "box/train/good/again")
    assert build(boxes).skipped == (
        SkippedFile("box/train/good/again", "identical to the test image box/test/good/a/front.png"),
    )


def test_a_sample_with_a_damaged_mask_has_no_ground_truth(boxes):
    boxes.raw("box/ground_truth/dent/a/top.png", b"")
    boxes.mask("box/ground_truth/dent/c/top_mask.png")
    boxes.mask("box/ground_truth/dent/flat_mask.png")
    manifest = build(boxes)
    assert set(manifest.frame["mask_path"]) == {""}
    assert set(manifest.skipped) == {
        SkippedFile("box/ground_truth/dent/a/top.png", "zero bytes"),
        SkippedFile("box/ground_truth/dent/c/top_mask.png", "ground truth without a test image of its name"),
        SkippedFile("box/ground_truth/dent/flat_mask.png", "a file among the samples' folders"),
    }


def test_a_dataset_of_the_other_layout_is_refused(boxes, bottles):
    # Both classes are in one folder.
    for layout, refused, what in (("mvtec-views", "bottle", "samples"), ("mvtec", "box", "images")):
        other = "mvtec" if layout == "mvtec-views" else "mvtec-views"
        (name, reason), *others = LAYOUTS[layout].empty_classes(boxes.upath).items()
        assert name == refused and not others
        assert f"class '{name}' has no {what} in {name}/train/good: " in reason
        assert f"layout to {other} if" in reason
        assert {record.class_name for record in LAYOUTS[layout].read(boxes.upath)[0]} == {"box", "bottle"} - {refused}
    shutil.rmtree(boxes.root / "box")
    with pytest.raises(SprueError, match=r"no samples in train/good of class bottle under .*layout to mvtec if"):
        LAYOUTS["mvtec-views"].read(bottles.upath)


def test_images_that_are_named_by_their_sample_are_no_views(boxes):
    for image in sorted((boxes.root / "box").rglob("t*/*/*/*.png")):
        image.rename(image.with_name(f"{image.parent.name}_{image.name}"))
    with pytest.raises(SprueError, match=r"class 'box': no view is found in half of its 43 samples: give the images"):
        build(boxes)


def test_too_few_samples_are_counted_as_samples(boxes):
    for number in range(11, 22):
        boxes.raw(f"box/train/good/{number:03d}/left.png", b"")
    for number in range(22, 40):
        shutil.rmtree(boxes.root / f"box/train/good/{number:03d}")
    match = r"'box' has 11 good training samples, but at least 12 distinct.*, and 28 for alpha=0.05\. Add good samples"
    with pytest.raises(SprueError, match=match):
        build(boxes)


def test_a_manifest_of_views_reads_back_the_same(boxes, tmp_path):
    manifest = build(boxes)
    manifest.write(UPath(tmp_path / "manifest.parquet"))
    assert Manifest.read(UPath(tmp_path / "manifest.parquet")).frame.equals(manifest.frame)
