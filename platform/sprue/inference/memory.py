"""Memory management of this process."""

import ctypes
import sys

LARGEST = 2**30

ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(LARGEST),
    "MALLOC_TRIM_THRESHOLD_": str(LARGEST),
}
"""Environment variables with the effect of `keep_freed_memory`, for processes that are started with them."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


def keep_freed_memory() -> None:
    """Keeps memory that tensors have freed for later tensors, with glibc; does nothing elsewhere.

    A flow on a CPU makes temporary tensors of many megabytes. By default glibc requests each from the system, and
    mapping the pages takes much of the time: ``benchmarks/scoring.py`` compares. Threads that run already have their
    own arenas, which this does not change.
    """
    if not sys.platform.startswith("linux"):
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        library.mallopt(_M_ARENA_MAX, 1)
        library.mallopt(_M_MMAP_THRESHOLD, LARGEST)
        library.mallopt(_M_TRIM_THRESHOLD, LARGEST)
