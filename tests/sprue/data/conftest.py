"""A small dataset in MVTec's layout, and ways to put files into it."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from upath import UPath


class Folder:
    """A dataset folder; every image written differs from the others unless a key is repeated."""

    def __init__(self, root: Path):
        self.root = root
        self.upath = UPath(root)

    def image(self, path: str, key: int, size: tuple[int, int] = (20, 16)) -> Path:
        pixels = np.random.default_rng(key).integers(0, 256, (size[1], size[0]), dtype=np.uint8)
        return self.put(path, Image.fromarray(pixels))

    def mask(self, path: str, size: tuple[int, int] = (20, 16)) -> Path:
        return self.put(path, Image.new("L", size, 255))

    def put(self, path: str, image: Image.Image) -> Path:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(file)
        return file

    def raw(self, path: str, content: bytes) -> Path:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        return file

    def add_class(self, name: str, good: int = 100, first_key: int = 0) -> None:
        for number in range(good):
            self.image(f"{name}/train/good/{number:03d}.png", first_key + number)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "dataset")


@pytest.fixture
def bottles(folder: Folder) -> Folder:
    """One class: 100 training images, two good and two defective test images, one of them with a mask."""
    folder.add_class("bottle")
    folder.image("bottle/test/good/000.png", 1000)
    folder.image("bottle/test/good/001.png", 1001)
    folder.image("bottle/test/crack/000.png", 1002)
    folder.image("bottle/test/crack/001.png", 1003)
    folder.mask("bottle/ground_truth/crack/000_mask.png")
    return folder


VIEWS = ("front", "left", "top")


@pytest.fixture
def boxes(folder: Folder) -> Folder:
    """One class of three views: 40 training samples, a good and two defective test samples, one with two masks."""
    for number in range(40):
        for view, name in enumerate(VIEWS):
            folder.image(f"box/train/good/{number:03d}/{name}.png", 3 * number + view)
    for number, sample in enumerate(("good/a", "dent/a", "dent/b")):
        for view, name in enumerate(VIEWS):
            folder.image(f"box/test/{sample}/{name}.png", 1000 + 3 * number + view)
    folder.mask("box/ground_truth/dent/a/left_mask.png")
    folder.mask("box/ground_truth/dent/a/top.png")
    return folder
