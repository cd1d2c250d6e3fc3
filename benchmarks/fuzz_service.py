"""Sends generated requests to the service: ``python benchmarks/fuzz_service.py --requests 20000 --seed 1``.

Starts a service of its own on the loopback address, with a detector fitted to noise. A tenth of the requests is made by
schemathesis from the service's OpenAPI description, right ones and wrong ones, and the answers are compared with it;
the others are images of every format that is read, damaged. Prints the answers by status, what was wrong, the slowest
answer, and the replica's memory after each tenth. Ends with status 1 if there was a failure of the service (5xx), an
answer that the description does not know, a request without an answer, or more growth than ``--growth`` after the first
tenth. Before it, the largest images are scored that the service takes, since it keeps the memory that it once had.
"""

import argparse
import asyncio
import io
import itertools
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import numpy as np
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from PIL import Image
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import Failure, FailureGroup
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi import checks

HANG_S = 20.0
"""Time for an answer: twice the service's default deadline."""

CLIENTS, TENTHS = 8, 10
CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]
SAVED: list[tuple[str, str, dict[str, object]]] = [
    ("1", "PNG", {}),
    ("L", "PNG", {}),
    ("P", "PNG", {}),
    ("RGBA", "PNG", {}),
    ("I;16", "PNG", {}),
    ("L", "JPEG", {}),
    ("RGB", "JPEG", {"progressive": True}),
    ("CMYK", "JPEG", {}),
    ("RGB", "BMP", {}),
    ("P", "BMP", {}),
    ("RGB", "TIFF", {}),
    ("L", "TIFF", {"compression": "tiff_lzw"}),
    ("F", "TIFF", {}),
    ("CMYK", "TIFF", {"compression": "tiff_deflate"}),
    ("1", "TIFF", {"compression": "group4"}),
    ("RGB", "TIFF", {"compression": "jpeg"}),
    ("RGB", "WEBP", {}),
    ("RGBA", "WEBP", {"lossless": True}),
    ("RGB", "PPM", {}),
    ("P", "GIF", {}),
]
"""Mode, format and options of the images that are damaged."""


@dataclass
class Tally:
    """What became of requests."""

    statuses: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0

    def answered(self, status: int, seconds: float) -> None:
        """Counts an answer."""
        self.statuses[str(status)] += 1
        self.slowest_s = max(self.slowest_s, seconds)
        if status >= 500:
            self.wrong[f"status {status}"] += 1

    def __add__(self, other: "Tally") -> "Tally":
        """Both together."""
        slowest_s = max(self.slowest_s, other.slowest_s)
        return Tally(self.statuses + other.statuses, self.wrong + other.wrong, slowest_s)

    def __str__(self) -> str:
        """On a few lines."""
        statuses = ", ".join(f"{count:,} x {status}" for status, count in sorted(self.statuses.items()))
        lines = [f"{self.statuses.total():,} requests: {statuses}; the slowest answer took {self.slowest_s:.2f} s"]
        return "\n".join([*lines, *(f"WRONG {count:,} x {what}" for what, count in self.wrong.most_common())])


def originals(rng: random.Random) -> list[bytes]:
    """A small image in each format that is read."""
    found = []
    for mode, kind, options in SAVED:
        buffer, size = io.BytesIO(), (rng.randint(1, 48), rng.randint(1, 48))
        pixels_HW3 = np.random.default_rng(rng.getrandbits(32)).integers(0, 256, (*size, 3), np.uint8)
        image = Image.fromarray(pixels_HW3)
        if mode == "I;16":
            image = Image.fromarray(pixels_HW3[..., 0].astype(np.uint16) * 257)
        image.convert(mode).save(buffer, kind, **options)
        found.append(buffer.getvalue())
    return found


def damaged(rng: random.Random) -> Iterator[bytes]:
    """Images of every format with one to four kinds of damage, without end; one in twenty is whole."""
    while True:
        images = originals(rng)
        for _ in range(10 * len(images)):
            data = bytearray(rng.choice(images))
            for _ in range(rng.choice([0, 1, 1, 1, 1, 2, 2, 3, 4]) if rng.random() > 0.05 else 0):
                _damage(data, rng, images)
            yield bytes(data)


def _damage(data: bytearray, rng: random.Random, images: list[bytes]) -> None:
    if not data:
        return
    place = rng.randrange(min(len(data), rng.choice([16, 64, len(data)])))  # headers more often than pixels
    match rng.randrange(7):
        case 0:
            data[place] ^= 1 << rng.randrange(8)
        case 1:
            data[place : place + 4] = rng.choice([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\0\0\1"])
        case 2:
            del data[place:]
        case 3:
            del data[place : place + rng.randint(1, 16)]
        case 4:
            data[place:place] = rng.randbytes(rng.randint(1, 64))
        case 5:
            other = rng.choice(images)
            data[place:] = other[rng.randrange(len(other)) :]
        case 6:
            data[place : place + 8] = rng.randbytes(8)


def send_images(url: str, model: str, count: int, seed: int, headers: dict[str, str]) -> Tally:
    """Scores damaged images, several at a time."""
    tally, rng = Tally(), random.Random(seed)
    bodies = itertools.islice(damaged(rng), count)
    queries = itertools.cycle(["", "?heatmap=true", "", "?maps=true", "", ""])

    async def client(session: aiohttp.ClientSession) -> None:
        for body in bodies:
            started = time.monotonic()
            try:
                async with session.post(f"/v1/classes/{model}/score{next(queries)}", data=body) as answer:
                    content = await answer.read()
                tally.answered(answer.status, time.monotonic() - started)
                if answer.status >= 500:
                    tally.wrong[content[:200].decode(errors="replace")] += 1
            except TimeoutError:
                tally.wrong[f"no answer in {HANG_S:g} s"] += 1
            except aiohttp.ClientError as error:
                tally.wrong[type(error).__name__] += 1

    async def run() -> None:
        sent = {"Content-Type": "application/octet-stream"} | headers
        timeout = aiohttp.ClientTimeout(total=HANG_S)
        async with aiohttp.ClientSession(url, headers=sent, timeout=timeout) as session:
            await asyncio.gather(*(client(session) for _ in range(CLIENTS)))

    asyncio.run(run())
    return tally


def send_described(url: str, model: str, count: int, seed: int, headers: dict[str, str]) -> Tally:
    """Sends what the OpenAPI description allows and what it does not, and compares the answers with it."""
    tally, session = Tally(), requests.Session()
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json", headers=headers)
    plans = [
        (operation, mode, {"name": model} if named else None)
        for operation in (each.ok() for each in schema.get_all_operations())
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
        for named in ((False, True) if "{name}" in operation.path else (False,))
        if mode is GenerationMode.POSITIVE or any(True for _ in operation.iter_parameters()) or operation.body
    ]
    for operation, mode, path_parameters in plans:

        @seeded(seed)
        @settings(
            max_examples=max(1, count // len(plans)),
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(mode, path_parameters=path_parameters))
        def ask(case: schemathesis.Case) -> None:
            _ask(case, url, session, headers, tally)

        ask()
    return tally


def _ask(case: schemathesis.Case, url: str, session: requests.Session, headers: dict[str, str], tally: Tally) -> None:
    started = time.monotonic()
    try:
        response = case.call(url, session, headers, timeout=HANG_S)
    except requests.Timeout:
        tally.wrong[f"no answer in {HANG_S:g} s"] += 1
        return
    tally.answered(response.status_code, time.monotonic() - started)
    try:
        case.validate_response(response, checks=CHECKS)
    except (Failure, FailureGroup) as found:
        for each in getattr(found, "exceptions", [found]):
            tally.wrong[f"{case.operation.label}: {str(each)[:300]}"] += 1


def main() -> int:
    """Starts the service, sends, and prints."""
    from service_faults import MODEL, large_images, noise_plant, process_of

    from sprue.serving.decision_log import DecisionLogSettings
    from sprue.serving.launch import ServeSettings, serve_champions

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--growth", type=float, default=100.0, metavar="MIB", help="of the replica's memory, at most")
    arguments = parser.parse_args()
    with noise_plant() as (folder, port):
        url = serve_champions(ServeSettings(port=port, decisions=DecisionLogSettings(str(Path(folder) / "decisions"))))
        replica, tally, tenth = process_of("ServeReplica"), Tally(), arguments.requests // TENTHS
        print(large_images(url, 2 * CLIENTS), flush=True)
        mib = []
        for number in range(TENTHS):
            tally += send_described(url, MODEL, tenth // 10, arguments.seed + number, {})
            tally += send_images(url, MODEL, tenth - tenth // 10, arguments.seed + number, {})
            mib.append(replica.memory_info().rss / 2**20)
            print(f"{number + 1}/{TENTHS}: the replica has {mib[-1]:.0f} MiB", file=sys.stderr, flush=True)
    print(tally)
    print(f"the replica's memory after each tenth, in MiB: {', '.join(f'{each:.0f}' for each in mib)}")
    return int(bool(tally.wrong) or mib[-1] - mib[0] > arguments.growth)


if __name__ == "__main__":
    sys.exit(main())
