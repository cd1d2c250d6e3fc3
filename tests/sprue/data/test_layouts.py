import os
import shutil
from collections import Counter

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from upath import UPath

from sprue.data.layouts import MVTecLayout, SkippedFile
from sprue.errors import SprueError


def read(folder):
    return MVTecLayout().read(folder.upath)


def test_reads_images_defects_and_masks(bottles):
    records, skipped = read(bottles)
    test = {(record.defect_type, record.path, record.mask_path) for record in records if record.split == "test"}
    assert test == {
        ("good", "bottle/test/good/000.png", ""),
        ("good", "bottle/test/good/001.png", ""),
        ("crack", "bottle/test/crack/000.png", "bottle/ground_truth/crack/000_mask.png"),
        ("crack", "bottle/test/crack/001.png", ""),
    }
    assert sum(record.split == "train" and record.defect_type == "good" for record in records) == 100
    assert len({record.sample_id for record in records}) == len(records)
    assert skipped == []


def test_a_mask_may_have_the_name_of_its_image(bottles):
    bottles.mask("bottle/ground_truth/crack/001.png")
    records, _ = read(bottles)
    assert {record.mask_path for record in records} == {
        "",
        "bottle/ground_truth/crack/000_mask.png",
        "bottle/ground_truth/crack/001.png",
    }


def test_the_test_folder_is_optional(folder):
    folder.add_class("bottle", good=3)
    records, skipped = read(folder)
    assert [record.path for record in records] == [f"bottle/train/good/{number:03d}.png" for number in range(3)]
    assert skipped == []


def test_skipped_files_are_listed(bottles):
    bottles.raw("bottle/train/good/.DS_Store", b"x")
    bottles.image("bottle/train/good/sub/000.png", 1)
    bottles.image("bottle/train/bad/000.png", 2)
    bottles.mask("bottle/ground_truth/crack/typo_mask.png")
    bottles.mask("bottle/ground_truth/crack/000_mask.bmp")
    bottles.mask("bottle/ground_truth/dent/000_mask.png")
    _, skipped = read(bottles)
    assert sorted(skipped) == [
        SkippedFile(
            "bottle/ground_truth/crack/000_mask.png",
            "bottle/ground_truth/crack/000_mask.bmp is already the mask of this name",
        ),
        SkippedFile("bottle/ground_truth/crack/typo_mask.png", "ground truth without a test image of its name"),
        SkippedFile("bottle/ground_truth/dent/000_mask.png", "ground truth without a test image of its name"),
        SkippedFile("bottle/train/bad", "not read: only train/good is trained on"),
        SkippedFile("bottle/train/good/.DS_Store", "hidden"),
        SkippedFile("bottle/train/good/sub", "a folder among the images"),
    ]


def test_a_file_whose_name_is_not_text_is_skipped(bottles):
    try:
        bottles.raw(f"bottle/train/good/{os.fsdecode(bytes([255]))}.png", b"x")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    records, skipped = read(bottles)
    assert skipped == [SkippedFile("bottle/train/good/\\udcff.png", "its name is not UTF-8")]
    assert len(records) == 104


def test_hidden_folders_and_files_beside_classes_are_no_classes(bottles):
    bottles.raw(".dvc/config", b"")
    bottles.raw("readme.txt", b"about")
    bottles.raw("bottle/license.txt", b"free")
    records, skipped = read(bottles)
    assert {record.class_name for record in records} == {"bottle"}
    assert skipped == []


def test_reads_a_remote_root():
    root = UPath("memory://layouts/dataset")
    for path in ("cup/train/good/0.png", "cup/test/chip/0.png", "cup/ground_truth/chip/0_mask.png"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"x")
    records, _ = MVTecLayout().read(root)
    assert [(record.path, record.mask_path) for record in records] == [
        ("cup/train/good/0.png", ""),
        ("cup/test/chip/0.png", "cup/ground_truth/chip/0_mask.png"),
    ]


def test_a_remote_folder_is_listed_once_however_many_files_it_has(monkeypatch):
    asked = Counter()
    for name in ("ls", "isdir"):
        method = getattr(MemoryFileSystem, name)
        monkeypatch.setattr(
            MemoryFileSystem, name, lambda *given, method=method, **named: asked.update([1]) or method(*given, **named)
        )
    requests = []
    for count in (5, 50):
        root = UPath(f"memory://layouts/of-{count}")
        (root / "cup/train/good").mkdir(parents=True)
        for number in range(count):
            (root / f"cup/train/good/{number}.png").write_bytes(b"x")
        asked.clear()
        assert len(MVTecLayout().read(root)[0]) == count
        requests.append(asked.total())
    assert requests[0] == requests[1]


def test_folders_may_be_links(folder, tmp_path):
    folder.add_class("cup", good=3)
    (folder.root / "cup").rename(tmp_path / "elsewhere")
    (folder.root / "cup").symlink_to(tmp_path / "elsewhere")
    records, skipped = read(folder)
    assert (len(records), skipped) == (3, [])


def test_missing_root(folder):
    with pytest.raises(SprueError, match=r"dataset is not a folder: give a folder that holds <class>/train/good"):
        read(folder)


def test_root_without_classes(folder):
    folder.raw("readme.txt", b"")
    with pytest.raises(SprueError, match=r"holds no class folder: put good images into"):
        read(folder)


def test_root_that_is_a_class_itself(folder):
    folder.add_class("bottle", good=1)
    with pytest.raises(SprueError, match=rf"seems to be a class folder itself.*give its parent, {folder.root}$"):
        MVTecLayout().read(folder.upath / "bottle")


def test_all_unusable_class_names_are_named(bottles):
    bottles.add_class("met al", good=1)
    bottles.add_class("-wood", good=1)
    bottles.add_class("größe", good=1)
    with pytest.raises(SprueError, match=r"rename '-wood', 'größe', 'met al' under .*letters, digits"):
        read(bottles)


def test_all_classes_without_good_images_are_named(bottles):
    (bottles.root / "cup").mkdir()
    bottles.image("jar/test/good/000.png", 5)
    with pytest.raises(SprueError, match=r"no train/good folder in class cup, jar under"):
        read(bottles)


def test_all_classes_with_an_empty_training_folder_are_named(bottles):
    (bottles.root / "cup/train/good").mkdir(parents=True)
    bottles.raw("jar/train/good/.gitkeep", b"")
    assert list(MVTecLayout().empty_classes(bottles.upath)) == ["cup", "jar"]
    assert {record.class_name for record in read(bottles)[0]} == {"bottle"}
    shutil.rmtree(bottles.root / "bottle")
    with pytest.raises(SprueError, match=r"no images in train/good of class cup, jar under"):
        read(bottles)
