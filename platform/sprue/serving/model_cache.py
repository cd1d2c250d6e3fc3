"""Loaded champions, the engines that they share, and how they score samples together.

Shapes: B images of a batch, V views of a sample, N images of several samples, S side of the backbone's input,
C channels, H rows, W columns of a map.
"""

import logging
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from sprue.inference.detector import BATCH, Detector, Predictions
from sprue.inference.engines import Engine
from sprue.tracking.registry import RegisteredDetector

logger = logging.getLogger(__name__)

Key = TypeVar("Key", bound=Hashable)


class SharedEngine:
    """An engine that detectors with the same feature spec share; one thread at a time runs it."""

    def __init__(self, engine: Engine, side: int) -> None:
        """Shares an engine whose backbone's input has `side` pixels."""
        self.name = engine.name
        self._engine, self._side = engine, side
        self._lock = threading.Lock()

    def __call__(self, images_BSS3: NDArray[np.uint8]) -> list[NDArray[np.float16]]:
        """See `sprue.inference.engines.Engine`."""
        with self._lock:
            return self._engine(images_BSS3)

    @cached_property
    def blank_maps(self) -> list[NDArray[np.float16]]:
        """The maps [1, C, H, W] of a black image."""
        return [map_1CHW.copy() for map_1CHW in self.run_on_black()]

    def run_on_black(self) -> list[NDArray[np.float16]]:
        """Runs the engine on a black image."""
        return self(np.zeros((1, self._side, self._side, 3), np.uint8))


@dataclass(frozen=True, eq=False)
class ServedModel:
    """A champion that is ready to score; equal to itself alone."""

    champion: RegisteredDetector
    detector: Detector
    engine: SharedEngine

    @cached_property
    def bytes(self) -> int:
        """Memory of the flow's parameters and buffers."""
        return sum(tensor.nbytes for tensor in self.detector.flow.state_dict().values())


class ModelCache:
    """Loaded champions by their models' names, as many as fit: the least recently used ones make room.

    Attributes:
        bytes: Memory of those that are loaded.
    """

    def __init__(self, max_bytes: int, pinned: Collection[str] = ()) -> None:
        """Starts empty; `pinned` names models that stay, whatever they take."""
        self.bytes = 0
        self._max_bytes, self._pinned = max_bytes, frozenset(pinned)
        self._models: OrderedDict[str, ServedModel] = OrderedDict()  # the least recently used first

    def __len__(self) -> int:
        """How many are loaded."""
        return len(self._models)

    def __contains__(self, name: str) -> bool:
        """Whether a model's champion is loaded."""
        return name in self._models

    def use(self, name: str) -> ServedModel | None:
        """The loaded champion of a model, which counts as used now."""
        if name in self._models:
            self._models.move_to_end(name)
        return self._models.get(name)

    def put(self, served: ServedModel, is_used: bool) -> None:
        """Adds a champion, or replaces the model's former one in its place.

        One that is not used yet does not drive out others. One that does not fit beside the pinned ones is not kept.
        """
        name, is_new = served.champion.model_name, served.champion.model_name not in self._models
        room = self._max_bytes - sum(each.bytes for pinned, each in self._models.items() if pinned in self._pinned)
        if name not in self._pinned and served.bytes > room:
            self.drop(name)
            logger.warning(
                "%s is loaded for each request: its flow takes %.1f MiB of the %.1f MiB that pinned classes leave",
                served.champion, served.bytes / 2**20, max(room, 0) / 2**20,
            )  # fmt: skip
            return
        self.bytes += served.bytes - (0 if is_new else self._models[name].bytes)
        self._models[name] = served
        if is_new and not is_used:
            self._models.move_to_end(name, last=False)
        for each in [each for each in self._models if each not in self._pinned]:
            if self.bytes <= self._max_bytes:
                break
            self.drop(each)

    def drop(self, name: str) -> None:
        """Forgets a model's champion, if it is loaded."""
        if name in self._models:
            self.bytes -= self._models.pop(name).bytes


def score_together(tasks: Sequence[tuple[ServedModel, NDArray[np.uint8]]]) -> list[Predictions]:
    """Scores samples of several classes: runs each backbone on all of its images, then each flow on its own samples.

    A task is a sample's champion and its images [V, S, S, 3], resized to the backbone's input.
    """
    results: dict[int, Predictions] = {}
    for engine, indices in _groups((served.engine, index) for index, (served, _) in enumerate(tasks)).items():
        counts = [len(tasks[index][1]) for index in indices]
        maps = _run(engine, np.concatenate([tasks[index][1] for index in indices]))
        starts = np.cumsum([0, *counts])
        by_model = _groups((tasks[index][0], position) for position, index in enumerate(indices))
        for served, positions in by_model.items():
            rows = np.concatenate([np.arange(starts[position], starts[position + 1]) for position in positions])
            predictions = served.detector.predict_maps([map_NCHW[rows] for map_NCHW in maps])
            results |= {indices[position]: predictions[row : row + 1] for row, position in enumerate(positions)}
    return [results[index] for index in range(len(tasks))]


def _run(engine: Engine, inputs_NSS3: NDArray[np.uint8]) -> list[NDArray[np.float16]]:
    """The maps of all images, computed in batches."""
    parts = [engine(inputs_NSS3[start : start + BATCH]) for start in range(0, len(inputs_NSS3), BATCH)]
    return [np.concatenate(maps) for maps in zip(*parts, strict=True)]


def _groups(pairs: Iterable[tuple[Key, int]]) -> dict[Key, list[int]]:
    groups: dict[Key, list[int]] = defaultdict(list)
    for key, index in pairs:
        groups[key].append(index)
    return groups
