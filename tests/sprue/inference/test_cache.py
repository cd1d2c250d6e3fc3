"""The cache is filled once, heals, and forgets what was used longest ago."""

import os
import shutil
import time
from pathlib import Path

import pytest

from sprue.errors import SprueError
from sprue.inference import cache
from sprue.inference.cache import cache_folder, cached, evict, limit


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPRUE_CACHE", str(tmp_path))
    return tmp_path


def fill(folder: Path) -> None:
    (folder / "file").write_bytes(bytes(1000))


def is_sound(folder: Path) -> bool:
    return (folder / "file").is_file() and (folder / "file").stat().st_size == 1000


def aged(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def names(kind: str) -> set[str]:
    return {path.name for path in (cache_folder() / kind).iterdir()}


def test_an_entry_is_filled_once_and_anew_if_it_is_damaged() -> None:
    filled = []

    def counted(folder: Path) -> None:
        filled.append(folder)
        fill(folder)

    for _ in range(2):
        assert is_sound(cached("models/a", counted, is_sound))
    assert len(filled) == 1
    (cache_folder() / "models" / "a" / "file").write_bytes(b"")
    assert is_sound(cached("models/a", counted, is_sound))
    assert len(filled) == 2


def test_what_could_not_be_filled_leaves_nothing() -> None:
    def fail(folder: Path) -> None:
        fill(folder)
        raise SprueError("gone")

    with pytest.raises(SprueError, match="gone"):
        cached("weights/a", fail, is_sound)
    assert names("weights") == set()


def test_what_took_long_to_fill_is_not_removed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPRUE_CACHE_GB", str(1 / 2**30))

    def fill_slowly(folder: Path) -> None:
        fill(folder)
        aged(folder, 2 * cache.GRACE_S)

    assert is_sound(cached("models/a", fill_slowly, is_sound))


@pytest.mark.parametrize("is_damaged", [False, True])
def test_what_another_process_has_filled_meanwhile_stays_if_it_is_sound(is_damaged: bool) -> None:
    def fill_beside_another(folder: Path) -> None:
        fill(folder)
        (folder / "ours").touch()
        other = cache_folder() / "models" / "a"
        shutil.rmtree(other, ignore_errors=True)
        other.mkdir()
        (other / "file").write_bytes(bytes(10 if is_damaged else 1000))

    (cache_folder() / "models" / "a").mkdir(parents=True)  # a damaged one
    found = cached("models/a", fill_beside_another, is_sound)
    assert is_sound(found) and (found / "ours").exists() == is_damaged
    assert names("models") == {"a"}


def test_the_least_recently_used_entries_are_removed_first(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"models/old": 900, "weights/older": 1000, "models/new": 800}.items():
        aged(cached(name, fill, is_sound), seconds)
    cached("models/old", fill, is_sound)  # used again: the cache finds it, and this counts as a use
    aged(cache_folder() / "models" / "old", 700)
    evict(2500)
    assert (names("models"), names("weights")) == ({"old", "new"}, set())
    monkeypatch.setenv("SPRUE_CACHE_GB", str(2500 / 2**30))
    cached("models/newest", fill, is_sound)  # makes room by itself
    assert names("models") == {"old", "newest"}


def test_what_is_in_use_and_what_can_not_be_downloaded_stays() -> None:
    cached("models/now", fill, is_sound)
    unfinished, dead = (cache_folder() / "models" / name for name in (".unfinished", ".dead"))
    for path, seconds in ((unfinished, 2 * cache.GRACE_S), (dead, 2 * cache.UNFINISHED_S)):
        path.mkdir()
        fill(path)
        aged(path, seconds)
    converted = cache_folder() / "abc-openvino-1"
    converted.mkdir()
    aged(converted, 10_000)
    evict(0)
    assert names("models") == {"now", ".unfinished"}
    assert converted.exists()


def test_the_limit_is_a_number_of_gigabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert limit() == 20 * 2**30
    monkeypatch.setenv("SPRUE_CACHE_GB", "0.5")
    assert limit() == 2**29
    for odd in ("0", "-1", "many", "nan", "inf"):
        monkeypatch.setenv("SPRUE_CACHE_GB", odd)
        with pytest.raises(SprueError, match=f"SPRUE_CACHE_GB={odd} is not a number of GiB above 0"):
            limit()
