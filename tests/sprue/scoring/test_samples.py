"""What below a folder is a sample."""

import os

from sprue.scoring import samples
from sprue.scoring.samples import list_samples
from sprue.store import location


def test_images_of_all_folders_are_samples_and_others_are_named(tmp_path):
    for name in ("b/2.PNG", "a/x/1.tiff", "c.jpeg", ".cache/1.png", "a/.1.png", "notes.txt", "no_suffix"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(name.encode())
    (tmp_path / "images" / os.fsdecode(b"\xff.png")).write_bytes(b"")
    (tmp_path / "images/link.png").symlink_to(tmp_path / "images/c.jpeg")
    (tmp_path / "images/folder.png").symlink_to(tmp_path / "images/a")
    (tmp_path / "images/broken.png").symlink_to(tmp_path / "nothing")
    found, skipped = list_samples(location(str(tmp_path / "images")), ("",))
    names = ["a/x/1.tiff", "b/2.PNG", "broken.png", "c.jpeg", "link.png"]
    assert [sample.name for sample in found] == names
    assert [sample.paths for sample in found] == [(name,) for name in names]
    assert {each.path: each.reason for each in skipped} == {
        ".cache/1.png": "hidden",
        "a/.1.png": "hidden",
        "folder.png": "a link to a folder",
        "no_suffix": "its suffix is not an image's",
        "notes.txt": "its suffix is not an image's",
        "\\udcff.png": "its name is not UTF-8",
    }


def test_a_state_changes_with_the_file(tmp_path):
    root, file = location(str(tmp_path)), tmp_path / "1.png"
    file.write_bytes(b"a")
    states = [list_samples(root, ("",))[0]]
    assert list_samples(root, ("",))[0] == states[0]
    file.write_bytes(b"ab")
    states.append(list_samples(root, ("",))[0])
    os.utime(file, (1, 1))
    states.append(list_samples(root, ("",))[0])
    assert len({each[0].states for each in states}) == 3


def test_names_of_objects_that_lead_elsewhere_are_skipped():
    """Some object stores refuse such names, ours among them; a heat map is never written by one."""
    for name in ("../1.png", "a/../../1.png", "a//1.png", "/1.png", "./1.png"):
        assert samples._objection(name) == "its name is not a path"
    assert samples._objection("a..b/..1/...png") == "hidden"
    assert samples._objection("a..b/1...png") is None
