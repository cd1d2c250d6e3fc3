"""What a stage's own process computes for a class, as classes become many: ``python benchmarks/many_classes.py``.

The parts of the stages that look at all classes together, on made-up contents, in milliseconds of CPU a class on one
thread: which training images are copies of a test image of any class; finding a class's rows in the manifest; which
class an image looks like, against the nearest classes and, for comparison, against each. What should stay flat, does
not depend on the number of classes.
"""

import argparse
import os
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from unittest.mock import patch

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from sprue.config import ManifestSettings
from sprue.data.inspection import THUMBNAIL, Inspection
from sprue.data.layouts import GOOD, ImageRecord
from sprue.data.manifest import COLUMNS, Manifest, typed
from sprue.data.near_duplicates import without_near_duplicates
from sprue.data.splits import CALIBRATION, TEST, TRAIN, VALIDATION
from sprue.features.screening import Group, screen

SPLITS = [TRAIN] * 10 + [CALIBRATION] * 3 + [VALIDATION] + [TEST] * 4
CHANNELS = 1416
"""Of all maps of the default features."""


def names(classes: int) -> list[str]:
    """Of the classes."""
    return [f"part{number:05d}" for number in range(classes)]


def copies(classes: int) -> Callable[[], object]:
    """Looks for copies of test images; the thumbnails are noise around a grey level of each image."""
    rng = np.random.default_rng(0)
    records, found = [], {}
    for name in names(classes):
        for index, split in enumerate(SPLITS):
            path = f"{name}/{index}.png"
            folder = TEST if split == TEST else TRAIN
            records.append(ImageRecord(name, folder, GOOD, path, "", path, ""))
            pixels = rng.normal(rng.uniform(60, 200), 20, (THUMBNAIL, THUMBNAIL)).astype(np.float32)
            found[path] = Inspection(path, 64, 64, thumbnail_HW=pixels)
    return lambda: without_near_duplicates(records, found, ())


def rows(classes: int) -> Callable[[], object]:
    """Finds the rows of each class and split in a manifest."""
    content = [
        dict.fromkeys(COLUMNS, "")
        | {"class_name": each, "split": split, "sha256": f"{each}{index}", "sample_id": f"{each}/{index}"}
        | {"label": 0, "width": 64, "height": 64}
        for each in names(classes)
        for index, split in enumerate(SPLITS)
    ]
    manifest = Manifest("plant", ManifestSettings(), typed(pd.DataFrame(content, columns=list(COLUMNS))))

    def find() -> None:
        for name in manifest.classes:
            manifest.calibration_rows(name)
            manifest.fit_rows(name, None)
            manifest.select(name, TEST)

    return find


def groups(classes: int) -> list[Group]:
    """Twenty images of each class, around a centre of its own."""
    rng = np.random.default_rng(0)
    return [
        Group(
            name,
            tuple((f"{name}/{index}",) for index in range(20)),
            (rng.normal(0, 1, CHANNELS) + rng.normal(0, 0.3, (20, CHANNELS))).astype(np.float32),
            np.ones(20),
        )
        for name in names(classes)
    ]


def screening(classes: int) -> Callable[[], object]:
    """Looks for foreign images, each against the nearest classes."""
    described = groups(classes)
    return lambda: screen(described, ())


def screening_each(classes: int) -> Callable[[], object]:
    """Looks for foreign images, each against each class."""
    described = groups(classes)

    def look() -> None:
        with patch("sprue.features.screening.CANDIDATES", classes):
            screen(described, ())

    return look


PARTS = {
    "copies of test images": copies,
    "rows of a class": rows,
    "foreign images": screening,
    "foreign images, each class": screening_each,
}
SLOW = 256
"""Classes up to which foreign images are looked for in each class."""


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, nargs="+", default=[64, 256, 1024, 4096], help="(default: %(default)s)")
    counts = parser.parse_args().classes
    table = Table("CPU ms a class", *(f"{count} classes" for count in counts))
    for name, part in PARTS.items():
        cells = []
        for count in counts:
            if part is screening_each and count > SLOW:
                cells.append("–")
                continue
            run = part(count)
            started = time.process_time()
            run()
            cells.append(f"{1000 * (time.process_time() - started) / count:.2f}")
        print(name, *cells, flush=True)
        table.add_row(name, *cells)
    print(f"{datetime.now(UTC).date()}, {platform.platform()}, {os.cpu_count()} cores")
    Console().print(table)


if __name__ == "__main__":
    main()
