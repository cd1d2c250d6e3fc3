"""Exact AUPRO beside anomalib's: ``python benchmarks/overlap.py --anomalib /path/to/its/python``.

anomalib is no dependency: make an environment of its own for it, and name that environment's Python. Both compute the
per-region overlap of the same 1,000 maps of 256 x 256 with about as many regions, in turn, each in a fresh process with
as many threads as it likes, reading files and importing not counted. Prints both values, seconds, what memory is added,
and the ratio.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter

IMAGES, SIDE = 1000, 256
ROUNDS = 3

OURS = """
import json, resource, sys, time
import numpy as np
from sprue.evaluation.pixels import count_pixels
maps_NHW, masks_NHW = np.load(sys.argv[1]), np.load(sys.argv[2])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
started = time.perf_counter()
counts = count_pixels(maps_NHW.__getitem__, masks_NHW.__getitem__, len(maps_NHW))
value = float(counts.curve.overlap_area(counts.overlap_K))
seconds = time.perf_counter() - started
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(json.dumps({"value": value, "seconds": seconds, "mib": peak / 1024}))
"""

ANOMALIB = """
import json, resource, sys, time
import numpy as np, torch
from anomalib.metrics.aupro import _AUPRO
maps_NHW, masks_NHW = torch.from_numpy(np.load(sys.argv[1])), torch.from_numpy(np.load(sys.argv[2]))
metric = _AUPRO()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
started = time.perf_counter()
for start in range(0, len(maps_NHW), 32):
    metric.update(maps_NHW[start : start + 32], masks_NHW[start : start + 32])
value = float(metric.compute())
seconds = time.perf_counter() - started
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(json.dumps({"value": value, "seconds": seconds, "mib": peak / 1024}))
"""


def write_maps(folder: Path) -> tuple[Path, Path]:
    """Smooth maps from 0 to 1, and masks with up to three discs on half of the images, where the maps are higher."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    maps = np.empty((IMAGES, SIDE, SIDE), np.float32)
    masks = np.zeros((IMAGES, SIDE, SIDE), bool)
    for index in range(IMAGES):
        for _ in range(rng.integers(1, 4) if index % 2 else 0):
            row, column, radius = *rng.integers(0, SIDE, 2), rng.integers(4, 24)
            masks[index] |= (rows - row) ** 2 + (columns - column) ** 2 < radius**2
        maps[index] = gaussian_filter(rng.normal(size=(SIDE, SIDE)), 4) * 8 + gaussian_filter(1.5 * masks[index], 3)
    maps = (maps - maps.min()) / (maps.max() - maps.min())
    np.save(folder / "maps.npy", maps)
    np.save(folder / "masks.npy", masks)
    return folder / "maps.npy", folder / "masks.npy"


def measure(python: str, code: str, paths: tuple[Path, Path]) -> dict[str, float]:
    """What a program prints of the maps and masks."""
    command = [python, "-W", "ignore", "-c", code, *map(str, paths)]
    done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--anomalib", metavar="PYTHON", required=True)
    arguments = parser.parse_args()
    programs = {"sprue": (sys.executable, OURS), "anomalib": (arguments.anomalib, ANOMALIB)}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in programs}
    with tempfile.TemporaryDirectory() as folder:
        paths = write_maps(Path(folder))
        for _ in range(ROUNDS):
            for name, (python, code) in programs.items():
                runs[name].append(measure(python, code, paths))
    seconds = {name: statistics.median(run["seconds"] for run in each) for name, each in runs.items()}
    for name, each in runs.items():
        print(f"{name:9s} AUPRO {each[0]['value']:.6f}  {seconds[name]:6.2f} s  {each[0]['mib']:6.0f} MiB")
    print(f"sprue is {seconds['anomalib'] / seconds['sprue']:.2f} times as fast")
