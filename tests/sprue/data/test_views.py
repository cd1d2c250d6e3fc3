"""Datasets of several views: samples are whole, stay together, and are read in one order."""

from collections import Counter

import pytest
from PIL import Image
from upath import UPath

from sprue.data.layouts import LAYOUTS, LeftOut
from sprue.data.manifest import Manifest, build_manifest
from sprue.data.samples import samples_of, views_of
from sprue.data.splits import SplitConfig
from sprue.errors import SprueError

VIEWS = ("front", "left", "top")


def build(folder, **splits):
    return build_manifest(folder.upath, "boxes", SplitConfig(**splits), alpha=0.05, layout="mvtec-views")


def test_rows_say_which_sample_and_view_a_picture_is_and_where_it_has_a_mask(boxes):
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
    assert manifest.left_out == ()
    assert views_of(test) == VIEWS
    assert samples_of(test)[1] == tuple(test["sha256"][3:6])


def test_samples_are_divided_whole_and_by_their_content(boxes):
    frame = build(boxes).frame
    trained = frame[frame["split"] != "test"]
    assert (trained.groupby("sample_id")["split"].nunique() == 1).all()
    # 19 samples are needed to calibrate at alpha 0.05.
    assert Counter(trained["split"]) == {"calibration": 3 * 19, "validation": 3 * 2, "train": 3 * 19}
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
        for sample, (_, pictures) in zip(samples_of(rows), rows.groupby("sample_id", sort=False), strict=True):
            assert sample == tuple(pictures.set_index("view").loc[["front", "left", "left-2"], "sha256"])


def test_a_sample_that_lacks_a_view_is_left_out_with_the_reason(boxes):
    boxes.raw("box/train/good/000/left.png", b"")
    (boxes.root / "box/train/good/001/front.png").unlink()
    (boxes.root / "box/train/good/001/top.png").unlink()
    tested = (boxes.root / "box/test/good/a/top.png").read_bytes()
    boxes.raw("box/train/good/002/top.png", tested)
    boxes.picture("box/train/good/003/stray.png", 5000)
    boxes.raw("box/train/good/004/notes.txt", b"hello")
    boxes.picture("box/train/good/005/left.bmp", 5001)
    boxes.picture("box/train/good/loose.png", 5002)
    boxes.raw("box/train/good/.cache", b"x")
    boxes.picture("box/train/good/006/deep/left.png", 5003)
    manifest = build(boxes)
    found = {entry.path: entry.reason for entry in manifest.left_out}
    assert found.pop("box/train/good/004/notes.txt").startswith("the file is not a picture")
    assert found == {
        "box/train/good/.cache": "hidden",
        "box/train/good/000": "the sample has no usable picture of view left",
        "box/train/good/000/left.png": "zero bytes",
        "box/train/good/001": "the sample has no usable picture of view front, top",
        "box/train/good/002": "the sample has no usable picture of view top",
        "box/train/good/002/top.png": "identical to the test picture box/test/good/a/top.png",
        "box/train/good/003/stray.png": "a view that most samples of its class do not have",
        "box/train/good/005/left.png": "box/train/good/005/left.bmp is the view of this name already",
        "box/train/good/006/deep": "a folder among the pictures",
        "box/train/good/loose.png": "a file among the samples' folders",
    }
    assert (manifest.frame.groupby("sample_id")["view"].agg(tuple) == VIEWS).all()
    samples = set(manifest.frame["sample_id"])
    assert {f"box/train/good/{number:03d}" for number in range(3, 40)} == {
        sample for sample in samples if "/train/" in sample
    }


def test_a_damaged_mask_takes_the_ground_truth_of_its_whole_sample(boxes):
    boxes.raw("box/ground_truth/dent/a/top.png", b"")
    boxes.mask("box/ground_truth/dent/c/top_mask.png")
    boxes.mask("box/ground_truth/dent/flat_mask.png")
    manifest = build(boxes)
    assert set(manifest.frame["mask_path"]) == {""}
    assert set(manifest.left_out) == {
        LeftOut("box/ground_truth/dent/a/top.png", "zero bytes"),
        LeftOut("box/ground_truth/dent/c/top_mask.png", "ground truth without a test picture of its name"),
        LeftOut("box/ground_truth/dent/flat_mask.png", "a file among the samples' folders"),
    }


def test_what_can_not_be_read_says_what_to_do(boxes, bottles):
    with pytest.raises(SprueError, match=r"No samples in train/good of class bottle under .*layout to mvtec if"):
        LAYOUTS["mvtec-views"].read(bottles.upath)
    with pytest.raises(SprueError, match=r"No pictures in train/good of class box under .*layout to mvtec-views if"):
        LAYOUTS["mvtec"].read(boxes.upath)


def test_pictures_that_are_named_by_their_sample_are_no_views(boxes):
    for picture in sorted((boxes.root / "box").rglob("t*/*/*/*.png")):
        picture.rename(picture.with_name(f"{picture.parent.name}_{picture.name}"))
    with pytest.raises(SprueError, match=r"class 'box': no view is found in half of its 43 samples: give the pictures"):
        build(boxes)


def test_too_few_samples_are_counted_as_samples(boxes):
    for number in range(20, 40):
        boxes.raw(f"box/train/good/{number:03d}/left.png", b"")
    with pytest.raises(SprueError, match=r"'box' has 20 good training samples, but 28 distinct.*Add good samples"):
        build(boxes)


def test_a_manifest_of_views_reads_back_the_same(boxes, tmp_path):
    manifest = build(boxes)
    manifest.write(UPath(tmp_path / "manifest.parquet"))
    assert Manifest.read(UPath(tmp_path / "manifest.parquet")).frame.equals(manifest.frame)
