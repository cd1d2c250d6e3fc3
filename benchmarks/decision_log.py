"""What keeping decisions costs the service: ``python benchmarks/decision_log.py``.

Serves one class on the loopback address in turns without decisions, with the default settings, and keeping every image;
prints the answers a second of each turn, and the median of their ratios to the turn without. Then it prints what
counting one decision in Ray's metrics takes, as a part of an answer's time. Clients and service share this machine's
cores.
"""

import argparse
import asyncio
import time
from dataclasses import replace
from datetime import UTC, datetime
from statistics import median

import ray
import service_faults
from service_faults import FEW, Load, measure, noise_plant

from sprue.inference.calibration import Calibration
from sprue.release.decision_store import Decision
from sprue.serving import metrics
from sprue.serving.decision_log import DecisionLogSettings
from sprue.serving.launch import ServeSettings, serve_champions, stop_serving

OBSERVATIONS = 2000


@ray.remote
def seconds_of_counting() -> float:
    """Of one decision, in a process of Ray's as the service is one."""
    calibration = Calibration(tuple(map(float, range(100))), alpha=0.05, low=0.0, high=1.0, pixel_threshold=1.0)
    decision = Decision(
        "", datetime.now(UTC), "", "noise", "noise", 1, (), "openvino", 50.0, 0.5, 0.05, 95.0, False, 0.1, 8, ("00",)
    )
    phases = {"receive": 0.01, "decode": 0.01, "score": 0.1}
    started = time.perf_counter()
    for _ in range(OBSERVATIONS):
        metrics.observe(decision, phases, calibration)
    return (time.perf_counter() - started) / OBSERVATIONS


def answers_a_second(port: int, decisions: DecisionLogSettings | None) -> float:
    """Of a service that is started anew, and is warm."""
    url = serve_champions(ServeSettings(port=port, decisions=decisions))
    asyncio.run(measure(url, Load("warm-up"), FEW))
    load = asyncio.run(measure(url, Load(""), FEW))
    stop_serving()
    return len(load.answered) / load.seconds


def main() -> None:
    """Starts the services, measures, and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10.0, help="of a turn, after as many to warm up")
    arguments = parser.parse_args()
    service_faults.SECONDS = arguments.seconds
    with noise_plant() as (name, port):
        default = DecisionLogSettings(f"{name}/decisions")
        turns = {"none": None, "default": default, "every image": replace(default, sample=1.0)}
        rates: dict[str, list[float]] = {turn: [] for turn in turns}
        for _ in range(arguments.rounds):
            for turn, settings in turns.items():
                rates[turn].append(answers_a_second(port, settings))
                print(f"{turn:<12} {rates[turn][-1]:6.1f} answers/s", flush=True)
        counting = ray.get(seconds_of_counting.remote())
        rows, images = (sum(1 for _ in (name / "decisions" / kind).rglob("*")) for kind in ("rows", "images"))
    for turn in ("default", "every image"):
        ratios = [kept / without for kept, without in zip(rates[turn], rates["none"], strict=True)]
        print(f"{turn}: median ratio {median(ratios):.3f}, of {', '.join(f'{ratio:.3f}' for ratio in ratios)}")
    part = counting * median(rates["none"])
    print(f"counting a decision: {1e6 * counting:.0f} us, {100 * part:.2f} % of an answer's time")
    print(f"in the store: {rows} parts and folders, {images} images and folders")


if __name__ == "__main__":
    main()
