"""Batch scoring on a real Ray with registered detectors: figures, resumption, unreadable images, views, S3."""

import hashlib
import io
import json
import logging

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from sprue.errors import SprueError
from sprue.inference.heatmap import heatmap_png
from sprue.scoring import run
from sprue.scoring.run import score_folder
from sprue.store import location
from sprue.tracking.registry import load_detector

pytestmark = pytest.mark.usefixtures("cluster")


def read(summary):
    """All rows, by the sample's name, as any reader of Parquet sees them."""
    folder = location(summary.scores)
    tables = [pd.read_parquet(io.BytesIO(path.read_bytes()), engine="pyarrow") for path in folder.glob("*.parquet")]
    table = pd.concat(tables).set_index("sample").sort_index()
    assert table.index.is_unique
    return table


def places(tmp_path):
    return location(str(tmp_path / "images")), location(str(tmp_path / "scores"))


def test_figures_are_those_of_the_detector(registry, write_images, tmp_path):
    """To the last digit: batches have the same size and order as those of `Detector.predict`."""
    images, (root, output) = write_images(tmp_path / "images", 20), places(tmp_path)
    registered = registry.find("brick", "champion")
    expected, calibration = registry.predict(registered, images), load_detector(registered).calibration
    summary = score_folder(registered, root, output, heatmaps=True)
    table = read(summary)
    assert list(table.index) == [f"{number:04}.png" for number in range(20)]
    assert table["score"].dtype == np.float32
    np.testing.assert_array_equal(table["score"], expected.score_B)
    np.testing.assert_array_equal(table["p_value"], expected.p_value_B)
    np.testing.assert_array_equal(table["is_anomalous"].astype(bool), expected.is_anomalous_B)
    assert 4 <= expected.is_anomalous_B.sum() < 20
    digests = [hashlib.sha256((tmp_path / "images" / name).read_bytes()).hexdigest() for name in table.index]
    assert list(table["sha256"]) == digests
    constant = {
        "threshold": calibration.threshold, "alpha": 0.2, "dataset": "plant", "class_name": "brick", "version": 2,
        "detector": summary.detector, "error": "",
    }  # fmt: skip
    for column, value in constant.items():
        assert set(table[column]) == {value}
    drawn = {"heatmap", "heatmap_view", "predicted_mask_fraction"}
    assert set(table) == {*constant, *drawn, "sha256", "score", "p_value", "is_anomalous"}
    assert (summary.samples, summary.stored, summary.anomalous) == (20, 0, expected.is_anomalous_B.sum())
    assert (summary.errors, summary.skipped) == ({}, [])
    stored = json.loads((tmp_path / "scores/version-2/summary.json").read_text())
    assert stored["anomalous"] == summary.anomalous and stored["source"] == str(root)
    assert f"plant.brick version 2: 20 samples (0 stored before), 20 scored, {summary.anomalous} anomalous, " in str(
        summary
    )
    check_heat_maps(table, images, expected, calibration, tmp_path / "scores/version-2")

    # The output is of this folder and this class.
    for among in (root, root / "scores"):
        with pytest.raises(SprueError, match=r"is among the images; give a folder outside of .*images"):
            score_folder(registered, root, among)
    write_images(tmp_path / "others", 1)
    with pytest.raises(SprueError, match=r"has the scores that plant\.brick gave the images in .*images; give another"):
        score_folder(registered, location(str(tmp_path / "others")), output)


def check_heat_maps(table, images, predictions, calibration, folder):
    """They are what the service draws, byte for byte."""
    for index, (name, row) in enumerate(table.iterrows()):
        size = (images[index].height, images[index].width)
        png, fraction = heatmap_png(images[index], predictions.anomaly_map(index, size), calibration)
        assert row["heatmap"] == f"heatmaps/{name}.png"
        assert (folder / row["heatmap"]).read_bytes() == png
        assert row["predicted_mask_fraction"] == fraction
    assert table["predicted_mask_fraction"].iloc[0] > 0


class Killed(BaseException):
    """What ends a process at any point does to it."""


def stop_after(monkeypatch, parts):
    """The run ends when it has written some parts."""
    write, count = run.write_part, iter(range(1000))

    def write_part(*arguments):
        if next(count) == parts:
            raise Killed
        write(*arguments)

    monkeypatch.setattr(run, "write_part", write_part)


@pytest.mark.usefixtures("small_parts")
def test_a_run_scores_what_is_missing_or_has_changed(registry, write_images, tmp_path, monkeypatch, caplog):
    images = write_images(tmp_path / "images", 40)
    registered, (root, output) = registry.find("brick"), places(tmp_path)
    whole = read(score_folder(registered, root, location(str(tmp_path / "whole"))))
    assert set(whole["heatmap"]) == {""} and whole["predicted_mask_fraction"].isna().all()
    folder = tmp_path / "scores/version-1/scores"
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Killed):
            score_folder(registered, root, output)
    first = {path: path.stat().st_mtime_ns for path in folder.glob("part-*.parquet")}
    assert len(first) == 3 and not (folder.parent / "summary.json").exists()
    # What a process that is killed while it writes leaves behind.
    (folder / ".part-0.parquet.77").write_bytes(b"half")
    with caplog.at_level(logging.INFO, "sprue"):
        summary = score_folder(registered, root, output)
    assert 0 < summary.stored < 40
    assert f"40 samples, {summary.stored} stored, {40 - summary.stored} to score" in caplog.text
    assert first.items() <= {path: path.stat().st_mtime_ns for path in folder.glob("part-*.parquet")}.items()
    # Also where a run had less to score, the figures are the same to the last digit.
    pd.testing.assert_frame_equal(read(summary), whole)

    again = score_folder(registered, root, output)
    assert (again.stored, again.images_per_second, again.anomalous) == (40, None, summary.anomalous)

    # What has changed is scored again, and nothing else.
    (tmp_path / "images/0003.png").unlink()
    images[11].transpose(Image.Transpose.ROTATE_180).save(tmp_path / "images/0011.png")
    damaged = next(path for path in folder.glob("part-*") if "0030.png" in set(pd.read_parquet(path)["sample"]))
    damaged.write_bytes(b"PAR1")
    with caplog.at_level(logging.INFO, "sprue"):
        changed = score_folder(registered, root, output)
    table = read(changed)
    assert changed.samples == 39 and 15 <= changed.stored < 39
    assert "2 parts are deleted: their images have changed or are gone" in caplog.text
    assert set(whole.index) - set(table.index) == {"0003.png"}
    # A part without one of its images is another batch; see the next test.
    apart = (table["score"] / whole["score"][table.index] - 1).abs()
    assert set(apart.index[apart > 1e-4]) == {"0011.png"}

    other = score_folder(registry.find("brick", "2"), root, output)
    assert other.stored == 0 and set(read(other)["version"]) == {2}
    assert set(read(changed)["version"]) == {1}


def test_an_image_that_can_not_be_read_is_a_row(registry, write_images, tmp_path):
    images, (root, output) = write_images(tmp_path / "images", 3), places(tmp_path)
    (tmp_path / "images/0001.png").write_bytes((tmp_path / "images/0000.png").read_bytes()[:300])
    (tmp_path / "images/empty.jpg").write_bytes(b"")
    (tmp_path / "images/gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "images/notes.txt").write_text("of the night shift")
    summary = score_folder(registry.find("brick"), root, output, heatmaps=True)
    table = read(summary)
    assert list(summary.errors) == ["0001.png", "empty.jpg", "gone.png"]
    assert "0001.png is damaged" in summary.errors["0001.png"]
    assert "empty.jpg is not an image" in summary.errors["empty.jpg"]
    assert summary.errors["gone.png"] == "gone.png can't be read: No such file or directory"
    assert [(each.path, each.reason) for each in summary.skipped] == [("notes.txt", "its suffix is not an image's")]
    failed = table[table["error"] != ""]
    assert dict(failed["error"]) == summary.errors
    assert failed[["score", "p_value", "is_anomalous", "predicted_mask_fraction"]].isna().all(axis=None)
    assert dict(failed["sha256"]) == {
        "0001.png": hashlib.sha256((tmp_path / "images/0001.png").read_bytes()).hexdigest(),
        "empty.jpg": hashlib.sha256(b"").hexdigest(),
        "gone.png": "",
    }
    readable = table.loc[["0000.png", "0002.png"]]
    expected = registry.predict(registry.find("brick"), [images[0], images[2]])
    # In a batch of another size, the flow's sums have another order.
    np.testing.assert_allclose(readable["score"], expected.score_B, rtol=1e-4)

    images[1].save(tmp_path / "nowhere.png")  # the link's state does not change, as that of a file that was locked
    (tmp_path / "images/0002.png").unlink()
    again = score_folder(registry.find("brick"), root, output, heatmaps=True)
    assert list(again.errors) == ["0001.png", "empty.jpg"]
    drawn = {path.name for path in (tmp_path / "scores/version-1/heatmaps").iterdir()}
    assert drawn == {"0000.png.png", "gone.png.png"}


def test_a_sample_of_two_views_is_a_folder(registry, write_images, as_samples, tmp_path):
    samples = [as_samples(image) for image in write_images(tmp_path / "unused", 9)]
    for number, sample in enumerate(samples):
        (tmp_path / "images/lot" / str(number)).mkdir(parents=True)
        for view, image in zip(("0-top", "1-left"), sample, strict=True):
            image.save(tmp_path / "images/lot" / str(number) / f"{view}.png")
    (tmp_path / "images/lot/8/1-left.png").unlink()
    samples[0][0].save(tmp_path / "images/lot/0/0-top.webp")
    samples[0][0].save(tmp_path / "images/lot/0/2-right.png")
    samples[0][0].save(tmp_path / "images/0-top.png")
    (root, output), registered = places(tmp_path), registry.find("box")
    summary = score_folder(registered, root, output, heatmaps=True)
    table, expected = read(summary), registry.predict(registered, samples)
    assert list(table.index) == [f"lot/{number}" for number in range(9)]
    assert {each.path: each.reason for each in summary.skipped} == {
        "0-top.png": "not in a sample's folder",
        "lot/0/0-top.webp": "lot/0/0-top.png is already the view of this name",
        "lot/0/2-right.png": "not a view of the class",
    }
    assert summary.errors == {"lot/8": "there is no image of view 1-left"}
    complete = table[:8]
    np.testing.assert_array_equal(complete["score"], expected.score_B[:8])
    scores = complete[["score_0-top", "score_1-left"]]
    np.testing.assert_array_equal(scores, expected.image_score_BV[:8])
    assert table.loc["lot/3", "path_1-left"] == "lot/3/1-left.png" and table.loc["lot/8", "path_1-left"] == ""
    left = (tmp_path / "images/lot/3/1-left.png").read_bytes()
    assert table.loc["lot/3", "sha256_1-left"] == hashlib.sha256(left).hexdigest()
    shown = [("0-top", "1-left")[view] for view in expected.image_score_BV[:8].argmax(1)]
    assert list(complete["heatmap_view"]) == shown
    assert (tmp_path / "scores/version-1/heatmaps/lot/3.png").is_file()


def test_images_and_scores_in_an_object_store(registry, write_images, s3_bucket, tmp_path):
    images = write_images(tmp_path, 3)
    root, output = location(f"s3://{s3_bucket}/incoming/today"), location(f"s3://{s3_bucket}/scores")
    names = ["lot 1/a#1.png", "lot 1/b%20?.png", "c.png"]
    for number, name in enumerate(names):
        root.fs.pipe_file(f"{root.path}/{name}", (tmp_path / f"{number:04}.png").read_bytes())
    root.fs.pipe_file(f"{s3_bucket}/incoming/today2/other.png", b"of another folder")
    registered = registry.find("brick")
    summary = score_folder(registered, root, output, heatmaps=True)
    table = read(summary)
    assert list(table.index) == sorted(names, key=lambda name: [*name])
    expected = registry.predict(registered, [images[names.index(name)] for name in table.index])
    np.testing.assert_array_equal(table["score"], expected.score_B)
    stored = set(output.fs.find(f"{output.path}/version-1/heatmaps"))
    assert stored == {f"{output.path}/version-1/heatmaps/{name}.png" for name in names}

    assert score_folder(registered, root, output, heatmaps=True).stored == 3


def test_nothing_to_score_is_a_mistake(registry, tmp_path):
    root, output = places(tmp_path)
    with pytest.raises(SprueError, match=r"images is not a folder: give one that holds the images to score"):
        score_folder(registry.find("brick"), root, output)
    (tmp_path / "images/hidden").mkdir(parents=True)
    with pytest.raises(SprueError, match=r"images holds nothing to score: put an image there"):
        score_folder(registry.find("brick"), root, output)
    (tmp_path / "images/.a.png").write_bytes(b"")
    with pytest.raises(SprueError, match=r"with a file for each view in it: 0-top, 1-left; skipped: \.a\.png \(hidden"):
        score_folder(registry.find("box"), root, output)
    assert not (tmp_path / "scores").exists()
