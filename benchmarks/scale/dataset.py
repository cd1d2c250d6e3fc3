"""Tiny classes for the measurement."""

from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 64
TRAIN_IMAGES, TEST_GOOD, TEST_DEFECTIVE = 14, 2, 2


def write_dataset(folder: Path, classes: int) -> None:
    """Writes classes as MVTec AD does; each has a texture of its own, with noise. Those that are there stay."""
    rows, columns = np.mgrid[:SIDE, :SIDE] / SIDE
    for number in range(classes):
        name = f"part{number:05d}"
        if (folder / name / "complete").exists():
            continue
        rng = np.random.default_rng(number)
        frequency, colour = rng.uniform(2, 9, (3, 2)), rng.uniform(20, 60, (3, 3))
        first, grey = rng.uniform(0, 2 * np.pi, 3), rng.uniform(80, 176, 3)

        def image(
            defective: bool, rng=rng, frequency=frequency, colour=colour, first=first, grey=grey
        ) -> tuple[np.ndarray, np.ndarray]:
            phase = first + rng.uniform(0, 0.6, 3)  # small, so that no image looks like another class's
            waves = np.sin(2 * np.pi * (frequency[:, :1, None] * rows + frequency[:, 1:, None] * columns)
                           + phase[:, None, None])  # fmt: skip
            pixels = grey + np.tensordot(waves, colour, (0, 0)) + rng.normal(0, 12, (SIDE, SIDE, 3))
            mask = np.zeros((SIDE, SIDE), np.uint8)
            if defective:
                top, left = rng.integers(8, 40, 2)
                mask[top : top + 14, left : left + 14] = 255
                pixels[mask > 0] = 255 - pixels[mask > 0]
            return pixels.clip(0, 255).astype(np.uint8), mask

        for kind, count in (("train/good", TRAIN_IMAGES), ("test/good", TEST_GOOD), ("test/spot", TEST_DEFECTIVE)):
            (folder / name / kind).mkdir(parents=True, exist_ok=True)
            for index in range(count):
                pixels, mask = image(kind == "test/spot")
                Image.fromarray(pixels).save(folder / name / kind / f"{index:03d}.png", compress_level=1)
                if mask.any():
                    (folder / name / "ground_truth/spot").mkdir(parents=True, exist_ok=True)
                    Image.fromarray(mask).save(folder / name / "ground_truth/spot" / f"{index:03d}_mask.png")
        (folder / name / "complete").touch()
