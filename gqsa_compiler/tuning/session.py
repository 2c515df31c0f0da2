"""A tuning session: trial after trial, each in the database before the next begins."""

from __future__ import annotations

import os
import random
import secrets
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from gqsa_compiler.errors import CompileError, UsageError
from gqsa_compiler.schedules.rule import KernelConfig
from gqsa_compiler.targets import TargetSpec
from gqsa_compiler.tuning.database import Database
from gqsa_compiler.tuning.key import TargetKey, source_hash
from gqsa_compiler.tuning.lookup import Tuned, config_fields, space_by_key
from gqsa_compiler.tuning.measure.case import make_case
from gqsa_compiler.tuning.measure.local import Measurer
from gqsa_compiler.tuning.measure.outcome import Comparison, Outcome, compare
from gqsa_compiler.tuning.measure.workspace import BuildError, Candidate, Limits, Workspace
from gqsa_compiler.tuning.records import SessionStart, Trial, config_key
from gqsa_compiler.tuning.search import FULL, CostModel, Search, check_model
from gqsa_compiler.tuning.tasks import Task, Workload

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


Observe = Callable[["Session"], None]


class Session:
    """Tunes tasks on a measurer.

    Parameters
    ----------
    tasks : sequence of Task
    target : TargetSpec
    chip : str
        The processor that is measured.
    model : str
        Name of what is tuned, for the record.
    workload : Workload
    database : Database
    measurer : Measurer
    settings : Settings
    folder : Path
        Empty; for the workspaces.
    known : Tuned
        Where configurations to start from are looked up.
    observe : callable, optional
        Called after everything that happens.
    read_bandwidth : float
        Of the machine, bytes a second, for the report.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        target: TargetSpec,
        chip: str,
        model: str,
        workload: Workload,
        database: Database,
        measurer: Measurer,
        settings: Settings,
        folder: Path,
        known: Tuned,
        observe: Observe | None = None,
        read_bandwidth: float = 0.0,
    ) -> None:
        if not tasks:
            raise UsageError("The model has no layers whose kernels can be tuned.")
        self.target, self.settings, self.database = target, settings, database
        self.key = TargetKey.of(target, chip)
        self.states: list[TaskState] = []
        self.failed_tasks: dict[str, str] = {}
        self.doing = ""
        self.trials = 0
        self.began = time.monotonic()
        self._tasks, self._model, self._workload = tuple(tasks), model, workload
        self._measurer, self._folder, self._known = measurer, folder, known
        self._observe = observe or (lambda _session: None)
        self._bandwidth = read_bandwidth
        self._cost_model = self._choose_model()
        self._before = self._resumed() if settings.resume else None
        self.session = self._before.session if self._before else new_name()

    @property
    def elapsed(self) -> float:
        """Seconds since the session began, or went on."""
        return time.monotonic() - self.began

    def left(self) -> float | None:
        """Estimate the seconds that are left; None if nothing tells yet."""
        settings, guesses = self.settings, []
        if settings.seconds is not None:
            guesses.append(max(0.0, settings.seconds - self.elapsed))
        if settings.trials is not None and self.trials:
            guesses.append(self.elapsed / self.trials * max(0, settings.trials - self.trials))
        return min(guesses) if guesses else None

    def run(self) -> Result:
        """Tune until the trials or the time are used up, nothing is left, or Ctrl-C.

        Raises
        ------
        CompileError
            No task's default kernel can be measured.
        """
        interrupted = False
        try:
            self._set_up()
            while not self._over():
                if not self._step():
                    break
        except KeyboardInterrupt:
            interrupted = True
        if not self.states and not interrupted:
            reason = next(iter(self.failed_tasks.values()), "")
            raise CompileError(f"No kernel of the model could be measured: {reason}")
        return Result(
            self.session,
            tuple(self.states),
            self.failed_tasks,
            self.trials,
            self.elapsed,
            interrupted,
        )

    def _choose_model(self) -> CostModel | None:
        if self.settings.search != "model":
            return None
        sizes = [len(task.rule.space(task.spec, self.target)) for task in self._tasks]
        if max(sizes) > FULL:
            check_model()
        return CostModel(self.settings.seed)

    def _resumed(self) -> SessionStart:
        """Find the last session of this model, target and workload."""
        wanted = (self._model, self._workload.prompt, self._workload.gen)
        found = [
            entry
            for entry in self.database.read().entries
            if isinstance(entry, SessionStart)
            and entry.target == self.key
            and (entry.model, entry.prompt, entry.gen) == wanted
        ]
        if not found:
            raise UsageError(
                f"{self.database.directory} has no session of {self._model} for this target, "
                "processor and workload; leave --resume out to begin one."
            )
        return max(found, key=lambda entry: entry.time)

    def _set_up(self) -> None:
        done: list[tuple[TaskState, Outcome]] = []
        for number, task in enumerate(self._tasks):
            self._say(f"preparing {task.name}")
            try:
                done.append(self._begin(task, self._folder / str(number)))
            except CompileError as error:
                self.failed_tasks[task.name] = str(error)
        total = sum(state.cost for state, _ in done)
        for state, _ in done:
            state.share = state.cost / total
        self.states = [state for state, _ in done]
        if self._before is None:
            self.database.append(
                SessionStart(
                    self.key,
                    self.session,
                    self._model,
                    self._workload.prompt,
                    self._workload.gen,
                    tuple(
                        {
                            **s.task.describe(),
                            "bytes": s.work.weight_bytes,
                            "share": round(s.share, 6),
                        }
                        for s in self.states
                    ),
                    now(),
                    self._bandwidth,
                )
            )
            for state, outcome in done:
                self.database.append(
                    self._record(state, state.incumbent.config, outcome, 1.0, 0.0, True)
                )
        for state in self.states:
            self._replay(state)

    def _begin(self, task: Task, folder: Path) -> tuple[TaskState, Outcome]:
        """Prepare a task and measure its default configuration."""
        default = task.rule.space(task.spec, self.target)[0]
        case = make_case(task, default, self.settings.seed)
        work = Workspace(folder, case, self.target, self.settings.threads, self.settings.limits)
        incumbent = work.build(default)
        outcome = self._measurer.measure(work, incumbent, incumbent)
        if outcome.status != "ok":
            raise CompileError(f"The default kernel of {task.name} failed: {outcome.message}")
        space = space_by_key(task.rule, task.spec, self.target)
        fields = {key: config_fields(config) for key, config in space.items()}
        full = self.settings.search == "all" or len(space) <= FULL
        rng = random.Random(f"{self.settings.seed} {task.name}")
        search = Search(task, fields, None if full else self._cost_model, full, rng)
        search.tell(config_fields(default), 1.0, True)
        search.first(config_fields(self._known.choose(task.rule, task.spec, self.target).config))
        seconds = outcome.medians()
        return TaskState(task, search, space, work, incumbent, seconds, dict(seconds)), outcome

    def _replay(self, state: TaskState) -> None:
        """Take over what earlier trials of a resumed session have found."""
        if self._before is None:
            return
        best: Trial | None = None
        for trial in self.database.read().trials:
            if trial.session != self.session or trial.spec != state.task.code:
                continue
            if trial.rule != state.task.rule.name or trial.kernels != source_hash(state.task.rule):
                continue
            if trial.config == config_fields(state.incumbent.config):
                continue  # the default: measured again just now
            state.search.tell(trial.config, trial.ratio, trial.best)
            state.trials += 1
            self.trials += 1
            if trial.status != "ok":
                state.failures[trial.status] += 1
            elif trial.best and (best is None or (trial.ratio or 1) < (best.ratio or 1)):
                best = trial
        if best is not None:
            self._say(f"preparing the best of {state.task.name}")
            config = self._config(state, best.config)
            if config is not None:
                state.incumbent = state.work.build(config)
                state.ratio, state.seconds = best.ratio or 1.0, best.seconds

    @staticmethod
    def _config(state: TaskState, fields: Any) -> KernelConfig | None:
        return state.space.get(config_key(fields))

    def _over(self) -> bool:
        settings = self.settings
        if settings.trials is not None and self.trials >= settings.trials:
            return True
        return settings.seconds is not None and self.elapsed >= settings.seconds

    def _next_state(self, picked: Sequence[tuple[TaskState, KernelConfig]]) -> TaskState | None:
        """Choose the task that has had the fewest trials for its share of the time."""
        going = [state for state in self.states if not state.finished]
        if not going:
            return None
        begun = Counter(state.task.name for state, _ in picked)

        def served(state: TaskState) -> float:
            return (state.trials + begun[state.task.name] + 1) / max(state.share, 1e-6)

        return min(going, key=served)

    def _step(self) -> bool:
        """Make as many trials as are measured at once; False if nothing is worth one."""
        picked: list[tuple[TaskState, KernelConfig]] = []
        while len(picked) < self._room():
            state = self._next_state(picked)
            if state is None:
                break
            fields = state.search.next()
            config = self._config(state, fields) if fields is not None else None
            if config is None:
                state.finished = True
                self._say(f"{state.task.name} is done")
                continue
            state.search.begin(config_fields(config))
            picked.append((state, config))
        if not picked:
            return False
        self._say("trying " + ", ".join(dict.fromkeys(s.task.name for s, _ in picked)))
        # Built one after the other, before the threads begin: building forks this process.
        built = [self._build(state, config) for state, config in picked]
        if len(picked) == 1:
            tried = [self._try(picked[0][0], built[0])]
        else:
            with ThreadPoolExecutor(len(picked)) as pool:
                tried = list(pool.map(self._try, (state for state, _ in picked), built))
        # Candidates of one task were measured against the same incumbent.
        against = {state.task.name: state.ratio for state, _ in picked}
        for (state, config), candidate, found in zip(picked, built, tried, strict=True):
            self._learn(state, config, candidate, against[state.task.name], *found)
        return True

    def _room(self) -> int:
        """Return how many trials may begin now."""
        slots = self._measurer.slots
        most = self.settings.trials
        return slots if most is None else min(slots, most - self.trials)

    @staticmethod
    def _build(state: TaskState, config: KernelConfig) -> Candidate | Outcome:
        try:
            return state.work.build(config)
        except BuildError as error:
            return Outcome("build", str(error))

    def _try(
        self, state: TaskState, candidate: Candidate | Outcome
    ) -> tuple[Outcome, Comparison | None]:
        """Check and time a candidate; how it compares with the incumbent, if it did not fail."""
        if isinstance(candidate, Outcome):
            return candidate, None
        outcome = self._measurer.measure(state.work, candidate, state.incumbent)
        if outcome.status != "ok":
            return outcome, None
        found = compare(outcome, state.task.calls)
        if not found.wins:
            return outcome, found
        # Of many that are equal some will look better: a new best has to be so twice.
        rounds = 2 * self.settings.limits.rounds
        again = self._measurer.measure(state.work, candidate, state.incumbent, rounds)
        if again.status != "ok":
            return again, None
        return again, compare(again, state.task.calls)

    def _learn(
        self,
        state: TaskState,
        config: KernelConfig,
        candidate: Candidate | Outcome,
        base: float,
        outcome: Outcome,
        found: Comparison | None,
    ) -> None:
        """Keep what a trial has found; `base` is the ratio of what it was compared with."""
        ratio, noise, best = None, 0.0, False
        if found is not None:
            ratio, noise = base * found.ratio, base * found.noise
            # Another one that was measured beside it may be better still.
            best = found.wins and ratio + noise < state.ratio
        self.database.append(self._record(state, config, outcome, ratio, noise, best))
        if outcome.status != "ok":
            state.failures[outcome.status] += 1
        if best and ratio is not None and isinstance(candidate, Candidate):
            state.incumbent, state.ratio, state.seconds = candidate, ratio, outcome.medians()
        state.search.tell(config_fields(config), ratio, best)
        state.trials += 1
        self.trials += 1
        self._observe(self)

    def _record(
        self,
        state: TaskState,
        config: KernelConfig,
        outcome: Outcome,
        ratio: float | None,
        noise: float,
        best: bool,
    ) -> Trial:
        task = state.task
        return Trial(
            target=self.key,
            kernels=source_hash(task.rule),
            producer=metadata.version("gqsa-compiler"),
            rule=task.rule.name,
            layout_version=task.rule.layout_version,
            spec=task.code,
            density=task.density,
            rows=task.rows,
            config=config_fields(config),
            status=outcome.status,
            message=outcome.message[:1000],
            calls=dict(task.calls),
            seconds=outcome.medians() if outcome.status == "ok" else {},
            ratio=ratio,
            noise=noise,
            best=best,
            machine={**self._measurer.machine, "threads": str(self.settings.threads)},
            session=self.session,
            time=now(),
        )

    def _say(self, doing: str) -> None:
        self.doing = doing
        self._observe(self)


def new_name() -> str:
    """Make a session's name: the time, the process and a few random digits."""
    stamp = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S")
    return f"{stamp}-{os.getpid()}-{secrets.token_hex(3)}"


def now(seconds: float | None = None) -> str:
    """Write a time in seconds since 1970, or this moment: UTC, ISO 8601."""
    moment = time.time() if seconds is None else seconds
    return datetime.fromtimestamp(moment, timezone.utc).isoformat(timespec="milliseconds")
