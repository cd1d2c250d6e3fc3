"""What keeping freed memory brings to scoring on a CPU: ``python benchmarks/scoring.py``.

Scores the same maps with PatchFlow and CS-Flow, at the sizes of the CPU recipes, in two fresh processes in turn, one of
which keeps what its tensors free. Prints images a second and their ratio.
"""

import multiprocessing
import statistics
import time

import numpy as np
import torch

from defectflow import build_flow
from sprue.config import ScoringSettings
from sprue.inference.detector import score_features
from sprue.inference.memory import keep_freed_memory

IMAGES = 64
ROUNDS = 3
CASES = {
    "patchflow": {"channels": (40, 80, 192) * 3, "adapted": 768, "steps": 1},
    "csflow": {"channels": (40, 80, 192) * 3, "maps": (2, 5, 8), "hidden": 96, "adaptation": "whiten", "noise": 0.3},
}


def rates(keep: bool) -> dict[str, float]:
    """Images a second of each flow."""
    if keep:
        keep_freed_memory()
    rng = np.random.default_rng(0)
    maps = [
        rng.normal(size=(IMAGES, channels, 48 >> (block + scale), 48 >> (block + scale))).astype(np.float16)
        for scale in range(3)
        for block, channels in enumerate((40, 80, 192))
    ]
    found = {}
    for name, config in CASES.items():
        torch.manual_seed(0)
        flow = build_flow(name, **config)
        score_features(flow, ScoringSettings(), [each[:16] for each in maps])
        start = time.perf_counter()
        score_features(flow, ScoringSettings(), maps)
        found[name] = IMAGES / (time.perf_counter() - start)
    return found


if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    runs: dict[bool, list[dict[str, float]]] = {False: [], True: []}
    for _ in range(ROUNDS):
        for keep in runs:
            with context.Pool(1) as pool:
                runs[keep].append(pool.apply(rates, (keep,)))
    for name in CASES:
        plain, kept = (statistics.median(run[name] for run in runs[keep]) for keep in (False, True))
        print(f"{name:10s} {plain:6.1f} images/s, with freed memory kept {kept:6.1f}: {kept / plain:.2f} times")
