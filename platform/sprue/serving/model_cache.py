"""The champions that are served and the engines that they share.

Shapes: B images of a batch, V views of a sample, N images of several samples, S side of the backbone's input,
C channels, H rows, W columns of a map.
"""

import logging
import threading
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from sprue.errors import SprueError
from sprue.inference.detector import BATCH, Detector, Predictions
from sprue.inference.engines import Engine
from sprue.serving.errors import ApiError
from sprue.tracking import registry
from sprue.tracking.names import AmbiguousClassError, UnknownClassError, resolve_name
from sprue.tracking.registry import RegisteredDetector

logger = logging.getLogger(__name__)

Key = TypeVar("Key", bound=Hashable)


class SharedEngine:
    """An engine that detectors with the same feature spec share; one thread at a time runs it."""

    def __init__(self, engine: Engine) -> None:
        self.name = engine.name
        self._engine = engine
        self._lock = threading.Lock()

    def __call__(self, images_BSS3: NDArray[np.uint8]) -> list[NDArray[np.float16]]:
        """See `sprue.inference.engines.Engine`."""
        with self._lock:
            return self._engine(images_BSS3)


@dataclass(frozen=True)
class ServedModel:
    """A champion that is ready to score."""

    champion: RegisteredDetector
    detector: Detector
    engine: SharedEngine


@dataclass(frozen=True)
class ModelCache:
    """A snapshot of what is served.

    Attributes:
        served: The champions by their models' names, ``<dataset>.<class>``.
        failures: Why the registry's champion is not served, by its model's name.
    """

    served: Mapping[str, ServedModel] = field(default_factory=dict)
    failures: Mapping[str, str] = field(default_factory=dict)

    @property
    def engines(self) -> dict[str, SharedEngine]:
        """The engines by their feature specs' fingerprints."""
        return {each.detector.spec.fingerprint: each.engine for each in self.served.values()}

    def find(self, name: str) -> ServedModel:
        """The champion of a class, by its model's name or, where that is unambiguous, by the class's.

        Raises:
            ApiError: 404 for an unknown name, 409 for an ambiguous one, 503 if the champion could not be loaded.
        """
        try:
            model = resolve_name(name, sorted({*self.served, *self.failures}))
        except UnknownClassError as error:
            raise ApiError(HTTPStatus.NOT_FOUND, "unknown_class", str(error)) from error
        except AmbiguousClassError as error:
            raise ApiError(HTTPStatus.CONFLICT, "ambiguous_class", str(error)) from error
        if model not in self.served:
            message = f"class {model!r} is unavailable: {self.failures[model]}"
            raise ApiError(HTTPStatus.SERVICE_UNAVAILABLE, "class_unavailable", message)
        return self.served[model]


def require_champions() -> list[RegisteredDetector]:
    """The registry's champions; raises SprueError if there are none."""
    found = registry.champions()
    if not found:
        raise SprueError(
            "the registry has no champion to serve: run the pipeline first (`sprue demo` or `sprue run`), "
            "or assign the alias champion to a registered version"
        )
    return found


def load_models(threads: int, previous: ModelCache | None = None) -> ModelCache:
    """Loads the registry's champions, or reuses those of `previous`, and its engines.

    New engines run `threads` CPU threads. A class whose champion can't be loaded keeps the version that it had, if any.

    Raises:
        SprueError: If the registry has no champions, or none of them can be loaded.
    """
    previous = previous or ModelCache()
    engines = previous.engines
    served: dict[str, ServedModel] = {}
    failures: dict[str, str] = {}
    for champion in require_champions():
        name, current = champion.model_name, previous.served.get(champion.model_name)
        if current is not None and current.champion == champion:
            served[name] = current
            continue
        try:
            served[name] = _load(champion, engines, threads)
        except Exception as error:  # one class's failure must not stop the others
            failures[name] = f"{champion}: {error}"
            if failures[name] != previous.failures.get(name):
                logger.error("champion not loaded: %s", failures[name], exc_info=not isinstance(error, SprueError))
            if current is not None:
                served[name] = current
    if not served:
        raise SprueError(f"no champion can be loaded: {'; '.join(failures.values())}")
    return ModelCache(served, failures)


def _load(champion: RegisteredDetector, engines: dict[str, SharedEngine], threads: int) -> ServedModel:
    """Loads a champion and scores a blank sample, so that the first request is not slow and errors appear here."""
    detector = registry.load_detector(champion)
    fingerprint = detector.spec.fingerprint
    engine = engines.get(fingerprint) or SharedEngine(detector.build_engine(threads=threads))
    side = detector.spec.input_size
    detector.predict_inputs(np.zeros((len(detector.views), side, side, 3), np.uint8), engine)
    engines[fingerprint] = engine
    logger.info("serving %s", champion)
    return ServedModel(champion, detector, engine)


def score_together(tasks: Sequence[tuple[ServedModel, NDArray[np.uint8]]]) -> list[Predictions]:
    """Scores samples of several classes: runs each backbone on all of its images, then each flow on its own samples.

    A task is a sample's champion and its images [V, S, S, 3], resized to the backbone's input.
    """
    results: dict[int, Predictions] = {}
    for engine, indices in _groups((served.engine, index) for index, (served, _) in enumerate(tasks)).items():
        counts = [len(tasks[index][1]) for index in indices]
        maps = _run(engine, np.concatenate([tasks[index][1] for index in indices]))
        starts = np.cumsum([0, *counts])
        by_champion = _groups((tasks[index][0].champion, position) for position, index in enumerate(indices))
        for positions in by_champion.values():
            rows = np.concatenate([np.arange(starts[position], starts[position + 1]) for position in positions])
            detector = tasks[indices[positions[0]]][0].detector
            predictions = detector.predict_maps([map_NCHW[rows] for map_NCHW in maps])
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
