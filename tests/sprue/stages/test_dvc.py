"""A folder of images comes under DVC, follows its source, and is never replaced where somebody has worked on it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sprue.errors import SprueError
from sprue.stages.dvc import track_dataset


@pytest.fixture
def workspace(tmp_path, environment, monkeypatch):
    """An empty repository with DVC; the process stands in it."""
    folder = tmp_path / "workspace"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for command in (["git", "init", "--quiet"], [sys.executable, "-m", "dvc", "init", "--quiet"]):
        subprocess.run(command, check=True, env=os.environ)
    return folder


def write(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def files(folder: str) -> set[str]:
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}


@pytest.mark.parametrize("place", ["elsewhere", "workspace/incoming"])
def test_a_dataset_follows_its_source(workspace, tmp_path, place):
    source = write(tmp_path / place, "bolt/train/good/1.png")
    track_dataset(source, "bolts")
    assert files("data/bolts") == {"bolt/train/good/1.png"}
    write(source, "bolt/train/good/2.png")
    track_dataset(source, "bolts")
    assert files("data/bolts") == {"bolt/train/good/1.png", "bolt/train/good/2.png"}
    # As in a clone, where only the .dvc file has come along.
    shutil.rmtree("data/bolts")
    track_dataset(source, "bolts")
    assert files("data/bolts") == files(str(source))


def test_what_was_changed_by_hand_is_not_replaced(workspace, tmp_path):
    source = write(tmp_path / "elsewhere", "bolt/train/good/1.png")
    track_dataset(source, "bolts")
    write(Path("data/bolts"), "bolt/train/good/mine.png")
    with pytest.raises(SprueError, match=r"data/bolts is a copy of .*elsewhere and has been changed"):
        track_dataset(source, "bolts")
    assert "bolt/train/good/mine.png" in files("data/bolts")


def test_another_source_does_not_take_a_datasets_place(workspace, tmp_path):
    track_dataset(write(tmp_path / "one", "bolt/train/good/1.png"), "bolts")
    with pytest.raises(SprueError, match=r"data/bolts exists already and is not from .*two; give another --name"):
        track_dataset(write(tmp_path / "two", "bolt/train/good/1.png"), "bolts")


def test_an_interrupted_import_is_named(workspace, tmp_path):
    write(Path("data/bolts"), "bolt/train/good/1.png")
    with pytest.raises(SprueError, match="data/bolts exists already"):
        track_dataset(write(tmp_path / "one", "bolt/train/good/1.png"), "bolts")


def test_a_folder_in_its_place_is_taken_as_it_is(workspace):
    write(Path("data/bolts"), "bolt/train/good/1.png")
    track_dataset(Path("data/bolts"), "bolts")
    write(Path("data/bolts"), "bolt/train/good/2.png")
    track_dataset(Path("data/bolts"), "bolts")
    assert Path("data/bolts.dvc").is_file()
