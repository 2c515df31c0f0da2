"""How long work tells its caller where it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

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


@dataclass
class Stages:
    """The stages of some work: says where it is, and keeps how long each took.

    Parameters
    ----------
    progress : Progress
    seconds : dict
        Of each stage that is over, by its name.
    """

    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Run the block as a stage of one step."""
        self.progress(name, 0, 1)
        begin = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - begin
        self.progress(name, 1, 1)

    def rounded(self) -> dict[str, float]:
        """Return the seconds to the millisecond."""
        return {name: round(value, 3) for name, value in self.seconds.items()}
