"""Loads champions in threads; those with the same feature spec share an engine."""

import logging
import threading
from collections import defaultdict
from weakref import WeakValueDictionary

import numpy as np

from sprue.inference.detector import Detector
from sprue.serving.model_cache import ServedModel, SharedEngine
from sprue.tracking import registry
from sprue.tracking.backbones import registered_engine
from sprue.tracking.digests import require_tags
from sprue.tracking.registry import RegisteredDetector
from sprue.tracking.summary import Summary

logger = logging.getLogger(__name__)


def require_complete(champion: RegisteredDetector) -> Summary:
    """Checks what can be checked without a champion's files; raises SprueError if its tags lack something."""
    require_tags(champion.tags, champion)
    return Summary.read(champion.tags, champion)


class Loader:
    """Loads champions; an engine lives as long as a champion that reads it."""

    def __init__(self, threads: int) -> None:
        """New engines run `threads` CPU threads."""
        self.engines: WeakValueDictionary[str, SharedEngine] = WeakValueDictionary()
        """The engines by their feature specs' fingerprints."""
        self._threads = threads
        self._building: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    def __call__(self, champion: RegisteredDetector) -> ServedModel:
        """Loads a champion and scores a blank sample, so that the first request is not slow and errors appear here.

        Raises:
            SprueError: If its files or its backbone's weights can't be had, or are others than those registered.
        """
        require_complete(champion)
        detector = registry.load_detector(champion)
        fingerprint = detector.spec.fingerprint
        with self._building[fingerprint]:  # other champions' loads go on
            engine = self.engines.get(fingerprint) or self._build(detector)
            self.engines[fingerprint] = engine
        detector.predict_maps([np.repeat(map_1CHW, len(detector.views), axis=0) for map_1CHW in engine.blank_maps])
        logger.info("loaded %s", champion)
        return ServedModel(champion, detector, engine)

    def is_local(self, champion: RegisteredDetector) -> bool:
        """Whether nothing has to be downloaded: a champion's files are on the disk, and its engine is loaded.

        Raises as `require_complete`.
        """
        return require_complete(champion).fingerprint in self.engines and registry.is_downloaded(champion)

    def try_engines(self) -> None:
        """Runs each engine on a black image; raises what it raises."""
        for engine in list(self.engines.values()):
            engine.run_on_black()

    def _build(self, detector: Detector) -> SharedEngine:
        return SharedEngine(registered_engine(detector, threads=self._threads), detector.spec.input_size)
