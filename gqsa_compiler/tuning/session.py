"""A tuning session: trial after trial, each in the database before the next begins."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from gqsa_compiler.errors import CompileError, UsageError
from gqsa_compiler.targets import TargetSpec
from gqsa_compiler.tuning.database import Database
from gqsa_compiler.tuning.key import TargetKey
from gqsa_compiler.tuning.lanes import Attempt, Builders, Lane, make_lane
from gqsa_compiler.tuning.lookup import Tuned, config_fields
from gqsa_compiler.tuning.measure.local import Measurer
from gqsa_compiler.tuning.measure.outcome import Outcome
from gqsa_compiler.tuning.prepare import begin_task, find_session, replay
from gqsa_compiler.tuning.records import SessionStart, config_key
from gqsa_compiler.tuning.search import FULL, CostModel, check_model
from gqsa_compiler.tuning.spaces import tuned_space
from gqsa_compiler.tuning.task_state import Result, Settings, TaskState
from gqsa_compiler.tuning.tasks import Task, Workload
from gqsa_compiler.tuning.trials import made, new_name, now, planned

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
    builders : Builders or None
        What makes code while others are measured; None: nothing, see `lanes`.
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
        builders: Builders | None = None,
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
        self._builders = builders
        self._observe = observe or (lambda _session: None)
        self._bandwidth = read_bandwidth
        self._under_way: list[Attempt] = []
        self._first = self._last = self.began  # when trials began, and when the last one ended
        self._tried = 0
        self._cost_model = self._choose_model()
        self._before = (
            find_session(database, self.key, model, workload) if settings.resume else None
        )
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
        if settings.trials is not None and self._tried:
            # By the trials of this run, without what came before them.
            each = (self._last - self._first) / self._tried
            rest = each * max(0, settings.trials - self.trials)
            guesses.append(max(0.0, rest - (time.monotonic() - self._last)))
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
            self._try_all()
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
        sizes = [len(tuned_space(task.rule, task.spec, self.target)) for task in self._tasks]
        if max(sizes) > FULL:
            check_model()
        return CostModel(self.settings.seed)

    def _set_up(self) -> None:
        done: list[tuple[TaskState, Outcome]] = []
        for number, task in enumerate(self._tasks):
            self._say(f"preparing {task.name}")
            try:
                folder = self._folder / str(number)
                done.append(
                    begin_task(
                        task,
                        self.target,
                        folder,
                        self.settings,
                        self._measurer,
                        self._cost_model,
                        self._known,
                    )
                )
            except CompileError as error:
                self.failed_tasks[task.name] = str(error)
        total = sum(state.cost for state, _ in done)
        for state, _ in done:
            state.share = state.cost / total
        self.states = [state for state, _ in done]
        if self._before is None:
            self.database.append(self._start())
            for state, outcome in done:
                trial = planned(state.task, self.key, state.incumbent.config, self.session)
                self.database.append(made(trial, outcome, 1.0, 0.0, self._machine(), best=True))
            return
        trials = self.database.read().trials
        for state in self.states:
            self._say(f"reading what was tried of {state.task.name}")
            self.trials += replay(state, trials, self.session)

    def _start(self) -> SessionStart:
        """Describe this session for the database."""
        tasks = tuple(
            {
                **state.task.describe(),
                "bytes": state.work.weight_bytes,
                "share": round(state.share, 6),
            }
            for state in self.states
        )
        prompt, gen = self._workload.prompt, self._workload.gen
        return SessionStart(
            self.key, self.session, self._model, prompt, gen, tasks, now(), self._bandwidth
        )

    def _machine(self) -> dict[str, str]:
        return {**self._measurer.machine, "threads": str(self.settings.threads)}

    def _try_all(self) -> None:
        """Make trials until they are over."""
        lane = make_lane(self._measurer, self._builders, self.settings.limits.rounds)
        self._first = time.monotonic()
        try:
            while self._fill(lane):
                for attempt in lane.wait():
                    self._learn(attempt)
                lane.feed()
        finally:
            if self._under_way:
                self._say("ending what is being measured")
            for attempt in lane.end():
                self._learn(attempt)

    def _over(self) -> bool:
        settings = self.settings
        return settings.seconds is not None and self.elapsed >= settings.seconds

    def _next_state(self) -> TaskState | None:
        """Choose the task that has had the fewest trials for its share of the time."""
        going = [state for state in self.states if not state.finished]
        if not going:
            return None
        begun = Counter(attempt.state.task.name for attempt in self._under_way)

        def served(state: TaskState) -> float:
            return (state.trials + begun[state.task.name] + 1) / max(state.share, 1e-6)

        return min(going, key=served)

    def _fill(self, lane: Lane) -> bool:
        """Begin as many trials as there is room for; False if none is under way."""
        began = False
        while len(self._under_way) < lane.room and not self._over():
            most = self.settings.trials
            if most is not None and self.trials + len(self._under_way) >= most:
                break
            state = self._next_state()
            if state is None:
                break
            fields = state.search.next()
            config = state.space.get(config_key(fields)) if fields is not None else None
            if config is None:
                state.finished = True
                self._say(f"{state.task.name} is done")
                continue
            state.search.begin(config_fields(config))
            attempt = Attempt(state, config)
            self._under_way.append(attempt)
            lane.start(attempt)
            began = True
        if began:
            names = dict.fromkeys(attempt.state.task.name for attempt in self._under_way)
            self._say("trying " + ", ".join(names))
        return bool(self._under_way)

    def _learn(self, attempt: Attempt) -> None:
        """Keep what a trial has found."""
        state, outcome, found = attempt.state, attempt.outcome, attempt.found
        ratio, noise, best = None, 0.0, False
        if found is not None:
            ratio, noise = attempt.base * found.ratio, attempt.base * found.noise
            # Another one that was measured beside it may be better still.
            best = found.wins and ratio + noise < state.ratio
        trial = planned(state.task, self.key, attempt.config, self.session)
        self.database.append(made(trial, outcome, ratio, noise, self._machine(), best=best))
        self._under_way.remove(attempt)
        if outcome.status != "ok":
            state.failures[outcome.status] += 1
        if best and ratio is not None and attempt.candidate is not None:
            state.incumbent, state.ratio = attempt.candidate, ratio
            state.seconds = outcome.medians()
        state.search.tell(config_fields(attempt.config), ratio, best)
        state.trials += 1
        self.trials += 1
        self._tried, self._last = self._tried + 1, time.monotonic()
        self._observe(self)

    def _say(self, doing: str) -> None:
        self.doing = doing
        self._observe(self)
