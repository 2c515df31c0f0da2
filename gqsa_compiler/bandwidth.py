"""How fast this machine reads memory: what a decode step's speed is held against."""

from __future__ import annotations

import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

_CACHE_ROOT = Path("/sys/devices/system/cpu")
# At least this much, if memory allows: a virtual machine may see a part of a shared cache only.
_LEAST_BYTES = 512 << 20
_CACHES = 4  # a buffer this many times the last-level cache is hardly ever found in it
_FREE_SHARE = 4  # and never more than one part in this many of the memory that is available
_MEMINFO = Path("/proc/meminfo")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def last_level_cache_bytes(root: Path = _CACHE_ROOT) -> int:
    """Return the bytes of the largest cache of CPU 0; 0 where the system does not tell."""
    sizes = [0]
    for path in root.glob("cpu0/cache/index*/size"):
        text = path.read_text().strip()
        if text[:-1].isdigit() and text[-1] in _UNITS:
            sizes.append(int(text[:-1]) * _UNITS[text[-1]])
    return max(sizes)


def available_bytes(meminfo: Path = _MEMINFO) -> int:
    """Return the bytes that can be taken without swapping, file caches that would go included."""
    try:
        found = re.search(r"^MemAvailable:\s*(\d+) kB$", meminfo.read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found:
        return int(found[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def measure_read_bandwidth(threads: int | None = None, repeats: int = 7) -> float:
    """Measure the rate at which threads together read a buffer that no cache holds.

    The buffer has 512 MiB, or four times the last-level cache if that is more, but never more
    than a quarter of the available memory.

    Each thread takes the maximum of its own part of an int32 buffer (numpy's vectorised
    reduction, which releases the interpreter lock and does less work a byte than memory needs to
    deliver it). The best repeat counts: the others were disturbed.

    Parameters
    ----------
    threads : int, optional
        Threads that read; one a CPU by default.
    repeats : int
        Passes over the buffer.

    Returns
    -------
    float
        Bytes a second.
    """
    count = threads or len(os.sched_getaffinity(0))
    wanted = max(_CACHES * last_level_cache_bytes(), _LEAST_BYTES)
    size = min(wanted, available_bytes() // _FREE_SHARE)
    # Written, not only reserved: untouched pages all map to one page of zeros.
    parts = np.array_split(np.ones(size // 4, np.int32), count)
    best = float("inf")
    with ThreadPoolExecutor(count) as pool:
        for _ in range(repeats):
            start = time.perf_counter()
            list(pool.map(np.max, parts))
            best = min(best, time.perf_counter() - start)
    return sum(part.nbytes for part in parts) / best
