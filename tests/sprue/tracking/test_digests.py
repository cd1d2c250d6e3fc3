"""Altered, missing and foreign files are named; the cache heals."""

from pathlib import Path

import pytest

from sprue.errors import SprueError
from sprue.tracking.digests import altered_files, digest_tags, require_digests


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("detector.json", "flow.safetensors"):
        (tmp_path / name).write_text(name)
    return tmp_path


def test_the_files_that_were_registered_pass(folder: Path) -> None:
    tags = digest_tags(folder)
    assert sorted(tags) == ["sprue.sha256.detector.json", "sprue.sha256.flow.safetensors"]
    require_digests(folder, {**tags, "sprue.dataset": "textures"}, "v")
    assert altered_files(folder, tags) == []


def test_other_files_are_named(folder: Path) -> None:
    tags = digest_tags(folder)
    (folder / "detector.json").write_text("detector.jsoN")
    (folder / "flow.safetensors").unlink()
    (folder / "more.py").write_text("")
    expected = r"^the files of v 3 are not those that were registered: detector\.json, flow\.safetensors, more\.py$"
    with pytest.raises(SprueError, match=expected):
        require_digests(folder, tags, "v 3")


def test_a_version_without_digests_is_not_trusted(folder: Path) -> None:
    with pytest.raises(SprueError, match="v 3 has no digests of its files"):
        require_digests(folder, {"sprue.dataset": "textures"}, "v 3")
