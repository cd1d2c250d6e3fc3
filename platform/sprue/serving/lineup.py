"""The champions that are served, and the engines that they share.

Shapes: B pictures of a batch, V views of a sample, N pictures of several samples, S side of the backbone's input,
C channels, H rows, W columns of a map.
"""

import logging
import threading
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from sprue.errors import SprueError
from sprue.inference.detector import BATCH, Detector, Predictions
from sprue.inference.engines import Engine
from sprue.tracking import registry
from sprue.tracking.registry import RegisteredDetector

logger = logging.getLogger(__name__)

Key = TypeVar("Key", bound=Hashable)


class SharedEngine:
    """An engine for detectors with one feature spec; one thread at a time runs it."""

    def __init__(self, engine: Engine) -> None:
        """Shares an engine."""
        self.name = engine.name
        self._engine = engine
        self._lock = threading.Lock()

    def __call__(self, images_BSS3: NDArray[np.uint8]) -> list[NDArray[np.float16]]:
        """See `sprue.inference.engines.Engine`."""
        with self._lock:
            return self._engine(images_BSS3)


@dataclass(frozen=True)
class Served:
    """A champion that is ready to score."""

    champion: RegisteredDetector
    detector: Detector
    engine: SharedEngine


@dataclass(frozen=True)
class Lineup:
    """A snapshot of what is served.

    Attributes:
        served: By class name.
        failures: Why the registry's champion of a class is not served.
    """

    served: Mapping[str, Served] = field(default_factory=dict)
    failures: Mapping[str, str] = field(default_factory=dict)

    @property
    def engines(self) -> dict[str, SharedEngine]:
        """The engines by their feature specs' fingerprints."""
        return {each.detector.spec.fingerprint: each.engine for each in self.served.values()}


def require_champions() -> list[RegisteredDetector]:
    """The registry's champions.

    Raises:
        SprueError: If there are none.
    """
    found = registry.champions()
    if not found:
        raise SprueError(
            "the registry has no champion to serve: run the pipeline first (make demo, or make run DATA=...), "
            "or give a registered version the alias champion"
        )
    return found


def load_lineup(threads: int, previous: Lineup | None = None) -> Lineup:
    """Loads what the registry names; champions and engines that `previous` has already are taken over.

    A class whose champion can't be loaded keeps the version that it had, if any.

    Args:
        threads: CPU threads of an engine.
        previous: What is served now.

    Raises:
        SprueError: If the registry has no champions, or none of them can be loaded.
    """
    previous = previous or Lineup()
    engines = previous.engines
    served: dict[str, Served] = {}
    failures: dict[str, str] = {}
    for champion in require_champions():
        name, current = champion.class_name, previous.served.get(champion.class_name)
        if current is not None and current.champion == champion:
            served[name] = current
            continue
        try:
            served[name] = _load(champion, engines, threads)
        except Exception as error:  # Whatever is wrong with one class's model, the others are served.
            failures[name] = f"{champion.model_name} version {champion.version}: {error}"
            if failures[name] != previous.failures.get(name):
                logger.error("champion not loaded: %s", failures[name], exc_info=not isinstance(error, SprueError))
            if current is not None:
                served[name] = current
    if not served:
        raise SprueError(f"no champion can be loaded: {'; '.join(failures.values())}")
    return Lineup(served, failures)


def _load(champion: RegisteredDetector, engines: dict[str, SharedEngine], threads: int) -> Served:
    """Loads a champion and scores a blank sample with it, so that the first request is neither slow nor a surprise."""
    detector = registry.load_detector(champion)
    fingerprint = detector.spec.fingerprint
    engine = engines.get(fingerprint) or SharedEngine(detector.build_engine(threads=threads))
    side = detector.spec.input_size
    detector.predict_inputs(np.zeros((len(detector.views), side, side, 3), np.uint8), engine)
    engines[fingerprint] = engine
    logger.info("serving %s version %d", champion.model_name, champion.version)
    return Served(champion, detector, engine)


def score_together(tasks: Sequence[tuple[Served, NDArray[np.uint8]]]) -> list[Predictions]:
    """Scores samples of several classes: each backbone runs for all of its pictures, then each class's flow.

    Args:
        tasks: Champions and the inputs of a sample's views [V, S, S, 3].

    Returns:
        For each task the predictions of its one sample.
    """
    results: dict[int, Predictions] = {}
    for engine, indices in _groups((served.engine, index) for index, (served, _) in enumerate(tasks)).items():
        counts = [len(tasks[index][1]) for index in indices]
        maps = _run(engine, np.concatenate([tasks[index][1] for index in indices]))
        starts = np.cumsum([0, *counts])
        by_champion = _groups((tasks[index][0].champion, place) for place, index in enumerate(indices))
        for places in by_champion.values():
            rows = np.concatenate([np.arange(starts[place], starts[place + 1]) for place in places])
            detector = tasks[indices[places[0]]][0].detector
            predictions = detector.predict_pictures([map_NCHW[rows] for map_NCHW in maps])
            results |= {indices[place]: predictions[row : row + 1] for row, place in enumerate(places)}
    return [results[index] for index in range(len(tasks))]


def _run(engine: Engine, inputs_NSS3: NDArray[np.uint8]) -> list[NDArray[np.float16]]:
    """The maps of all pictures, a few of them at a time."""
    parts = [engine(inputs_NSS3[start : start + BATCH]) for start in range(0, len(inputs_NSS3), BATCH)]
    return [np.concatenate(maps) for maps in zip(*parts, strict=True)]


def _groups(pairs: Iterable[tuple[Key, int]]) -> dict[Key, list[int]]:
    groups: dict[Key, list[int]] = defaultdict(list)
    for key, index in pairs:
        groups[key].append(index)
    return groups
