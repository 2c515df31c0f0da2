"""A session without kernels: what they take is computed from their configurations."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gqsa_compiler.schedules.rule import KernelConfig
from gqsa_compiler.tuning.database import Database
from gqsa_compiler.tuning.lanes import Builders
from gqsa_compiler.tuning.lookup import Tuned
from gqsa_compiler.tuning.measure.outcome import Outcome
from gqsa_compiler.tuning.measure.workspace import Candidate
from gqsa_compiler.tuning.session import Session
from gqsa_compiler.tuning.task_state import Settings
from gqsa_compiler.tuning.tasks import Task, Workload
from tests.tuning.samples import CHIP, V4, rule_of, sparse


def task(n: int = 256, k: int = 512, layers: int = 4) -> Task:
    """Describe a task of the x86 rule, whose space is large."""
    spec = sparse(V4, n, k)
    return Task(f"layer {n}x{k}", rule_of(spec, V4), spec, (1, 8, 20), layers, {1: 64.0, 32: 1.0})


def cost(config: Any, tokens: int, size: int) -> float:
    """Return seconds: smooth in the configuration, best with 32 tasks and 2048 bytes ahead."""
    off = abs(math.log2(config.tasks / 32)) + 0.5 * abs(math.log2((config.ahead + 512) / 2560))
    wide = abs(math.log2(max(config.tiles))) if tokens > 1 else 0.0
    return 1e-9 * size * tokens**0.5 * (1.0 + 0.08 * off + 0.02 * wide)


class FakeWork:
    """Stands for a `Workspace`: nothing is built."""

    def __init__(self, root: Path, case: Any, *_: Any) -> None:
        self.case = case
        self.weight_bytes = case.spec.n * case.spec.k // 4

    def build(self, config: KernelConfig) -> Candidate:
        """Return a candidate without code."""
        return Candidate(config, Path(), Path(), {})

    def place(self) -> Path:
        """Return a folder that nothing is put in."""
        return Path()

    def complete(self, config: KernelConfig, folder: Path) -> Candidate:
        """Return a candidate without code."""
        return self.build(config)


@dataclass
class FakeMeasurer:
    """Stands for a machine.

    Parameters
    ----------
    noise : float
        Relative spread of a sample.
    before : callable
        Called with the number of the measurement.
    fails : callable
        Says which configurations fail, and how.
    """

    noise: float = 0.01
    before: Callable[[int], None] = lambda _n: None
    fails: Callable[[Any], str | None] = lambda _config: None
    count: int = 0
    slots: int = 1
    read_bandwidth: float = 0.0

    def __post_init__(self) -> None:
        self._rng = np.random.default_rng(0)

    @property
    def machine(self) -> dict[str, str]:
        """What records say of it."""
        return {"host": "fake"}

    def stop(self) -> bool:
        """Say that nothing can be ended."""
        return False

    def measure(self, space: Any, candidate: Any, incumbent: Any, rounds: int = 0) -> Outcome:
        """Compute the times."""
        self.count += 1
        self.before(self.count)
        status: Any = self.fails(candidate.config)
        if status:
            return Outcome(status, "planted")
        size = space.case.spec.n * space.case.spec.k

        def one(config: Any, m: int) -> float:
            return cost(config, m, size) * float(self._rng.lognormal(0, self.noise))

        calls = space.case.task.calls
        return Outcome(
            "ok",
            samples={
                m: [
                    (one(incumbent.config, m), one(candidate.config, m)) for _ in range(rounds or 9)
                ]
                for m in calls
            },
        )


@dataclass
class FakeBuilders:
    """Stands for processes that make code, each in so many seconds."""

    count: int = 1
    seconds: float = 0.0

    def build(self, work: Any, config: KernelConfig, folder: Path) -> None:
        """Take the time."""
        time.sleep(self.seconds)

    def close(self) -> None:
        """End nothing."""


@dataclass(frozen=True)
class FakeCase:
    """Stands for a `Case`."""

    task: Task
    spec: Any


def session(
    folder: Path,
    measurer: FakeMeasurer,
    tasks: tuple[Task, ...] = (task(),),
    builders: Builders | None = None,
    **settings: Any,
) -> Session:
    """Make a session on a fake machine; `patch` comes first."""
    return Session(
        tasks,
        V4,
        CHIP,
        "toy",
        Workload(32, 64),
        Database(folder),
        measurer,
        Settings(**settings),
        folder / "work",
        Tuned([], CHIP),
        builders=builders,
    )


def patch() -> None:
    """Put the fakes where sessions are prepared; for a process of its own, or undone by a test."""
    from gqsa_compiler.tuning import prepare as module

    module.Workspace = FakeWork  # type: ignore[misc, assignment]
    module.make_case = lambda task, _config, _seed: FakeCase(task, task.spec)  # type: ignore[assignment, return-value]
