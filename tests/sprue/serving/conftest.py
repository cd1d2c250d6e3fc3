"""A plant with everything real: MLflow's registry, fitted detectors, Ray Serve. One for all tests of a module."""

import io
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import mlflow
import numpy as np
import pytest
import ray
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from skimage import data

from defectflow import build_flow
from sprue.inference.backbone import resolve
from sprue.inference.calibration import Calibration
from sprue.inference.detector import Detector, Scoring, score_features
from sprue.inference.engines import Engine, build_engine
from sprue.inference.images import model_input
from sprue.inference.spec import FeatureSpec
from sprue.serving.run import serve_champions, stop_serving
from sprue.serving.upload import ServiceLimits
from sprue.tracking import registry

SIDE = 128
TEXTURES = {"brick": data.brick, "gräs 2": data.grass}
"""One class has a name that neither a URL nor a header can hold as it is."""


def crops(texture: NDArray[np.uint8], count: int, seed: int) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    corners = rng.integers(0, texture.shape[0] - 200, (count, 2))
    return [Image.fromarray(texture[top : top + 160, left : left + 200]).convert("RGB") for top, left in corners]


def fit(class_name: str, spec: FeatureSpec, engine: Engine) -> Detector:
    """A detector of whitened features alone (the couplings are the identity), calibrated on 20 crops."""
    inputs = np.stack([model_input(image, SIDE) for image in crops(TEXTURES[class_name](), 30, seed=0)])
    maps = engine(inputs)
    flow = build_flow("patchflow", channels=tuple(each.shape[1] for each in maps), adapted=16, bottleneck=8)
    flow.fit_adaptor([[torch.from_numpy(each[:10]).float() for each in maps]])
    scores, _, evidence = score_features(flow.eval(), Scoring(), [each[10:] for each in maps])
    return Detector(class_name, spec, "patchflow", flow, Scoring(), Calibration.fit(scores, evidence, alpha=0.05))


VIEWS = ("0-top", "1-left", "2-right")


def views(count: int, seed: int) -> list[list[Image.Image]]:
    """Samples of three pictures: a crop, what lies in the middle of it, and the crop turned over."""
    return [
        [image, image.crop((20, 10, 180, 150)), ImageOps.flip(image)]
        for image in crops(TEXTURES["brick"](), count, seed)
    ]


def fit_views(spec: FeatureSpec, engine: Engine) -> Detector:
    """A detector of three views whose couplings tell each other what they see, calibrated on 20 samples."""
    pictures = [image for sample in views(30, seed=0) for image in sample]
    maps = engine(np.stack([model_input(image, SIDE) for image in pictures]))
    by_view = [each[view::3] for view in range(3) for each in maps]
    torch.manual_seed(0)
    flow = build_flow("multiflow", channels=tuple(each.shape[1] for each in maps), views=3, hidden=8, steps=2)
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    scores, _, evidence = score_features(flow.eval(), Scoring(), [each[10:] for each in by_view])
    return Detector("box", spec, "multiflow", flow, Scoring(), Calibration.fit(scores, evidence, alpha=0.05), VIEWS)


@dataclass
class Plant:
    """The service, and what stands behind it."""

    client: httpx.Client
    port: int
    limits: ServiceLimits
    folder: Path
    engine: Engine
    detectors: dict[str, Detector]

    def picture(self, class_name: str, seed: int = 1) -> Image.Image:
        return crops(TEXTURES[class_name](), 1, seed)[0]

    def post(self, class_name: str, image: Image.Image, **arguments: Any) -> httpx.Response:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        arguments["headers"] = {"Content-Type": "image/png"} | arguments.get("headers", {})
        return self.client.post(f"/v1/classes/{class_name}/score", content=buffer.getvalue(), **arguments)

    def release(self, class_name: str, detector: Detector, damaged: bool = False) -> int:
        """Registers a detector and makes it the champion, as a person at MLflow's UI would."""
        source = self.folder / "models" / str(time.monotonic_ns())
        detector.save(source / "artifacts" / "detector")
        if damaged:
            (source / "artifacts" / "detector" / "flow.safetensors").unlink()
        client = mlflow.MlflowClient()
        if class_name not in {model.name for model in client.search_registered_models()}:
            client.create_registered_model(class_name, tags={registry.CLASS_TAG: class_name})
        version = int(client.create_model_version(class_name, str(source), run_id=None).version)
        client.set_registered_model_alias(class_name, registry.CHAMPION, str(version))
        return version

    def wait(self, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Waits until the health report satisfies a condition, and returns it."""
        for _ in range(200):
            health = self.client.get("/healthz").json()
            if condition(health):
                return health
            time.sleep(0.1)
        pytest.fail(f"20 s later the health report is still {health}")


@pytest.fixture
def unused_port() -> int:
    return free_port()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two cores of Ray, with an empty registry and caches of their own in a folder."""
    folder = tmp_path_factory.mktemp("plant")
    before = mlflow.get_tracking_uri()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPRUE_CACHE", str(folder / "cache"))
        mlflow.set_tracking_uri(f"sqlite:///{folder / 'mlflow.db'}")
        mlflow.set_registry_uri(f"sqlite:///{folder / 'mlflow.db'}")
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield folder
        ray.shutdown()
        mlflow.set_tracking_uri(before)
        mlflow.set_registry_uri(before)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def plant(cluster: Path) -> Iterator[Plant]:
    spec = resolve(FeatureSpec(input_size=SIDE, blocks=(2, 3), scales=(1.0,)))
    engine = build_engine(spec)
    port, limits = free_port(), ServiceLimits(max_bytes=2 * 2**20, max_pixels=4_000_000)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30.0) as client:
        detectors = {name: fit(name, spec, engine) for name in TEXTURES}
        plant = Plant(client, port, limits, cluster, engine, detectors)
        for name, detector in detectors.items():
            plant.release(name, detector)
        assert serve_champions(port=port, limits=limits, refresh_s=0.5) == f"http://127.0.0.1:{port}"
        yield plant
        stop_serving()


@pytest.fixture(scope="class")
def boxes(plant: Plant) -> Iterator[tuple[Detector, list[list[Image.Image]]]]:
    """The detector of a class of three views that is served beside the others, and samples of it."""
    detector = fit_views(plant.detectors["brick"].spec, plant.engine)
    plant.release("box", detector)
    plant.wait(lambda health: health["classes"] == 3)
    yield detector, views(3, seed=1)
    mlflow.MlflowClient().delete_registered_model_alias("box", registry.CHAMPION)
    plant.wait(lambda health: health["classes"] == 2)
