"""Writes a replica's entries of the access log, beside its requests."""

import logging
import time
from concurrent.futures import ThreadPoolExecutor

from sprue.release.access_log import AccessLog, Kind
from sprue.store import location

logger = logging.getLogger(__name__)

AGAIN_S = 3600.0
"""A key's repeated requests, such as those of a monitor, are an entry once in this time."""


class AccessWriter:
    """Appends to the access log in a thread of its own; what the store does not take goes to the service's log."""

    def __init__(self, folder: str) -> None:
        """Of a folder or s3 URL."""
        self._log = AccessLog(location(folder))
        self._thread = ThreadPoolExecutor(1, "access")
        self._seen: dict[tuple[str, ...], float] = {}

    def add(self, kind: Kind, by: str, origin: str, detail: str, model: str = "") -> None:
        """Adds an entry."""
        self._thread.submit(self._append, kind, by, origin, detail, model)

    def add_once(self, kind: Kind, by: str, origin: str, detail: str) -> None:
        """Adds an entry, unless there was the same within `AGAIN_S`."""
        now, entry = time.monotonic(), (kind, by, origin, detail)
        self._seen = {each: at for each, at in self._seen.items() if now - at < AGAIN_S}
        if entry not in self._seen:
            self._seen[entry] = now
            self.add(kind, by, origin, detail)

    def _append(self, kind: Kind, by: str, origin: str, detail: str, model: str) -> None:
        try:
            self._log.append(kind, by, origin, detail, model)
        except Exception as error:  # of any store; nobody looks at the thread's results
            logger.error("not in the access log, since %s: %s by %s from %s: %s", error, kind, by, origin, detail)
