"""Champions are loaded once, found by name, and scored together as they are scored alone.

Shapes: N images, V views, S side of the backbone's input, C channels, H rows, W columns of a map.
"""

from dataclasses import dataclass, replace

import numpy as np
import pytest

from sprue.errors import SprueError
from sprue.inference.detector import Detector
from sprue.serving.errors import ApiError
from sprue.serving.model_cache import ModelCache, load_models, score_together
from sprue.tracking import registry
from sprue.tracking.registry import RegisteredDetector

BRICK, GRASS = RegisteredDetector("textures", "brick", 1, "r1"), RegisteredDetector("textures", "grass", 1, "r2")
BOX = RegisteredDetector("parcels", "box", 4, "r3")


@dataclass
class Registry:
    """What the registry returns; the tests change it."""

    detectors: dict[RegisteredDetector, Detector | Exception]

    def champions(self) -> list[RegisteredDetector]:
        return list(self.detectors)

    def load(self, champion: RegisteredDetector) -> Detector:
        found = self.detectors[champion]
        if isinstance(found, Exception):
            raise found
        return found


@pytest.fixture
def champions(monkeypatch, tiny_detector, tiny_engine):
    """Two classes of one image with the same backbone, and one of two views with another backbone."""
    found = Registry({BRICK: tiny_detector(), GRASS: tiny_detector(seed=1), BOX: tiny_detector(views=("0", "1"))})
    monkeypatch.setattr(registry, "champions", found.champions)
    monkeypatch.setattr(registry, "load_detector", found.load)
    monkeypatch.setattr(Detector, "build_engine", lambda self, threads: tiny_engine())
    return found


def test_champions_with_one_feature_spec_share_an_engine(champions):
    cache = load_models(threads=1)
    assert list(cache.served) == ["textures.brick", "textures.grass", "parcels.box"] and not cache.failures
    brick, grass, box = cache.served.values()
    assert brick.engine is grass.engine and brick.engine is not box.engine
    assert set(cache.engines.values()) == {brick.engine, box.engine}


def test_only_new_champions_are_loaded_again(champions, tiny_detector):
    before = load_models(threads=1)
    newer = replace(BRICK, version=2)
    del champions.detectors[BRICK]
    champions.detectors[newer] = tiny_detector(seed=2)
    after = load_models(1, before)
    assert after.served["textures.grass"] is before.served["textures.grass"]
    assert after.served["textures.brick"].champion == newer
    assert after.served["textures.brick"].engine is before.served["textures.brick"].engine


def test_a_champion_that_fails_to_load_does_not_stop_the_others(champions):
    before = load_models(threads=1)
    champions.detectors = {replace(BRICK, version=2): SprueError("gone"), GRASS: SprueError("unused"), BOX: None}
    after = load_models(1, before)
    assert after.failures == {"textures.brick": "textures.brick version 2: gone"}
    assert after.served == before.served

    champions.detectors = {BRICK: SprueError("gone"), GRASS: ValueError("odd")}
    with pytest.raises(SprueError, match=r"no champion can be loaded: textures\.brick version 1: gone; .* odd"):
        load_models(threads=1)
    champions.detectors = {}
    with pytest.raises(SprueError, match="no champion to serve: run the pipeline first"):
        load_models(threads=1)


@pytest.mark.parametrize(
    ("name", "status", "code"),
    [("bolt", 404, "unknown_class"), ("brick", 409, "ambiguous_class"), ("walls.brick", 503, "class_unavailable")],
)
def test_a_class_is_found_by_name(champions, name, status, code):
    champions.detectors[replace(BRICK, dataset="walls")] = SprueError("gone")
    cache = load_models(threads=1)
    for found in ("textures.grass", "grass"):
        assert cache.find(found) is cache.served["textures.grass"]
    with pytest.raises(ApiError) as refusal:
        cache.find(name)
    assert (refusal.value.status, refusal.value.code) == (status, code)


def test_an_empty_cache_knows_no_class():
    with pytest.raises(ApiError, match="there are: none"):
        ModelCache().find("brick")


def test_samples_of_several_classes_are_scored_as_alone(champions):
    cache = load_models(threads=1)
    rng = np.random.default_rng(0)
    names = ["parcels.box", "textures.brick", "textures.grass", "textures.brick", "parcels.box"] * 4
    served = [cache.served[name] for name in names]
    tasks = [(each, rng.integers(0, 256, (len(each.detector.views), 32, 32, 3), np.uint8)) for each in served]
    together = score_together(tasks)
    for (each, inputs_VSS3), found in zip(tasks, together, strict=True):
        alone = each.detector.predict_inputs(inputs_VSS3, each.engine)
        # A batch of another size may be rounded otherwise.
        np.testing.assert_allclose(found.image_score_BV, alone.image_score_BV, rtol=1e-4)
        assert found.score_B.shape == (1,) and found.is_anomalous_B.tolist() == alone.is_anomalous_B.tolist()
    assert len({float(found.score_B[0]) for found in together}) == len(tasks)
