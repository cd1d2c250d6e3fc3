"""A small class with features and drawn defects, in tables as the stages leave them."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from upath import UPath

from sprue.features.tables import write_part
from sprue.search.drawn import plan_defects
from sprue.training.loop import FitSettings
from sprue.training.worker import FitRequest

PICTURES = 30
VALIDATION = 8


@dataclass(frozen=True)
class Case:
    """A class that can be searched.

    Attributes:
        request: The recipe's fit.
        drawn: The feature table of its drawn defects.
        runs: Where trials are stored.
    """

    request: FitRequest
    drawn: UPath
    runs: UPath


def maps_of(count: int, seed: int, shift: float = 0.0) -> list[np.ndarray]:
    """Maps of two sizes whose channels depend on each other; a shift breaks the dependence in one corner."""
    rng = np.random.default_rng(seed)
    maps = []
    for channels, side in ((3, 6), (5, 3)):
        maps_NCHW = rng.normal(size=(count, channels, side, side))
        maps_NCHW[:, 1:] = 0.3 * maps_NCHW[:, 1:] + maps_NCHW[:, :1] ** 2
        maps_NCHW[:, 1:, :2, :2] += shift
        maps.append(maps_NCHW.astype(np.float16))
    return maps


def write_case(folder: Path, class_name: str = "brick", **changes: object) -> Case:
    """Writes the tables; defects differ little, so that settings decide how many are found."""
    names = [hashlib.sha256(f"{class_name}{index}".encode()).hexdigest() for index in range(PICTURES)]
    write_part(UPath(folder / class_name), names, maps_of(PICTURES, seed=1))
    samples = tuple((name,) for name in names)
    defects = plan_defects(samples[-VALIDATION:])
    drawn = UPath(folder / "drawn")
    write_part(drawn, [defect.digest for defect in defects], maps_of(len(defects), seed=2, shift=0.5))
    arguments = {
        "train": samples[:-VALIDATION],
        "validation": samples[-VALIDATION:],
        "flow_config": {"adapted": 8, "bottleneck": 8, "noise": 0.1},
        "settings": FitSettings(epochs=4, batch_size=8, learning_rate=0.01),
    }
    request = FitRequest(
        class_name, "f" * 16, str(folder / class_name), blocks=2, flow_name="patchflow", **arguments | changes
    )
    return Case(request, drawn, UPath(folder / "runs"))


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return write_case(tmp_path)
