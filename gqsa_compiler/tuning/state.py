"""What a database amounts to: per kernel, and which records are of the versions installed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from gqsa_compiler.errors import CompileError, UsageError
from gqsa_compiler.schedules.rule import ScheduleRule
from gqsa_compiler.schedules.table import rules_for
from gqsa_compiler.targets import TARGET_NAMES, parse_target
from gqsa_compiler.tuning.database import Database
from gqsa_compiler.tuning.key import source_hash, tvm_release
from gqsa_compiler.tuning.records import SessionStart, Trial, config_key


def open_database(directory: Path) -> Database:
    """Open a database that is there.

    Raises
    ------
    UsageError
        There is no such directory.
    """
    if not directory.is_dir():
        raise UsageError(f"There is no tuning database {directory}; gqsa tune MODEL makes one.")
    return Database(directory)


@lru_cache(maxsize=1)
def _rules() -> dict[str, ScheduleRule[Any]]:
    """Return all rules of all targets by name."""
    found = {}
    for name in TARGET_NAMES:
        with suppress(CompileError):  # a target without kernels
            found.update({rule.name: rule for rule in rules_for(parse_target(name))})
    return found


def is_current(trial: Trial) -> bool:
    """Say whether a record is of the TVM and of the kernel that are installed."""
    rule = _rules().get(trial.rule)
    return (
        rule is not None
        and trial.target.tvm == tvm_release()
        and trial.layout_version == rule.layout_version
        and trial.kernels == source_hash(rule)
    )


def best_trials(trials: Iterable[Trial]) -> tuple[Trial, ...]:
    """Return the best current trial of each shape on each target, in a fixed order."""
    best: dict[tuple[str, ...], Trial] = {}
    for trial in trials:
        if trial.status != "ok" or not trial.best or not is_current(trial):
            continue
        place = _place(trial)
        known = best.get(place)
        if known is None or _order(trial) < _order(known):
            best[place] = trial
    return tuple(best[place] for place in sorted(best))


def _order(trial: Trial) -> tuple[float, str]:
    return trial.ratio or 1.0, config_key(trial.config)


def _place(trial: Trial) -> tuple[str, ...]:
    density = f"{trial.density:.1f}"
    return trial.target.file, trial.rule, trial.kernels, trial.spec.to_json(), density


def overview(database: Database) -> dict[str, Any]:
    """Sum a database up: a line for each kernel's shape on each target.

    Returns
    -------
    dict
        ``kernels`` (a list), ``sessions``, ``trials``, ``unreadable``.
    """
    contents = database.read()
    groups: dict[tuple[str, ...], list[Trial]] = {}
    for trial in contents.trials:
        groups.setdefault(_place(trial), []).append(trial)
    lines = []
    for place in sorted(groups):
        trials = groups[place]
        first = trials[0]
        ratios = [t.ratio for t in trials if t.best and t.ratio is not None]
        lines.append(
            {
                "target": first.target.cpu or first.target.arch,
                "features": list(first.target.features),
                "chip": first.target.chip,
                "tvm": first.target.tvm,
                "rule": first.rule,
                "n": first.spec.n,
                "k": first.spec.k,
                "density": first.density,
                "trials": len(trials),
                "failures": dict(Counter(t.status for t in trials if t.status != "ok")),
                "gain": 1 / min(ratios) if ratios else None,
                "current": is_current(first),
            }
        )
    return {
        "kernels": lines,
        "sessions": sum(isinstance(entry, SessionStart) for entry in contents.entries),
        "trials": len(contents.trials),
        "unreadable": contents.unreadable,
    }
