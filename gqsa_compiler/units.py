"""How numbers with units are written for people."""

from __future__ import annotations

import math


def bytes_text(count: float) -> str:
    """Write a number of bytes with a decimal unit, e.g. ``98.4 MB``."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def seconds_text(seconds: float) -> str:
    """Write a duration, e.g. ``1.4 s``, ``3 min 05 s`` or ``2 h 10 min``; not finite is empty."""
    if not math.isfinite(seconds):
        return ""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
