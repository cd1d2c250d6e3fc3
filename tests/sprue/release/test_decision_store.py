"""Decisions and images are found again, on a disk and in an object store, and deleted by the day."""

import hashlib
import os
import re
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, date, datetime
from pathlib import Path

import pandas as pd
import pytest

from sprue.errors import SprueError
from sprue.release.decision_store import Decision, DecisionStore, image_digests, rows_of
from sprue.store import location

DAY = date(2026, 3, 9)
IMAGES = (b"top view", b"left view")
DECISION = Decision(
    request_id="line-7:0001",
    at=datetime(2026, 3, 9, 8, 30, 0, 125, tzinfo=UTC),
    station="line-7",
    dataset="parcels",
    class_name="gräs 2",
    version=3,
    files=("detector.json:ab", "flow.safetensors:cd"),
    engine="openvino",
    score=0.1 + 0.2,
    p_value=1 / 21,
    alpha=0.05,
    threshold=0.3,
    is_anomalous=True,
    latency_s=0.05,
    batch=3,
    images=image_digests(IMAGES),
    kept="alarm",
)


@pytest.fixture(params=["disk", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> DecisionStore:
    if request.param == "disk":
        return DecisionStore(location(str(tmp_path / "decisions")))
    return DecisionStore(location(f"s3://{request.getfixturevalue('s3_bucket')}/decisions"))


def test_a_decision_and_its_images_are_found_as_they_were(store: DecisionStore) -> None:
    other = replace(DECISION, request_id="other", kept="")
    again = replace(DECISION, at=DECISION.at.replace(hour=9), score=0.5)
    store.write_part(DAY, "a", rows_of([DECISION]))
    store.write_part(DAY, "a", rows_of([again, other, DECISION]))  # a part that has grown
    for digest, image in zip(DECISION.images, IMAGES, strict=True):
        store.write_image(DECISION.at, digest, image)
        store.write_image(DECISION.at, digest, b"not written over it")
    assert store.find("line-7:0001") == [DECISION, again]
    assert tuple(store.read_images(DECISION)) == IMAGES
    with pytest.raises(SprueError, match="has no decision 'line-8'"):
        store.find("line-8")
    with pytest.raises(SprueError, match="the images of other were not kept"):
        store.read_images(other)


def test_the_last_day_is_searched_first(store: DecisionStore) -> None:
    with pytest.raises(SprueError, match="has no decision"):
        store.find("line-7:0001")
    later = replace(DECISION, at=DECISION.at.replace(day=10))
    store.write_part(DAY, "a", rows_of([DECISION]))
    store.write_part(later.at.date(), "a", rows_of([later]))
    assert store.find("line-7:0001") == [later]


def test_days_are_deleted_when_they_are_old_and_images_when_space_is_short(store: DecisionStore) -> None:
    times = [datetime(2026, 3, day, hour, tzinfo=UTC) for day in range(1, 6) for hour in (9, 17)]
    for at in times:
        store.write_part(at.date(), f"{at:%H}", rows_of([DECISION]))
        store.write_image(at, "0" * 64, bytes(1000))
    (store.folder / "rows" / "notes").mkdir(parents=True, exist_ok=True)

    def left(kind: str) -> list[str]:
        found = [path.as_posix() for path in (store.folder / kind).rglob("*") if path.is_file()]
        return sorted({re.search(r"date=2026-03-0(\d.*)/", path)[1].replace("/hour=", " ") for path in found})

    assert left("images") == ["1 09", "1 17", "2 09", "2 17", "3 09", "3 17", "4 09", "4 17", "5 09", "5 17"]
    store.delete_old(times[-1].date(), keep_days=2, image_bytes=10**6)
    assert left("rows") == ["3", "4", "5"] and left("images") == ["3 09", "3 17", "4 09", "4 17", "5 09", "5 17"]
    store.delete_old(times[-1].date(), keep_days=2, image_bytes=3500)
    assert left("rows") == ["3", "4", "5"] and left("images") == ["4 17", "5 09", "5 17"]
    store.delete_old(times[-1].date(), keep_days=2, image_bytes=0)
    assert left("rows") == ["3", "4", "5"] and left("images") == []
    with pytest.raises(SprueError, match="is gone: images are deleted after some days"):
        store.read_images(DECISION)


def test_of_an_hour_that_takes_more_than_all_may_the_newest_images_stay(store: DecisionStore) -> None:
    names = [f"{9 - number}" * 64 for number in range(5)]  # their order is not that of their age
    for number, name in enumerate(names):
        store.write_image(DECISION.at, name, bytes(1000))
        path = store.folder / "images" / "date=2026-03-09" / "hour=08" / name
        if path.protocol in ("", "file"):
            os.utime(path.path, (number, number))
        else:
            time.sleep(1.1)  # an object store counts seconds
    store.delete_old(DAY, keep_days=2, image_bytes=2500)
    assert {path.name for path in (store.folder / "images").rglob("*") if path.is_file()} == set(names[-2:])


def test_other_tools_read_the_rows(tmp_path: Path) -> None:
    store = DecisionStore(location(str(tmp_path)))
    store.write_part(DAY, "a", rows_of([DECISION, replace(DECISION, request_id="b", is_anomalous=False, kept="")]))
    store.write_part(date(2026, 3, 10), "b", rows_of([replace(DECISION, request_id="c")]))
    frame = pd.read_parquet(tmp_path / "rows")
    assert frame["request_id"].tolist() == ["line-7:0001", "b", "c"]
    assert frame["date"].astype(str).tolist() == ["2026-03-09", "2026-03-09", "2026-03-10"]
    assert frame["at"].iloc[0] == DECISION.at and frame["score"].iloc[0] == DECISION.score
    assert tuple(frame["images"].iloc[0]) == DECISION.images
    assert not list(tmp_path.rglob(".*")), "no temporary file is left"


@pytest.mark.parametrize(
    ("damage", "words"),
    [(lambda data: data[:-20], "is no part of the decisions"), (lambda data: b"", "is no part of the decisions")],
)
def test_a_damaged_part_is_named(tmp_path: Path, damage: Callable[[bytes], bytes], words: str) -> None:
    store = DecisionStore(location(str(tmp_path)))
    store.write_part(DAY, "a", rows_of([DECISION]))
    part = tmp_path / "rows" / "date=2026-03-09" / "a.parquet"
    part.write_bytes(damage(part.read_bytes()))
    with pytest.raises(SprueError, match=rf"a\.parquet {words}"):
        store.find("line-7:0001")


def test_an_image_that_was_altered_is_not_replayed(tmp_path: Path) -> None:
    store = DecisionStore(location(str(tmp_path)))
    one = replace(DECISION, images=DECISION.images[:1])
    store.write_image(DECISION.at, one.images[0], b"another image")
    assert hashlib.sha256(b"another image").hexdigest() != one.images[0]
    with pytest.raises(SprueError, match="is not the image that was scored"):
        store.read_images(one)
