"""What Ray and the input add to the fit of a class: ``python benchmarks/fitting.py``.

Prints, measured in one run on classes of random features with the shapes of the default backbone's:

- the seconds that one class takes through Ray Train, from the request to the outcome, beyond the same loop in this
  process, which has imported everything; and the same for several classes in one queue;
- the share of a training epoch that goes into its input, in memory and streamed: the loop's time beyond that of the
  same loop on one batch that is there already.
"""

import argparse
import hashlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from upath import UPath

from sprue.features.tables import FeatureTable, write_part
from sprue.inference.memory import keep_freed_memory
from sprue.pipeline import connect_ray
from sprue.training.feed import Feed, MemoryFeed, StreamedFeed, read_maps
from sprue.training.fit import fit_classes
from sprue.training.loop import FitSettings, train
from sprue.training.worker import FitRequest, fit_flow

SHAPES = [
    (channels, side >> scale, side >> scale) for scale in range(3) for channels, side in ((40, 48), (80, 24), (192, 12))
]
CPU = torch.device("cpu")


def request_of(folder: Path, class_name: str, pictures: int, epochs: int) -> FitRequest:
    """Writes a class's features and asks for a fit of them with the recipe csflow-cpu's flow."""
    names = [hashlib.sha256(f"{class_name}{number}".encode()).hexdigest() for number in range(pictures)]
    for start in range(0, pictures, 64):
        part = names[start : start + 64]
        rng = np.random.default_rng(start)
        write_part(
            UPath(folder / class_name),
            part,
            [rng.normal(size=(len(part), *shape)).astype(np.float16) for shape in SHAPES],
        )
    samples = tuple((name,) for name in names)
    flow = {"maps": (2, 5, 8), "steps": 4, "hidden": 64, "kernels": (3, 5), "adaptation": "whiten", "noise": 0.3}
    return FitRequest(
        class_name, "benchmark", str(folder / class_name), 3, samples[: -pictures // 8], samples[-pictures // 8 :],
        "csflow", flow, FitSettings(epochs=epochs),
    )  # fmt: skip


def timed(action: Callable[[], object]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def here(requests: list[FitRequest]) -> float:
    """Seconds of the fits one after the other in this process."""
    return sum(timed(lambda request=request: fit_flow(request, CPU, lambda *_: None)) for request in requests)


def on_ray(requests: list[FitRequest], runs: Path) -> float:
    """Seconds of the fits as a queue on Ray."""
    return timed(lambda: fit_classes(requests, UPath(runs), lambda *_: None))


@dataclass
class Repeated:
    """A feed that gives one batch again and again, as input that costs nothing."""

    batch: list[Tensor]
    count: int

    def __len__(self) -> int:
        return self.count

    def ordered(self, size: int) -> Iterator[list[Tensor]]:
        """See `Feed`; in no order."""
        for start in range(0, self.count, size):
            yield [map_BCHW[: self.count - start] for map_BCHW in self.batch]

    shuffled = ordered


def input_shares(request: FitRequest, rounds: int) -> dict[str, float]:
    """The share of an epoch's time beyond that of the same loop on one batch, by the kind of feed."""
    table = FeatureTable(UPath(request.table))
    places = request.whole_config(table)["maps"]
    maps = read_maps(table, request.train, 1, places)
    feeds: dict[str, Feed] = {
        "none": Repeated([map_NCHW[:16] for map_NCHW in maps], len(request.train)),
        "in memory": MemoryFeed(maps),
        "streamed": StreamedFeed(table, request.train, 1, places, limit=sum(map_NCHW.nbytes for map_NCHW in maps) // 4),
    }
    validation = MemoryFeed(read_maps(table, request.validation, 1, places))
    settings = replace(request.settings, epochs=1)
    seconds: dict[str, list[float]] = {name: [] for name in feeds}
    for _ in range(rounds):
        for name, feed in feeds.items():
            train(
                request.build_flow(table), feed, validation, settings, CPU,
                lambda epoch, _, of=seconds[name]: of.append(epoch.seconds),
            )  # fmt: skip
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    return {name: 1 - medians["none"] / medians[name] for name in ("in memory", "streamed")}


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=6, help="in the queue (default: %(default)s)")
    parser.add_argument("--pictures", type=int, default=160, help="of a class (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=3, help="epochs that each feed is measured on (default: %(default)s)"
    )
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        requests = [
            request_of(Path(folder), f"class{number}", arguments.pictures, epochs=4)
            for number in range(arguments.classes)
        ]
        for name, share in input_shares(requests[0], arguments.rounds).items():
            print(f"input {name}: {share:.1%} of an epoch", flush=True)
        connect_ray()
        table = Table("classes", "here, s", "on Ray, s", "Ray adds, s")
        for chosen in (requests[:1], requests):
            alone, queued = here(chosen), on_ray(chosen, Path(folder, f"runs{len(chosen)}"))
            table.add_row(str(len(chosen)), f"{alone:.1f}", f"{queued:.1f}", f"{queued - alone:.1f}")
        Console().print(table)


if __name__ == "__main__":
    main()
