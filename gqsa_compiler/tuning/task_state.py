"""Where a session's tasks are, and what it came to."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from gqsa_compiler.schedules.rule import KernelConfig
from gqsa_compiler.tuning.measure.workspace import Candidate, Limits, Workspace
from gqsa_compiler.tuning.search import Search
from gqsa_compiler.tuning.tasks import Task

How = Literal["model", "random", "all"]
"""How the next configuration is chosen: by the cost model, at random, or one after the other."""


@dataclass(frozen=True)
class Settings:
    """How a session is run.

    Parameters
    ----------
    trials : int or None
        Most trials; None: as many as fit the time.
    seconds : float or None
        Most time; None: until the trials are done.
    search : str
        See `How`.
    seed : int
    threads : int
    resume : bool
        Go on with the last session of this model and workload.
    limits : Limits
    """

    trials: int | None = None
    seconds: float | None = None
    search: How = "model"
    seed: int = 0
    threads: int = 1
    resume: bool = False
    limits: Limits = field(default_factory=Limits)


@dataclass
class TaskState:
    """Where a task is.

    Attributes
    ----------
    baseline : dict of int to float
        Median seconds of the default's calls.
    seconds : dict of int to float
        The best's.
    ratio : float
        The best's time to the default's, over the workload.
    share : float
        Of the workload's time, by default configurations.
    trials : int
    failures : Counter
        By status.
    finished : bool
        Nothing is left that is worth a trial.
    """

    task: Task
    search: Search
    space: dict[str, KernelConfig]
    work: Workspace
    incumbent: Candidate
    baseline: dict[int, float]
    seconds: dict[int, float]
    ratio: float = 1.0
    share: float = 0.0
    trials: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    finished: bool = False

    @property
    def cost(self) -> float:
        """Seconds of the workload in this task by default."""
        calls = self.task.calls
        return self.task.layers * sum(calls[m] * self.baseline[m] for m in calls)


@dataclass(frozen=True)
class Result:
    """What a session came to.

    Parameters
    ----------
    session : str
    tasks : tuple of TaskState
    failed_tasks : dict of str to str
        Why a task could not be tuned, by its name.
    trials : int
    seconds : float
    interrupted : bool
    """

    session: str
    tasks: tuple[TaskState, ...]
    failed_tasks: dict[str, str]
    trials: int
    seconds: float
    interrupted: bool

    def decode_seconds(self, best: bool) -> float:
        """Return the time that the linear layers take for one token, tuned or by default."""
        states = [s for s in self.tasks if 1 in s.baseline]
        return sum(s.task.layers * (s.seconds if best else s.baseline)[1] for s in states)

    def gain(self) -> float:
        """Return how many times faster the workload's linear layers are than by default."""
        before = sum(state.cost for state in self.tasks)
        after = sum(state.cost * state.ratio for state in self.tasks)
        return before / after if after else 1.0
