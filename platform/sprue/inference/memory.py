"""How this process's memory is managed."""

import ctypes
import sys

LARGEST = 2**30

ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(LARGEST),
    "MALLOC_TRIM_THRESHOLD_": str(LARGEST),
}
"""The same as `keep_freed_memory`, for processes that are started with these variables."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


def keep_freed_memory() -> None:
    """Lets this process keep what its tensors have freed, for the next ones; on Linux's C library, elsewhere nothing.

    A flow on a CPU makes temporary tensors of many megabytes. By default each is fresh from the system, and much of the
    time goes into mapping its pages: ``benchmarks/scoring.py`` compares. Threads that run already have memory of their
    own, for which this does nothing.
    """
    if not sys.platform.startswith("linux"):
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        library.mallopt(_M_ARENA_MAX, 1)
        library.mallopt(_M_MMAP_THRESHOLD, LARGEST)
        library.mallopt(_M_TRIM_THRESHOLD, LARGEST)
