"""What every verb prints: settings and progress on standard error, results on standard output."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from gqsa_compiler.progress import Remaining
from gqsa_compiler.units import seconds_text

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID
    from rich.table import Table

# Lines that a log file gets from one long stage: its beginning, then one in this many seconds.
_PLAIN_SECONDS = 15.0


def note(text: str) -> None:
    """Print one line on standard error."""
    print(text, file=sys.stderr, flush=True)


def show_settings(verb: str, settings: Mapping[str, object]) -> None:
    """Print a verb's resolved settings on standard error; those that are None are left out."""
    shown = {key: value for key, value in settings.items() if value is not None}
    width = max((len(key) for key in shown), default=0)
    note(f"gqsa {verb}")
    for key, value in shown.items():
        text = str(value).lower() if isinstance(value, bool) else str(value)
        note(f"  {key:<{width}}  {text}")


def emit_json(data: Any) -> None:
    """Print a JSON document on standard output."""
    print(json.dumps(data, indent=2, ensure_ascii=False))


def counted(count: int, name: str) -> str:
    """Write a number of things: ``1 trial``, ``2 trials``."""
    return f"{count} {name}" if count == 1 else f"{count} {name}s"


def emit_table(table: Table) -> None:
    """Print a rich table on standard output, as wide as it needs where that is a file."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else 200
    # What is in a table comes from files: no markup, no names of pictures.
    Console(width=width, markup=False, emoji=False).print(table)


class PlainProgress:
    """Progress as lines, for logs: a line when a stage begins and a few while it lasts."""

    def __init__(self, write: Callable[[str], None] = note) -> None:
        self._write = write
        self._stage = ""
        self._status = ""
        self._remaining = Remaining()
        self._written = 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._status, self._written = stage, "", now
            self._remaining = Remaining(done)
            self._write(f"{stage} ...")
            return
        if now - self._written < _PLAIN_SECONDS or total <= 0 or done >= total:
            return
        self._written = now
        left = self._remaining.seconds(done, total)
        rest = f", {seconds_text(left)} left" if left is not None else ""
        status = f", {self._status}" if self._status else ""
        self._write(f"{stage}: {done}/{total}{status}{rest}")

    def status(self, text: str) -> None:
        """Say something about the step that is done, e.g. its loss, until the stage ends."""
        self._status = text


class BarProgress:
    """Progress as rich bars with the time left, for a terminal."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}
        self._stage = ""

    def __call__(self, stage: str, done: int, total: int) -> None:
        size = total if total > 0 else None
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=size, status="")
        if stage != self._stage:
            self.finish()
            self._stage = stage
        self._bars.update(self._tasks[stage], completed=done, total=size)

    def status(self, text: str) -> None:
        """Say something about the step that is done, e.g. its loss, beside the stage's bar."""
        if self._stage:
            self._bars.update(self._tasks[self._stage], status=text)

    def finish(self) -> None:
        """Mark the stage in hand as done."""
        if self._stage:
            task = self._bars.tasks[self._tasks[self._stage]]
            total = task.total or 1
            self._bars.update(task.id, completed=total, total=total)


@contextmanager
def progress(transient: bool = False) -> Iterator[PlainProgress | BarProgress]:
    """Give a callback ``(stage, done, total)`` that draws progress on standard error.

    ``total`` counts steps of a stage; 0 means that their number is not known. Its method `status`
    takes words about the latest step, such as losses. On a terminal, `transient` bars are wiped
    when they are done.
    """
    if not sys.stderr.isatty():
        yield PlainProgress()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}", markup=False),
    )
    # A step can take minutes (a decoder block of a large model): estimate over all of them.
    bars = Bars(
        *columns,
        console=Console(stderr=True),
        speed_estimate_period=3600.0,
        transient=transient,
    )
    with bars:
        callback = BarProgress(bars)
        yield callback
        callback.finish()
