"""The picture of a tuning session while it runs, on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from gqsa_compiler.cli.console import PlainProgress, counted, note
from gqsa_compiler.units import seconds_text

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

    from gqsa_compiler.tuning.session import Session

_PLAIN_SECONDS = 15.0


class PlainView:
    """Lines for a log: every new best, and now and then how far it is."""

    def __init__(self, write: Callable[[str], None] = note) -> None:
        self._write = write
        self._best: dict[str, float] = {}
        self._written = 0.0
        self._doing = ""
        self.stage = PlainProgress(write)

    def __call__(self, session: Session) -> None:
        for state in session.states:
            name = state.task.name
            if state.ratio < self._best.get(name, 1.0):
                self._best[name] = state.ratio
                self._write(f"{name}: {1 / state.ratio:.2f} times faster than by default")
        now = time.monotonic()
        if not session.states and session.doing != self._doing:
            self._doing = session.doing
            self._write(f"{session.doing} ...")
        elif session.states and now - self._written > _PLAIN_SECONDS:
            self._written = now
            self._write(progress_text(session))


class LiveView:
    """A table that changes with each trial, and below it the time that passes; for a terminal."""

    def __init__(self) -> None:
        self._shown: Table | str = ""
        self._session: Session | None = None

    def stage(self, stage: str, done: int, total: int) -> None:
        """Show what is done before the session."""
        self._shown = f"{stage} ..."

    def __call__(self, session: Session) -> None:
        # Drawn here: what draws the screen is another thread.
        self._shown, self._session = table_of(session) if session.states else "", session

    def __rich__(self) -> Group:
        """Return what is on the screen now."""
        from rich.console import Group

        if self._session is None:
            return Group(self._shown)
        parts = [self._shown] if self._session.states else []
        return Group(*parts, progress_text(self._session))


def progress_text(session: Session) -> str:
    """Say in a line how far a session is."""
    left = session.left()
    rest = f", {seconds_text(left)} left" if left is not None else ""
    trials = counted(session.trials, "trial")
    return f"{trials}, {seconds_text(session.elapsed)}{rest}: {session.doing}"


def table_of(session: Session) -> Table:
    """Draw a session: a line a task."""
    from rich.table import Table

    table = Table("task", box=None)
    for heading in ("share", "decode us", "gain", "trials", "failed"):
        table.add_column(heading, justify="right")
    for state in session.states:
        decode = state.seconds.get(1)
        table.add_row(
            state.task.name + (" (done)" if state.finished else ""),
            f"{state.share:.1%}",
            "" if decode is None else f"{decode * 1e6:.1f}",
            f"{1 / state.ratio:.2f}x",
            str(state.trials),
            str(state.failures.total()),
        )
    return table


@contextmanager
def live() -> Iterator[PlainView | LiveView]:
    """Give what a session is shown to after everything that happens in it."""
    if not sys.stderr.isatty():
        yield PlainView()
        return
    from rich.console import Console
    from rich.live import Live

    view = LiveView()
    with Live(view, console=Console(stderr=True, markup=False), refresh_per_second=4):
        yield view
