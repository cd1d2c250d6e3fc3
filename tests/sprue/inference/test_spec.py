"""The fingerprint names what features depend on, and nothing else."""

from dataclasses import replace

import pytest

from sprue.errors import SprueError
from sprue.inference.spec import FeatureSpec

RESOLVED = FeatureSpec(weights_digest="ab" * 32)


def test_each_field_but_the_weights_source_changes_the_fingerprint():
    changes = {
        "backbone": "tf_efficientnet_lite1",
        "blocks": (2, 3),
        "scales": (1.0, 0.5),
        "input_size": 256,
        "weights_digest": "cd" * 32,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
    }
    assert {"weights", *changes} == set(RESOLVED.to_mapping())
    fingerprints = {replace(RESOLVED, **{name: value}).fingerprint for name, value in changes.items()}
    assert len(fingerprints | {RESOLVED.fingerprint}) == len(changes) + 1
    assert replace(RESOLVED, weights="file:elsewhere.pth").fingerprint == RESOLVED.fingerprint


def test_the_order_of_blocks_and_scales_counts():
    assert replace(RESOLVED, blocks=(5, 3, 2)).fingerprint != RESOLVED.fingerprint
    assert replace(RESOLVED, scales=(0.25, 0.5, 1.0)).fingerprint != RESOLVED.fingerprint


def test_the_preprocessing_counts(monkeypatch):
    before = RESOLVED.fingerprint
    monkeypatch.setattr("sprue.inference.spec.PREPROCESSING", "other")
    assert RESOLVED.fingerprint != before


def test_a_parameter_file_and_json_give_the_same_spec():
    written = {"blocks": [2, 3, 5], "scales": [1, 0.5, 0.25], "weights_digest": "ab" * 32}
    assert FeatureSpec.from_mapping(written) == RESOLVED
    assert FeatureSpec.from_mapping(RESOLVED.to_mapping()) == RESOLVED
    assert FeatureSpec.from_mapping(written).fingerprint == RESOLVED.fingerprint


def test_an_unresolved_spec_has_no_fingerprint():
    with pytest.raises(ValueError, match="unresolved"):
        _ = FeatureSpec().fingerprint


@pytest.mark.parametrize(
    ("setting", "match"),
    [
        ({"input_size": 16}, "input_size: 16 is below 32"),
        ({"blocks": []}, "features.blocks"),
        ({"blocks": [2, 2]}, "each once"),
        ({"blocks": [-1]}, "from 0"),
        ({"scales": []}, "scales is empty"),
        ({"scales": [0.0]}, r"scales: 0\.0"),
        ({"scales": [2.0]}, r"scales: 2\.0"),
        ({"scales": [0.4]}, r"scales: 0\.4"),
        ({"scales": [1 / 5]}, "divides input_size 384"),
        ({"taps": [2]}, "there is no setting 'taps'; there are: backbone, blocks"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(setting, match):
    with pytest.raises(SprueError, match=match):
        FeatureSpec.from_mapping(setting)


def test_a_third_is_a_scale():
    assert FeatureSpec(scales=(1 / 3,)).scales == (1 / 3,)
