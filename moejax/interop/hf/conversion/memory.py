"""Memory of a process that takes and frees arrays of tens of megabytes all the time."""

import ctypes

M_TRIM_THRESHOLD = -1  # as <malloc.h> calls them
M_MMAP_THRESHOLD = -3
KEPT_BYTES = 2**30


def keep_freed_memory() -> None:
    """Has this process keep freed memory for the next array, where the C library is glibc.

    By default memory of a large array goes back to the system with the array, and the next one
    begins with pages that the system must find and clear; a virtual machine asks its host for
    them. That took a third of the time of a conversion.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError, OSError):  # macOS, musl, Windows
        return
    mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
    mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
