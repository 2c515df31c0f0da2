"""How long a kernel takes: over copies of its weights that no cache holds, in a graph."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cuda_driver import Device

LEAST_ROTATED = 160_000_000
"""Bytes of weights that are gone through before any is read again, at least."""
CACHES = 3
"""And at least so many times the second-level cache."""
LEAST_CALLS = 64
"""Calls a replay of a graph, so that neither an event nor a graph's start counts."""
MOST_SECONDS = 0.25
MOST_REPEATS, LEAST_REPEATS = 40, 5


@dataclass(frozen=True)
class Timing:
    """Seconds of one call.

    Parameters
    ----------
    median, fastest, slowest : float
        Over replays of a graph of `calls` calls.
    calls, replays, copies : int
    """

    median: float
    fastest: float
    slowest: float
    calls: int
    replays: int
    copies: int

    def to_json(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)


def copies_needed(weight_bytes: int, l2_bytes: int) -> int:
    """Return how many copies of the weights are rotated over."""
    total = max(LEAST_ROTATED, CACHES * l2_bytes)
    return max(2, -(-total // max(1, weight_bytes)))


def summarise(times: Sequence[float], calls: int, copies: int) -> Timing:
    """Sum up the times of replays of `calls` calls each."""
    each = [time / calls for time in times]
    return Timing(statistics.median(each), min(each), max(each), calls, len(each), copies)


def time_calls(device: Device, call: Callable[[int], None], copies: int) -> Timing:
    """Time ``call(copy)``, copies one after the other.

    The first replays say how many more fit `MOST_SECONDS`.
    """
    turns = -(-LEAST_CALLS // copies)

    def work() -> None:
        for _ in range(turns):
            for copy in range(copies):
                call(copy)

    first = device.time(work, LEAST_REPEATS)
    longest = max(statistics.median(first), 1e-7)
    more = min(MOST_REPEATS, int(MOST_SECONDS / longest))
    times = device.time(work, more) if more > LEAST_REPEATS else first
    return summarise(times, turns * copies, copies)


def copy_bandwidth(device: Device, size: int = 1 << 30) -> float:
    """Measure a copy on the device: bytes read and written a second."""
    source, to = device.allocate(size), device.allocate(size)
    try:
        device.fill(source, 1, size)
        device.fill(to, 2, size)
        times = device.time(lambda: device.copy(to, source, size), 20)
    finally:
        device.free(source)
        device.free(to)
    return 2 * size / statistics.median(times)
