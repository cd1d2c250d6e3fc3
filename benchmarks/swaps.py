"""Swaps of versions and kills of the service's processes under load: ``python benchmarks/swaps.py``.

Starts a service of two replicas on the loopback address, with two versions of a detector fitted to noise whose
thresholds differ. While clients score, it swaps the champion and kills a replica, Ray Serve's proxy, its controller and
the replicas' coordinator in turn. It prints what became of the requests, whether each answer's version, digest and
threshold belong together, and for how long replicas disagreed: how long after somebody had an answer of a new version
another one still got the old one, for a request that began later.

A request that is refused (at once, or with status 503 and Retry-After) was not accepted: the client asks again. One
whose connection breaks, or that gets another error, was cut; the client repeats it, too, and it counts as lost if no
answer comes within a minute.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import shutil
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import cycle
from pathlib import Path

import aiohttp
import mlflow
import psutil
from service_faults import MODEL, jpeg, noise_plant

from sprue.serving.launch import ServeSettings, serve_champions
from sprue.tracking import registry
from sprue.tracking.summary import detector_tags

CLIENTS, REPLICAS = 8, 2
ACTORS = {
    "replica": "ServeReplica",
    "proxy": "ProxyActor",
    "controller": "ServeController",
    "coordinator": "CoordinatorActor",
}
PATIENCE_S = 60.0


@dataclass(frozen=True)
class Answer:
    """When a client asked and had its answer, and what made it."""

    asked: float
    answered: float
    version: int
    digest: str
    threshold: float
    is_consistent: bool


@dataclass
class Record:
    """What clients saw, and what was done."""

    answers: list[Answer] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    cut: Counter[str] = field(default_factory=Counter)
    repeated: int = 0
    lost: int = 0
    swaps: list[tuple[float, int]] = field(default_factory=list)
    slow: list[str] = field(default_factory=list)


def second_version(folder: Path) -> int:
    """Registers the champion's detector with a lower threshold."""
    source = folder / "second"
    shutil.copytree(folder / "model", source)
    file = source / "artifacts" / "detector" / "detector.json"
    saved = json.loads(file.read_text())
    saved["calibration"]["alpha"] = 0.4
    file.write_text(json.dumps(saved))
    tags = detector_tags(source / "artifacts" / "detector")
    return int(mlflow.MlflowClient().create_model_version(MODEL, str(source), run_id=None, tags=tags).version)


async def score(session: aiohttp.ClientSession, record: Record, body: bytes) -> None:
    """Scores an image, however often that has to be asked for."""
    started, was_cut, kind = time.monotonic(), False, "during nothing"
    while time.monotonic() < started + PATIENCE_S:
        asked, pause_s = time.monotonic(), 0.1
        try:
            async with session.post(f"/v1/classes/{MODEL}/score", data=body) as answer:
                found = await answer.json()
            if answer.status == 200:
                model, is_above = found["model"], found["score"] > found["threshold"]
                record.answers.append(
                    Answer(
                        asked, time.monotonic(), model["version"], model["digest"], found["threshold"],
                        found["is_anomalous"] == is_above,
                    )
                )  # fmt: skip
                record.repeated += was_cut
                return
            kind = f"{answer.status} {found['error']['code']}"
            if answer.status == 503 and "Retry-After" in answer.headers:
                record.refused[kind] += 1
                pause_s = min(1.0, float(answer.headers["Retry-After"]))
                await asyncio.sleep(pause_s)
                continue
        except aiohttp.ClientConnectorError:
            record.refused["connection refused"] += 1
            await asyncio.sleep(pause_s)
            continue
        except (aiohttp.ClientError, TimeoutError) as error:
            kind = type(error).__name__
        was_cut = True
        record.cut[kind] += 1
        await asyncio.sleep(pause_s)
    record.lost += 1


async def client(session: aiohttp.ClientSession, record: Record, total: int, begun: list[int]) -> None:
    """Scores until `total` requests of all clients have begun."""
    body = jpeg()
    while begun[0] < total:
        begun[0] += 1
        await score(session, record, body)


async def swap(record: Record, version: int) -> None:
    """Makes a version champion, and waits until it is seen."""
    started = time.monotonic()
    alias = mlflow.MlflowClient().set_registered_model_alias
    await asyncio.to_thread(alias, MODEL, registry.CHAMPION, str(version))
    record.swaps.append((started, version))
    while not any(each.version == version and each.asked > started for each in record.answers[-50:]):
        if time.monotonic() > started + PATIENCE_S:
            record.slow.append(f"version {version} was not seen in {PATIENCE_S:.0f} s")
            return
        await asyncio.sleep(0.05)


async def kill(record: Record, kind: str) -> None:
    """Kills a process, and waits for the next answer."""
    found = [each for each in psutil.Process().children(recursive=True) if _is(each, ACTORS[kind])]
    if not found:
        record.slow.append(f"there was no {kind} to kill")
        return
    random.choice(found).kill()
    killed = time.monotonic()
    while not (record.answers and record.answers[-1].asked > killed):
        if time.monotonic() > killed + PATIENCE_S:
            record.slow.append(f"no answer for {PATIENCE_S:.0f} s after a {kind} was killed")
            return
        await asyncio.sleep(0.05)


def _is(process: psutil.Process, actor: str) -> bool:
    try:
        return " ".join(process.cmdline()).startswith(f"ray::{actor}")
    except psutil.Error:
        return False


async def disturb(record: Record, total: int, swaps: int, kills: int, begun: list[int]) -> Counter[str]:
    """Swaps and kills, spread over all requests; returns how often each was done."""
    done: Counter[str] = Counter()
    events = ["swap"] * swaps + [kind for kind, _ in zip(cycle(ACTORS), range(kills), strict=False)]
    random.Random(0).shuffle(events)
    for number, event in enumerate(events, 1):
        while begun[0] < number * total / (len(events) + 1):
            await asyncio.sleep(0.05)
        if event == "swap":
            await swap(record, 1 + (done["swap"] + 1) % 2)
        else:
            await kill(record, event)
        done[event] += 1
    return done


async def run(url: str, total: int, swaps: int, kills: int) -> tuple[Record, Counter[str], float]:
    """All requests, with swaps and kills among them; and the seconds that they took."""
    record, begun, started = Record(), [0], time.monotonic()
    connector, timeout = aiohttp.TCPConnector(limit=0, force_close=False), aiohttp.ClientTimeout(total=30)
    headers = {"Content-Type": "image/jpeg", "X-Request-Timeout-Ms": "20000"}
    async with aiohttp.ClientSession(url, connector=connector, timeout=timeout, headers=headers) as session:
        crowd = [asyncio.create_task(client(session, record, total, begun)) for _ in range(CLIENTS)]
        done = await disturb(record, total, swaps, kills, begun)
        await asyncio.gather(*crowd)
    return record, done, time.monotonic() - started


def disagreement(record: Record) -> tuple[int, float]:
    """How many answers came of an old version after a new one had been seen, and for how many seconds in all."""
    ends = [began for began, _ in record.swaps[1:]] + [float("inf")]
    late, seconds = 0, 0.0
    for (began, version), end in zip(record.swaps, ends, strict=True):
        during = [each for each in record.answers if began < each.asked < end]
        first = min((each.answered for each in during if each.version == version), default=float("inf"))
        found = [each.asked for each in during if each.version != version and each.asked > first]
        late += len(found)
        seconds += max(found) - first if found else 0.0
    return late, seconds


def main() -> None:
    """Starts the service, disturbs it, and prints what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--swaps", type=int, default=20)
    parser.add_argument("--kills", type=int, default=20)
    arguments = parser.parse_args()
    with noise_plant() as (folder, port):
        second_version(folder)
        url = serve_champions(ServeSettings(port=port, replicas=REPLICAS, refresh_s=1.0))
        record, done, seconds = asyncio.run(run(url, arguments.requests, arguments.swaps, arguments.kills))
        pairs = {
            (number, found.digest, json.loads(found.tags["sprue.summary"])["threshold"])
            for number in (1, 2)
            for found in [registry.find_registered(MODEL, str(number))]
        }
    mixed = sum((each.version, each.digest, each.threshold) not in pairs for each in record.answers)
    late, apart_s = disagreement(record)
    taken = sorted(each.answered - each.asked for each in record.answers)
    print(f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[1]:.0f}")
    print(f"{arguments.requests} requests of {CLIENTS} clients in {seconds:.0f} s, {REPLICAS} replicas; {dict(done)}")
    print(f"answered: {len(record.answers)}; p50 {taken[len(taken) // 2]:.2f} s, longest {taken[-1]:.1f} s")
    print(f"refused, and asked again: {dict(record.refused) or 'none'}")
    print(f"accepted and cut: {dict(record.cut) or 'none'}; answered on repetition: {record.repeated} requests")
    print(f"lost: {record.lost}")
    print(f"version, digest and threshold that do not belong together: {mixed}")
    print(f"decisions that do not fit score and threshold: {sum(not each.is_consistent for each in record.answers)}")
    print(f"answers of the old version after the new one was seen: {late}, within {apart_s:.2f} s in all")
    print("\n".join(record.slow) or "every swap was seen, and every kill was followed by an answer")


if __name__ == "__main__":
    main()
