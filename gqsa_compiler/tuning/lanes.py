"""How trials are made: one after the other, or built and measured at the same time."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from gqsa_compiler.schedules.rule import KernelConfig
from gqsa_compiler.tuning.measure.code import BuildError
from gqsa_compiler.tuning.measure.local import Measurer
from gqsa_compiler.tuning.measure.outcome import Comparison, Outcome, checked, compare
from gqsa_compiler.tuning.measure.workspace import Candidate, Workspace
from gqsa_compiler.tuning.task_state import TaskState

_Measured = Future[tuple[Outcome, Comparison | None]]


@dataclass(eq=False)
class Attempt:
    """A trial on its way.

    Attributes
    ----------
    candidate : Candidate or None
        None until it is built.
    base : float
        The ratio to the default of what it was compared with.
    outcome : Outcome
        `build` until there is another.
    found : Comparison or None
        How it compares with the incumbent, if it did not fail.
    """

    state: TaskState
    config: KernelConfig
    candidate: Candidate | None = None
    base: float = 1.0
    outcome: Outcome = field(default_factory=lambda: Outcome("build"))
    found: Comparison | None = None


class Builders(Protocol):
    """Makes code, several candidates' at once."""

    @property
    def count(self) -> int:
        """How many at once."""

    def build(self, work: Workspace, config: KernelConfig, folder: Path) -> None:
        """Make a candidate's code in its folder; raises `BuildError`. Called by threads."""

    def close(self) -> None:
        """End what is being built."""


class Lane(Protocol):
    """Makes trials."""

    @property
    def room(self) -> int:
        """How many may be under way."""

    def start(self, attempt: Attempt) -> None:
        """Begin a trial; there is room for it."""

    def feed(self) -> None:
        """Measure what is built, where a machine is free."""

    def wait(self) -> Sequence[Attempt]:
        """Wait until at least one has ended; there is one under way."""

    def end(self) -> Sequence[Attempt]:
        """Begin nothing more; return those that came to their end all the same."""


def make_lane(measurer: Measurer, builders: Builders | None, rounds: int) -> Lane:
    """Choose: without builders, trials are made one after the other in this thread.

    Parameters
    ----------
    measurer : Measurer
    builders : Builders or None
    rounds : int
        Of a first measurement; a second one has twice as many.
    """
    if builders is None:
        return OneByOne(measurer, rounds)
    return Overlapped(measurer, builders, rounds)


def measure(
    measurer: Measurer, attempt: Attempt, incumbent: Candidate, rounds: int
) -> tuple[Outcome, Comparison | None]:
    """Check and time a candidate that is built; how it compares with the incumbent."""
    state, candidate = attempt.state, attempt.candidate
    if candidate is None:
        return attempt.outcome, None
    calls = state.task.calls
    outcome = checked(measurer.measure(state.work, candidate, incumbent), calls)
    if outcome.status != "ok":
        return outcome, None
    found = compare(outcome, calls)
    if not found.wins:
        return outcome, found
    # Of many that are equal some will look better: a new best has to be so twice.
    again = checked(measurer.measure(state.work, candidate, incumbent, 2 * rounds), calls)
    if again.status != "ok":
        return again, None
    return again, compare(again, calls)


class OneByOne:
    """Builds, then measures, so that nothing else runs on this machine meanwhile."""

    room = 1

    def __init__(self, measurer: Measurer, rounds: int) -> None:
        self._measurer, self._rounds = measurer, rounds
        self._waiting: list[Attempt] = []

    def start(self, attempt: Attempt) -> None:
        """Begin a trial."""
        self._waiting.append(attempt)

    def feed(self) -> None:
        """Do nothing: `wait` does it all."""

    def wait(self) -> Sequence[Attempt]:
        """Make the trial."""
        attempt = self._waiting.pop()
        state = attempt.state
        attempt.base = state.ratio
        try:
            attempt.candidate = state.work.build(attempt.config)
        except BuildError as error:
            attempt.outcome = Outcome("build", str(error))
            return [attempt]
        attempt.outcome, attempt.found = measure(
            self._measurer, attempt, state.incumbent, self._rounds
        )
        return [attempt]

    def end(self) -> Sequence[Attempt]:
        """Give up what was begun."""
        self._waiting.clear()
        return []


class Overlapped:
    """Builds the next candidates while others are measured, each on a machine of its own.

    Parameters
    ----------
    measurer : Measurer
        On other machines, or a GPU: building here does not disturb it.
    builders : Builders
    rounds : int
    """

    def __init__(self, measurer: Measurer, builders: Builders, rounds: int) -> None:
        self._measurer, self._builders, self._rounds = measurer, builders, rounds
        self._build_threads = ThreadPoolExecutor(builders.count)
        self._measure_threads = ThreadPoolExecutor(measurer.slots)
        self._building: dict[Future[None], tuple[Attempt, Path]] = {}
        self._built: deque[Attempt] = deque()
        self._measuring: dict[_Measured, Attempt] = {}
        self._ended: list[Attempt] = []

    @property
    def room(self) -> int:
        """One on each machine and one for each builder."""
        return self._measurer.slots + self._builders.count

    def start(self, attempt: Attempt) -> None:
        """Begin to build."""
        work = attempt.state.work
        folder = work.place()
        future = self._build_threads.submit(self._builders.build, work, attempt.config, folder)
        self._building[future] = attempt, folder

    def feed(self) -> None:
        """Measure what is built, each against the incumbent of this moment."""
        while self._built and len(self._measuring) < self._measurer.slots:
            attempt = self._built.popleft()
            state = attempt.state
            attempt.base = state.ratio
            future = self._measure_threads.submit(
                measure, self._measurer, attempt, state.incumbent, self._rounds
            )
            self._measuring[future] = attempt

    def wait(self) -> Sequence[Attempt]:
        """Wait until trials have ended; after an error, `end` returns those that had."""
        while not self._ended:
            self.feed()
            futures: list[Future[Any]] = [*self._building, *self._measuring]
            done, _ = wait(futures, return_when=FIRST_COMPLETED)
            for future in done:
                if future in self._measuring:
                    self._take_measured(future)
                else:
                    self._take_built(future)
        ended, self._ended = self._ended, []
        return ended

    def end(self) -> Sequence[Attempt]:
        """Give up what is not being measured, and wait for the rest unless it can be ended."""
        self._builders.close()
        self._build_threads.shutdown(wait=False, cancel_futures=True)
        self._building.clear()
        self._built.clear()
        self._take_finished()
        stopped = self._measurer.stop() if self._measuring else True
        self._measure_threads.shutdown(wait=True, cancel_futures=True)
        if not stopped:
            self._take_finished()
        self._measuring.clear()
        return self._ended

    def _take_built(self, future: Future[None]) -> None:
        attempt, folder = self._building.pop(future)
        try:
            future.result()
            attempt.candidate = attempt.state.work.complete(attempt.config, folder)
            self._built.append(attempt)
        except BuildError as error:
            attempt.outcome = Outcome("build", str(error))
            self._ended.append(attempt)

    def _take_measured(self, future: _Measured) -> None:
        attempt = self._measuring.pop(future)
        attempt.outcome, attempt.found = future.result()
        self._ended.append(attempt)

    def _take_finished(self) -> None:
        """Take what was measured, and leave what has failed: an error is being raised already."""
        for future in list(self._measuring):
            if future.done() and not future.cancelled() and future.exception() is None:
                self._take_measured(future)
