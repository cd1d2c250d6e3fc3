"""Verdicts are kept with their images, and exported as labelled samples."""

import csv
import io
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sprue.data.labelled import read_labelled
from sprue.errors import SprueError
from sprue.release.decision_store import Decision, DecisionStore, image_digests, rows_of
from sprue.release.reviews import Review, ReviewStore, Verdict, export, mask_digests, read_review
from sprue.store import location

AT = datetime(2026, 3, 9, 8, 30, 0, 125, tzinfo=UTC)
VIEWS = ("0-top", "1-left")


def png(value: int, size: tuple[int, int] = (9, 6)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(buffer, "PNG")
    return buffer.getvalue()


class Plant:
    """Decisions and reviews in one folder."""

    def __init__(self, folder: str) -> None:
        self.decisions, self.reviews = DecisionStore(location(folder)), ReviewStore(location(folder))
        self.count = 0

    def decide(self, *images: bytes) -> Decision:
        self.count += 1
        decision = Decision(
            request_id="the same",
            at=AT + timedelta(minutes=self.count),
            station="line-7",
            dataset="parcels",
            class_name="gräs 2",
            version=3,
            files=("detector.json:ab",),
            engine="openvino",
            score=0.4,
            p_value=1 / 21,
            alpha=0.05,
            threshold=0.3,
            is_anomalous=True,
            latency_s=0.05,
            batch=3,
            images=image_digests(images),
            kept="alarm",
        )
        for digest, image in zip(decision.images, images, strict=True):
            self.decisions.write_image(decision.at, digest, image)
        self.decisions.write_part(decision.at.date(), str(self.count), rows_of([decision]))
        return decision

    def review(self, decision: Decision, verdict: Verdict, hours: int = 1, masks: tuple[bytes, ...] = ()) -> Review:
        views = VIEWS if len(decision.images) == 2 else ("",)
        masks = masks or (b"",) * len(views)
        digests = mask_digests(masks, self.decisions.read_images(decision))
        review = Review(decision, verdict, "anna", AT + timedelta(hours=hours), views, digests)
        self.reviews.add(review, masks)
        return review


@pytest.fixture(params=["disk", "s3"])
def plant(request: pytest.FixtureRequest, tmp_path: Path) -> Plant:
    if request.param == "disk":
        return Plant(str(tmp_path / "decisions"))
    return Plant(f"s3://{request.getfixturevalue('s3_bucket')}/decisions")


@pytest.fixture
def local(tmp_path: Path) -> Plant:
    return Plant(str(tmp_path / "decisions"))


def test_a_later_verdict_replaces_an_earlier_one_and_both_stay(plant: Plant) -> None:
    first, second = plant.decide(png(1)), plant.decide(png(2))
    earlier = plant.review(first, "unsure")
    later = plant.review(first, "defective", hours=2, masks=(png(255),))
    found = plant.reviews.reviewed(AT.date())
    assert set(found) == {first.key} and second.key != first.key
    assert read_review(found[first.key]) == later
    folder = plant.reviews.folder / "reviews" / f"date={AT.date()}"
    assert sorted((read_review(path) for path in folder.glob("*.json")), key=lambda each: each.at) == [earlier, later]
    assert plant.reviews.latest("parcels.gräs 2") == [later] and plant.reviews.latest("parcels.brick") == []
    assert plant.reviews.reviewed(AT.date() + timedelta(days=1)) == {}


def test_decisions_are_listed_from_the_newest(plant: Plant) -> None:
    first, second = plant.decide(png(1)), plant.decide(png(2))
    quiet = replace(first, kept="", at=AT + timedelta(days=1), is_anomalous=False)
    plant.decisions.write_part(quiet.at.date(), "quiet", rows_of([quiet, replace(quiet, class_name="other")]))
    assert list(plant.decisions.newest("parcels.gräs 2", 10)) == [quiet, second, first]
    assert list(plant.decisions.newest("parcels.gräs 2", 1)) == [quiet, second]  # one of each day
    assert list(plant.decisions.newest("parcels.gräs 2", 1, ("alarm", "near"))) == [second, first]
    assert plant.decisions.get(first.at, first.key) == first
    with pytest.raises(SprueError, match=f"has no decision {second.key}"):
        plant.decisions.get(first.at, second.key)


def test_reviewed_images_outlive_the_decisions_own(plant: Plant, tmp_path: Path) -> None:
    image = png(7)
    plant.review(plant.decide(image), "good")
    plant.decisions.delete_old(AT.date() + timedelta(days=400), keep_days=90, image_bytes=0)
    assert export(plant.reviews, "parcels.gräs 2", tmp_path / "good", "training") == {"good": 1}
    (path,) = (tmp_path / "good").iterdir()
    assert path.suffix == ".png" and path.read_bytes() == image


def test_a_promotion_set_is_read_as_labelled_samples(local: Plant, tmp_path: Path) -> None:
    good, bad = (png(10), png(11)), (png(20), png(21))
    local.review(local.decide(*good), "good")
    mask = png(255)
    local.review(local.decide(*bad), "defective", masks=(b"", mask))
    local.review(local.decide(png(30), png(31)), "unsure")
    local.review(local.decide(*bad), "defective", hours=3, masks=(b"", mask))  # scored a second time
    folder = tmp_path / "set"
    assert export(local.reviews, "parcels.gräs 2", folder, "promotion") == {"good": 1, "defective": 1}
    samples = read_labelled(folder, VIEWS)
    values = {each.defect_type: [int(np.asarray(image).max()) for image in each.read()] for each in samples}
    assert values == {"good": [10, 11], "defective": [20, 21]}
    (sample,) = (folder / "defective").iterdir()
    (written,) = (folder / ".masks" / "defective").rglob("*.png")
    assert written.read_bytes() == mask and written.parent.name == sample.name and written.name == "1-left_mask.png"
    rows = list(csv.DictReader((folder / "reviews.csv").open()))
    assert [(row["verdict"], row["reviewer"], row["station"]) for row in rows] == [
        ("good", "anna", "line-7"),
        ("defective", "anna", "line-7"),
    ]
    with pytest.raises(SprueError, match="is not empty"):
        export(local.reviews, "parcels.gräs 2", folder, "promotion")


def test_training_images_are_added_to_a_folder_once(local: Plant, tmp_path: Path) -> None:
    (tmp_path / "own.png").write_bytes(png(1))
    local.review(local.decide(png(10)), "good")
    local.review(local.decide(png(20)), "defective")
    for _ in range(2):
        assert export(local.reviews, "parcels.gräs 2", tmp_path / "good", "training") == {"good": 1}
    assert len(list((tmp_path / "good").iterdir())) == 1


@pytest.mark.parametrize("views", [1, 2])
def test_a_training_image_that_is_found_defective_is_deleted(local: Plant, tmp_path: Path, views: int) -> None:
    folder = tmp_path / "good"
    folder.mkdir()
    (folder / "own.png").write_bytes(png(1))
    decision, other = local.decide(*(png(10 + view) for view in range(views))), local.decide(png(30))
    local.review(decision, "good")
    local.review(other, "good")
    assert export(local.reviews, "parcels.gräs 2", folder, "training") == {"good": 2}
    local.review(decision, "defective", hours=1)
    assert export(local.reviews, "parcels.gräs 2", folder, "training") == {"good": 1, "deleted": 1}
    assert len(list(folder.iterdir())) == 2 and (folder / "own.png").exists()
    local.review(other, "unsure", hours=1)
    assert export(local.reviews, "parcels.gräs 2", folder, "training") == {"good": 0, "deleted": 1}
    assert [path.name for path in folder.iterdir()] == ["own.png"]


def test_what_can_not_be_kept_or_exported_is_refused(local: Plant, tmp_path: Path) -> None:
    with pytest.raises(SprueError, match=r"parcels\.gräs 2 has no reviewed sample"):
        export(local.reviews, "parcels.gräs 2", tmp_path / "set", "promotion")
    decision = local.decide(png(1))
    for mask in (png(255, size=(6, 9)), b"no image"):
        with pytest.raises(SprueError, match=r"mask|no image"):
            local.review(decision, "defective", masks=(mask,))
    assert local.reviews.reviewed(AT.date()) == {}
    local.review(decision, "good")
    local.reviews._file(decision.images[0]).write_bytes(b"other")
    with pytest.raises(SprueError, match="is gone or damaged"):
        export(local.reviews, "parcels.gräs 2", tmp_path / "set", "promotion")


def test_a_damaged_review_is_named(local: Plant) -> None:
    local.review(local.decide(png(1)), "good")
    (path,) = local.reviews.reviewed(AT.date()).values()
    for content, message in (
        (b"{", "is no review"),
        (b'{"format": 2}', "by a newer sprue: review of format 2"),
    ):
        path.write_bytes(content)
        with pytest.raises(SprueError, match=message):
            read_review(path)
