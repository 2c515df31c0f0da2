"""How long work tells its caller where it is."""

from __future__ import annotations

import time
from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total): `total` counts the steps of a stage, 0 where it is not known.
"""

Status = Callable[[str], None]
"""Called before that, with a few words about the step that is done, e.g. ``loss 0.412``."""


class Remaining:
    """Estimates the time left of a stage from the steps done since this was made.

    Parameters
    ----------
    done : int
        Steps done before: a stage that is resumed does not begin at 0.
    """

    def __init__(self, done: int = 0) -> None:
        self._first = done
        self._started = time.monotonic()

    def seconds(self, done: int, total: int) -> float | None:
        """Return the time left in seconds, or None as long as no step is done."""
        made = done - self._first
        if made <= 0 or total <= 0:
            return None
        return (time.monotonic() - self._started) / made * max(total - done, 0)
