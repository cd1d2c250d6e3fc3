"""Loaded champions are bounded in bytes, and scored together as they are scored alone.

Shapes: N images, V views, S side of the backbone's input, C channels, H rows, W columns of a map.
"""

from types import SimpleNamespace

import numpy as np
import pytest

from sprue.serving.loading import Loader
from sprue.serving.model_cache import ModelCache, ServedModel, SharedEngine, score_together
from sprue.tracking.registry import RegisteredDetector


@pytest.fixture
def served(tiny_detector, tiny_engine):
    """Four classes of one image with the same backbone, and one of two views with another backbone."""
    shared, other = SharedEngine(tiny_engine(), 32), SharedEngine(tiny_engine(), 32)
    models = {
        f"textures.{name}": ServedModel(RegisteredDetector("textures", name, 1, ""), tiny_detector(seed=seed), shared)
        for seed, name in enumerate("abcd")
    }
    box = ServedModel(RegisteredDetector("parcels", "box", 4, ""), tiny_detector(views=("0", "1")), other)
    return models | {"parcels.box": box}


def names(cache, served):
    return [name for name in served if name in cache]


def test_the_least_recently_used_make_room(served):
    a, b, c, d = (served[f"textures.{name}"] for name in "abcd")
    assert a.bytes == sum(each.nbytes for each in a.detector.flow.state_dict().values()) > 0
    cache = ModelCache(2 * a.bytes)
    for each in (a, b):
        cache.put(each, is_used=True)
    assert cache.use("textures.a") is a
    cache.put(c, is_used=True)
    assert names(cache, served) == ["textures.a", "textures.c"]
    assert (len(cache), cache.bytes, cache.use("textures.b")) == (2, 2 * a.bytes, None)
    cache.put(d, is_used=False)  # nobody has asked for it, and there is no room
    assert names(cache, served) == ["textures.a", "textures.c"]
    cache.drop("textures.a")
    cache.drop("textures.a")
    cache.put(d, is_used=False)
    cache.put(b, is_used=True)
    assert names(cache, served) == ["textures.b", "textures.c"]
    assert cache.bytes == 2 * a.bytes


def test_a_new_champion_takes_the_place_of_the_old_one(served, tiny_detector):
    a, b, c = (served[f"textures.{name}"] for name in "abc")
    cache = ModelCache(2 * a.bytes)
    cache.put(a, is_used=True)
    cache.put(b, is_used=True)
    newer = ServedModel(RegisteredDetector("textures", "a", 2, ""), tiny_detector(seed=9), a.engine)
    cache.put(newer, is_used=False)
    assert (cache.use("textures.a"), cache.bytes) == (newer, 2 * a.bytes)
    cache.put(c, is_used=True)
    assert names(cache, served) == ["textures.a", "textures.c"]


def test_pinned_models_stay_and_one_that_is_too_large_does_not(served):
    a, b, c = (served[f"textures.{name}"] for name in "abc")
    cache = ModelCache(a.bytes, pinned=["textures.a", "textures.b"])
    for each in (a, b, c):
        cache.put(each, is_used=True)
    assert names(cache, served) == ["textures.a", "textures.b"]
    empty = ModelCache(a.bytes - 1)
    empty.put(a, is_used=True)
    assert (len(empty), empty.bytes) == (0, 0)


def test_one_that_does_not_fit_drives_out_nobody(served, caplog):
    small, large = sorted((served["textures.a"], served["parcels.box"]), key=lambda each: each.bytes)
    assert small.bytes < large.bytes
    cache = ModelCache(large.bytes - 1)
    cache.put(small, is_used=True)
    cache.put(large, is_used=True)
    assert names(cache, served) == [small.champion.model_name] and cache.bytes == small.bytes
    assert f"{large.champion} is loaded for each request" in caplog.text


def test_samples_of_several_classes_are_scored_as_alone(served):
    rng = np.random.default_rng(0)
    order = ["parcels.box", "textures.a", "textures.b", "textures.a", "parcels.box"] * 4
    tasks = [
        (served[name], rng.integers(0, 256, (len(served[name].detector.views), 32, 32, 3), np.uint8)) for name in order
    ]
    together = score_together(tasks)
    for (each, inputs_VSS3), found in zip(tasks, together, strict=True):
        alone = each.detector.predict_inputs(inputs_VSS3, each.engine)
        # A batch of another size may be rounded otherwise.
        np.testing.assert_allclose(found.image_score_BV, alone.image_score_BV, rtol=1e-4)
        assert found.score_B.shape == (1,) and found.is_anomalous_B.tolist() == alone.is_anomalous_B.tolist()
    assert len({float(found.score_B[0]) for found in together}) == len(tasks)


def test_a_device_that_has_failed_is_found_by_trying_its_engines(tiny_engine):
    loader, device = Loader(threads=1), SimpleNamespace(works=True)

    class Engine(tiny_engine):
        def __call__(self, images_BSS3):
            if not device.works:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            return super().__call__(images_BSS3)

    engine = loader.engines["fingerprint"] = SharedEngine(Engine(), side=32)
    assert len(engine.blank_maps) == 1
    loader.try_engines()
    device.works = False
    with pytest.raises(RuntimeError, match="CUDA error"):
        loader.try_engines()


def test_two_models_of_the_same_version_keep_apart(served, tiny_detector):
    """As while a version is replaced by that of a restored backup."""
    old = served["textures.a"]
    new = ServedModel(old.champion, tiny_detector(seed=9), old.engine)
    inputs_VSS3 = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8)
    together = score_together([(old, inputs_VSS3), (new, inputs_VSS3)])
    for each, found in zip((old, new), together, strict=True):
        alone = each.detector.predict_inputs(inputs_VSS3, each.engine)
        np.testing.assert_allclose(found.image_score_BV, alone.image_score_BV, rtol=1e-4)
    assert together[0].score_B[0] != together[1].score_B[0]
