"""Decisions reach the store behind the requests' backs; where it is down they wait, and the oldest are dropped."""

import fnmatch
import hashlib
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pandas as pd
import pytest
from s3fs import S3FileSystem

from sprue.release.decision_store import Decision, DecisionStore, image_digests, rows_of
from sprue.serving import decision_log
from sprue.serving.decision_log import DecisionLog, DecisionLogSettings, why_kept
from sprue.store import location

NOW = datetime.now(UTC)
IMAGE = b"an image"
DECISION = Decision(
    request_id="a",
    at=NOW,
    station="line-7",
    dataset="textures",
    class_name="brick",
    version=1,
    files=("flow.safetensors:ab",),
    engine="openvino",
    score=1.0,
    p_value=0.5,
    alpha=0.05,
    threshold=2.0,
    is_anomalous=False,
    latency_s=0.05,
    batch=1,
    images=image_digests([IMAGE]),
)
ALARM = replace(DECISION, p_value=0.01, is_anomalous=True)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"FLUSH_S": 0.05, "MAX_ROWS": 50, "BATCH_ROWS": 8, "PART_ROWS": 20}.items():
        monkeypatch.setattr(decision_log, name, value)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "decisions"
    (tmp_path / "decisions").chmod(0o700)


def rows(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(folder / "rows").sort_values("at")


def names(folder: Path, pattern: str) -> list[str]:
    """The files below a folder; unlike `Path.rglob`, `os.walk` takes folders that are deleted meanwhile."""
    return [name for _, _, files in os.walk(folder) for name in fnmatch.filter(files, pattern)]


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    pytest.fail("30 s have passed")


def test_rows_arrive_in_a_few_parts_and_the_last_on_closing(folder: Path) -> None:
    log = DecisionLog(DecisionLogSettings(str(folder), sample=0))
    for number in range(45):
        log.add(replace(DECISION, request_id=str(number), at=NOW + timedelta(microseconds=number)), [IMAGE])
    wait_for(lambda: not log.waiting)
    log.add(replace(DECISION, request_id="last", at=NOW + timedelta(seconds=1)), [IMAGE])
    log.close(10)
    assert rows(folder)["request_id"].tolist() == [*map(str, range(45)), "last"]
    assert len(names(folder, "*.parquet")) <= 3
    assert log.dropped_rows == log.dropped_images == 0
    assert not (folder / "images").exists()


def test_each_day_has_its_own_parts(folder: Path) -> None:
    log = DecisionLog(DecisionLogSettings(str(folder)))
    before = NOW - timedelta(days=1)
    for each in (replace(ALARM, at=before), ALARM, replace(ALARM, at=before)):
        log.add(each, [IMAGE])
    log.close(10)
    assert rows(folder)["date"].astype(str).tolist() == [str(before.date())] * 2 + [str(NOW.date())]
    for day in (before, NOW):
        hour = folder / "images" / f"date={day.date()}" / f"hour={day:%H}"
        assert (hour / DECISION.images[0]).read_bytes() == IMAGE


def test_what_is_too_old_is_deleted(folder: Path) -> None:
    old = NOW - timedelta(days=9)
    store = DecisionStore(location(str(folder)))
    store.write_part(old.date(), "a", rows_of([replace(DECISION, at=old)]))
    assert names(folder, "*.parquet")
    log = DecisionLog(DecisionLogSettings(str(folder), keep_days=8))
    wait_for(lambda: not names(folder, "*.parquet"))
    log.close(10)


def test_images_are_deleted_as_soon_as_they_are_too_large_together(folder: Path) -> None:
    log = DecisionLog(DecisionLogSettings(str(folder), image_bytes=100))
    images = [bytes([number]) * 60 for number in range(3)]
    for hours, image in zip((2, 1, 0), images, strict=True):
        log.add(replace(ALARM, at=NOW - timedelta(hours=hours), images=image_digests([image])), [image])
        wait_for(lambda: not log.waiting)
    wait_for(lambda: names(folder / "images", "?" * 64) == list(image_digests(images[2:])))
    log.close(10)
    (kept,) = (path for path in (folder / "images").rglob("*") if path.is_file())
    assert kept.read_bytes() == images[2]
    assert rows(folder)["kept"].tolist() == ["alarm"] * 3


def test_while_the_store_is_down_rows_wait_and_the_oldest_are_dropped(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder.parent.mkdir(exist_ok=True)
    folder.write_text("a file where a folder has to be")
    log = DecisionLog(DecisionLogSettings(str(folder), sample=0))
    log.add(replace(ALARM, request_id="first"), [IMAGE])
    wait_for(lambda: log.error is not None)
    for number in range(60):
        log.add(replace(DECISION, request_id=str(number), at=NOW + timedelta(seconds=number)), [IMAGE])
    # A batch may be on its way while others are added.
    assert log.waiting <= 50 and 11 - 8 <= log.dropped_rows <= 11
    wait_for(lambda: log.dropped_rows == 11)
    folder.unlink()
    wait_for(lambda: not log.waiting and log.error is None)
    log.close(10)
    assert rows(folder)["request_id"].tolist() == [str(number) for number in range(10, 60)]
    failures = [record for record in caplog.records if "can't be written to" in record.message]
    assert len(failures) == 1 and failures[0].levelno == logging.ERROR
    assert "dropped 11 decisions" in caplog.text


def test_what_can_not_be_deleted_is_no_failure_to_write(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> list[str]:
        raise PermissionError("deleting is not allowed")

    delete_old = DecisionStore.delete_old
    monkeypatch.setattr(DecisionStore, "delete_old", refuse)
    monkeypatch.setattr(decision_log, "RETRY_SWEEP_S", 0.0)
    log = DecisionLog(DecisionLogSettings(str(folder), sample=0))
    wait_for(lambda: log.sweep_error == "deleting is not allowed")
    log.add(DECISION, [IMAGE])
    wait_for(lambda: not log.waiting)
    assert log.error is None
    monkeypatch.setattr(DecisionStore, "delete_old", delete_old)
    wait_for(lambda: log.sweep_error is None)
    log.close(10)
    assert len(rows(folder)) == 1


def test_a_service_that_stops_while_the_store_is_down_says_so(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder.write_text("a file where a folder has to be")
    log = DecisionLog(DecisionLogSettings(str(folder)))
    log.add(DECISION, [IMAGE])
    log.close(10)
    assert "the service stops before the store has taken its last decisions" in caplog.text
    folder.unlink()
    folder.mkdir()


def test_a_store_that_never_answers_holds_up_nobody(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "sprue")
        S3FileSystem.clear_instance_cache()  # it remembers the endpoint
        log = DecisionLog(DecisionLogSettings("s3://silent/decisions"))
        for number in range(100):
            log.add(replace(ALARM, request_id=str(number)), [IMAGE])
        log.close(0.5)
        # At most eight rows are on their way.
        waiting, dropped = log.waiting, log.dropped_rows
        assert "the service stops before the store has taken its last decisions" in caplog.text
    log.close(60)  # refused from now on
    S3FileSystem.clear_instance_cache()
    assert 42 <= waiting <= 50 and 92 <= waiting + dropped <= 100


def test_images_beyond_the_memory_for_them_are_not_kept_but_their_rows_are(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decision_log, "MAX_IMAGE_BYTES", 100)
    folder.parent.mkdir(exist_ok=True)
    folder.write_text("a file where a folder has to be")
    log = DecisionLog(DecisionLogSettings(str(folder)))
    for number in range(4):
        image = bytes([number]) * 40
        at = NOW + timedelta(microseconds=number)
        log.add(replace(ALARM, request_id=str(number), at=at, images=image_digests([image])), [image])
    assert log.dropped_images == 2
    folder.unlink()
    wait_for(lambda: not log.waiting)
    log.add(replace(ALARM, request_id="4", at=NOW + timedelta(seconds=1)), [IMAGE])  # there is memory again
    log.close(10)
    found = rows(folder)
    assert found["kept"].tolist() == ["alarm", "alarm", "", "", "alarm"]
    assert set(names(folder / "images", "?" * 64)) == {
        digest for kept, (digest,) in zip(found["kept"], found["images"], strict=True) if kept
    }


def test_what_is_kept() -> None:
    assert why_kept(ALARM, 0) == "alarm"
    assert why_kept(replace(DECISION, p_value=0.1), 0) == "near"
    assert why_kept(replace(DECISION, p_value=0.1001), 0) == ""
    assert why_kept(DECISION, 1) == "sample"
    digests = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(2000)]
    kept = [why_kept(replace(DECISION, images=(digest,)), 0.1) for digest in digests]
    assert kept == [why_kept(replace(DECISION, images=(digest,)), 0.1) for digest in digests]
    assert 150 < kept.count("sample") < 250
