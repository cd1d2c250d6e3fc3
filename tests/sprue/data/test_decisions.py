"""A decision that names no image is a mistake that is reported with the path."""

import pytest

from sprue.config import CalibrationSettings, ManifestSettings
from sprue.data.build import build_manifest
from sprue.data.decisions import without_dropped
from sprue.data.layouts import LAYOUTS
from sprue.errors import SprueError


def test_wrong_paths_are_named_with_their_setting(bottles):
    settings = ManifestSettings(keep=["bottle/train/good/000.jpg"], drop=["/data/x.png", "bottle/train/good/001.png"])
    with pytest.raises(SprueError) as caught:
        build_manifest(bottles.upath, "bottles", settings, CalibrationSettings())
    keep, drop = str(caught.value).splitlines()
    assert keep.startswith("manifest.keep: 'bottle/train/good/000.jpg' is no image of the dataset; give paths relative")
    assert drop.startswith("manifest.drop: '/data/x.png' is no image of the dataset")


def test_dropping_a_view_drops_its_sample(boxes):
    path = "box/train/good/003/left.png"
    settings = ManifestSettings(layout="mvtec-views", drop=[path])
    records, _ = LAYOUTS["mvtec-views"].read(boxes.upath)
    kept, dropped = without_dropped(records, settings)
    assert {record.path for record in records} - {record.path for record in kept} == {path}
    assert [(entry.path, entry.reason) for entry in dropped] == [(path, "dropped by manifest.drop")]
    manifest = build_manifest(boxes.upath, "boxes", settings, CalibrationSettings(alpha=0.2))
    reasons = {entry.path: entry.reason for entry in manifest.skipped}
    assert reasons == {
        path: "dropped by manifest.drop",
        "box/train/good/003": "the sample has no usable image of view left",
    }


def test_an_image_is_kept_or_dropped():
    with pytest.raises(ValueError, match=r"a\.png, b\.png is in keep too; remove it from one of the two"):
        ManifestSettings(keep=["b.png", "a.png", "c.png"], drop=["a.png", "b.png"])
