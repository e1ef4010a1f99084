"""Settings of threads and memory for every process that imports the library.

Threads that wait for work should not spin: beside another busy process, spinning makes a step take
two to four times as long. Memory that was freed stays in the process for the next step, since
fetching it anew costs a page fault every 4 KB. The values were measured (CHANGELOG).
"""

import ctypes
import os
import platform
from contextlib import suppress

THREADS = {  # read when torch loads its OpenMP; what somebody has set counts
    "GOMP_SPINCOUNT": "1000",  # GNU's, on Linux: rounds before a thread sleeps; its own 300,000
    "KMP_BLOCKTIME": "1",  # LLVM's, on macOS: milliseconds; its own 200
}
MALLOPT = {-1: 2**30, -3: 2**25}  # glibc: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, in bytes


def tune() -> None:
    """Set them, where they act."""
    for name, value in THREADS.items():
        os.environ.setdefault(name, value)
    if platform.libc_ver()[0] == "glibc":
        with suppress(OSError, AttributeError):
            for option, value in MALLOPT.items():
                ctypes.CDLL(None).mallopt(option, value)
