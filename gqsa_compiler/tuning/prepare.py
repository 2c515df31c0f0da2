"""What a session does before its first trial: data, default kernels, what was tried before."""

from __future__ import annotations

import random
from pathlib import Path

from gqsa_compiler.errors import CompileError, UsageError
from gqsa_compiler.targets import TargetSpec
from gqsa_compiler.tuning.database import Database
from gqsa_compiler.tuning.key import TargetKey, source_hash
from gqsa_compiler.tuning.lookup import Tuned, config_fields
from gqsa_compiler.tuning.measure.case import make_case
from gqsa_compiler.tuning.measure.local import Measurer
from gqsa_compiler.tuning.measure.outcome import Outcome, checked
from gqsa_compiler.tuning.measure.workspace import Workspace
from gqsa_compiler.tuning.records import SessionStart, Trial, config_key
from gqsa_compiler.tuning.search import FULL, CostModel, Search
from gqsa_compiler.tuning.spaces import tuned_by_key
from gqsa_compiler.tuning.task_state import Settings, TaskState
from gqsa_compiler.tuning.tasks import Task, Workload


def begin_task(
    task: Task,
    target: TargetSpec,
    folder: Path,
    settings: Settings,
    measurer: Measurer,
    model: CostModel | None,
    known: Tuned,
) -> tuple[TaskState, Outcome]:
    """Make a task's data and search, and measure its default configuration.

    Parameters
    ----------
    task : Task
    target : TargetSpec
    folder : Path
        For its workspace.
    settings : Settings
    measurer : Measurer
    model : CostModel or None
    known : Tuned
        What it has for the task is tried first.

    Raises
    ------
    CompileError
        The default cannot be built or measured.
    """
    space = tuned_by_key(task.rule, task.spec, target)
    default = next(iter(space.values()))
    case = make_case(task, default, settings.seed)
    work = Workspace(folder, case, target, settings.threads, settings.limits)
    incumbent = work.build(default)
    outcome = checked(measurer.measure(work, incumbent, incumbent), task.calls)
    if outcome.status != "ok":
        raise CompileError(f"The default kernel of {task.name} failed: {outcome.message}")
    fields = {key: config_fields(config) for key, config in space.items()}
    full = settings.search == "all" or len(space) <= FULL
    rng = random.Random(f"{settings.seed} {task.name}")
    search = Search(task, fields, None if full else model, full, rng)
    search.tell(config_fields(default), 1.0, True)
    search.first(config_fields(known.choose(task.rule, task.spec, target).config))
    seconds = outcome.medians()
    return TaskState(task, search, space, work, incumbent, seconds, dict(seconds)), outcome


def find_session(
    database: Database, key: TargetKey, model: str, workload: Workload
) -> SessionStart:
    """Find the last session of a model, target and workload.

    Raises
    ------
    UsageError
        There is none.
    """
    wanted = (model, workload.prompt, workload.gen)
    found = [
        entry
        for entry in database.read().entries
        if isinstance(entry, SessionStart)
        and entry.target == key
        and (entry.model, entry.prompt, entry.gen) == wanted
    ]
    if not found:
        raise UsageError(
            f"{database.directory} has no session of {model} for this target, "
            "processor and workload; leave --resume out to begin one."
        )
    return max(found, key=lambda entry: entry.time)


def replay(state: TaskState, trials: tuple[Trial, ...], session: str) -> int:
    """Take over what earlier trials of a session have found of a task; the number of them.

    The best of them is built again.
    """
    best: Trial | None = None
    count = 0
    for trial in trials:
        if trial.session != session or trial.spec != state.task.code:
            continue
        if trial.rule != state.task.rule.name or trial.kernels != source_hash(state.task.rule):
            continue
        if trial.config == config_fields(state.incumbent.config):
            continue  # the default: measured again just now
        state.search.tell(trial.config, trial.ratio, trial.best)
        count += 1
        if trial.status != "ok":
            state.failures[trial.status] += 1
        elif trial.best and (best is None or (trial.ratio or 1) < (best.ratio or 1)):
            best = trial
    state.trials += count
    config = state.space.get(config_key(best.config)) if best is not None else None
    if best is not None and config is not None:
        state.incumbent = state.work.build(config)
        state.ratio, state.seconds = best.ratio or 1.0, best.seconds
    return count
