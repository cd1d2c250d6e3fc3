"""How this process's memory is managed."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST = 2**30


def keep_freed_memory() -> None:
    """Lets this process keep what its tensors have freed, for the next ones; on Linux's C library, elsewhere nothing.

    A flow on a CPU makes temporary tensors of many megabytes. By default each is fresh from the system, and most of the
    time goes into mapping its pages: ``benchmarks/scoring.py`` compares.
    """
    if not sys.platform.startswith("linux"):
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        library.mallopt(_M_MMAP_THRESHOLD, _LARGEST)
        library.mallopt(_M_TRIM_THRESHOLD, _LARGEST)
