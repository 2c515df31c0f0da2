"""Results of a bundle that was run: from its files to records."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gqsa_compiler.errors import CompileError, UsageError
from gqsa_compiler.tuning.bundle import FILE, FORMAT, RESULTS, SCRIPT, SESSION, VERSION
from gqsa_compiler.tuning.database import Database
from gqsa_compiler.tuning.key import host_chip, slug
from gqsa_compiler.tuning.measure.local import read_gpu, read_outcome
from gqsa_compiler.tuning.measure.outcome import Comparison, Outcome, checked, compare
from gqsa_compiler.tuning.records import SessionStart, Trial, from_line, session_name, to_line
from gqsa_compiler.tuning.trials import made

_MOST_BYTES = 64 << 20


def import_bundle(directory: Path, database: Database, chip: str | None = None) -> tuple[str, int]:
    """Read a bundle's results into a database.

    Parameters
    ----------
    directory : Path
        A bundle that was run.
    database : Database
    chip : str or None
        The processor; None: by the /proc/cpuinfo that the run has left, or the GPU's name.

    Returns
    -------
    str, int
        The session's name in the database, and the number of new records.

    Raises
    ------
    UsageError
        It is no bundle, was not run, or its results are another's.
    """
    head = _read_head(directory)
    results = directory / RESULTS
    if not results.is_dir():
        raise UsageError(f"{directory} has no results; run {SCRIPT} in it on the machine first.")
    if _first_line(results / SESSION) not in ("", head["session"]):  # "": of an earlier release
        raise UsageError(f"{results} is of another bundle; take the one that belongs to {FILE}.")
    machine = {"host": _first_line(results / "uname"), "how": "bundle", "threads": head["threads"]}
    bandwidth = 0.0
    said = _bytes(results / "gpu")
    if said:
        try:
            gpu = read_gpu(said)
        except CompileError as error:
            raise UsageError(f"{results / 'gpu'}: {error}") from None
        machine["gpu"], bandwidth = gpu["name"], gpu["copy"]
        chip = chip or gpu["name"]
    elif chip is None and _bytes(results / "cpuinfo"):
        chip = host_chip(results / "cpuinfo")
    if not chip:
        raise UsageError(f"{results} does not tell the processor; name it with --chip.")
    found = [
        _measured(results, head["session"], name, line, slug(chip), machine)
        for name, line in head["candidates"].items()
    ]
    entries = _with_bests(found)
    if not entries:
        raise UsageError(f"{results} has no results; run {SCRIPT} on the machine first.")
    start = SessionStart(
        entries[0].target,
        head["session"],
        head["model"],
        head["prompt"],
        head["gen"],
        tuple(head["tasks"]),
        entries[0].time,
        bandwidth,
    )
    try:
        from_line(to_line(start))
    except ValueError as error:
        raise UsageError(f"{directory / FILE} is damaged: {error}.") from None
    database.append_new(start)
    return head["session"], database.append_new(*entries)


def _read_head(directory: Path) -> dict[str, Any]:
    path = directory / FILE
    text = _bytes(path)
    if not text:
        raise UsageError(f"{directory} is no tuning bundle: it has no {FILE}.")
    try:
        head = json.loads(text)
    except (ValueError, RecursionError):
        raise UsageError(f"{path} is damaged: it is not JSON.") from None
    if not isinstance(head, dict) or head.get("format") != FORMAT or head.get("version") != VERSION:
        raise UsageError(f"{path} is not of a tuning bundle that this release reads.")
    checks: dict[str, Callable[[Any], bool]] = {
        "session": _is_session,
        "model": lambda v: isinstance(v, str) and len(v) < 200,
        **{k: lambda v: type(v) is int and 0 < v < 1 << 31 for k in ("prompt", "gen", "threads")},
        "tasks": lambda v: isinstance(v, list) and all(isinstance(t, dict) for t in v),
        "candidates": lambda v: isinstance(v, dict) and all(isinstance(x, str) for x in v.values()),
    }
    for name, fits in checks.items():
        if not fits(head.get(name)):
            raise UsageError(f"{path} is damaged: {name} is missing or wrong.")
    return {**head, "threads": str(head["threads"])}


def _is_session(value: object) -> bool:
    try:
        return bool(session_name(value))
    except ValueError:
        return False


def _measured(
    results: Path, session: str, name: str, line: str, chip: str, machine: Mapping[str, str]
) -> tuple[Trial, bool]:
    """Read a candidate and its result; whether it has one."""
    if not re.fullmatch(r"\w[\w.-]{0,199}", name, re.ASCII):
        raise UsageError(f"{FILE} is damaged: {name[:200]!r} is no candidate.")
    code = results / f"{name}.code"
    try:
        planned = from_line(line.encode())
        if not isinstance(planned, Trial) or not planned.calls:
            raise ValueError(f"{name} is no trial")
        if planned.session != session:
            raise ValueError(f"{name} is of another session")
        if not code.exists():
            return planned, False
        number = int(_first_line(code))
    except ValueError as error:
        raise UsageError(f"{FILE} or {code} is damaged: {str(error)[:300]}.") from None
    out, err = (_bytes(results / f"{name}.{end}") for end in ("out", "err"))
    # A shell gives 128 + n after signal n; timeout kills.
    outcome = read_outcome(128 - number if number > 128 else number, out, err)
    if number == 137:
        outcome = Outcome("hang", "It took too long, or was killed.")
    outcome = checked(outcome, planned.calls)
    ratio, noise = None, 0.0
    if outcome.status == "ok":
        against = compare(outcome, planned.calls)
        ratio, noise = against.ratio, against.noise
    key = replace(planned.target, chip=chip)
    when = code.stat().st_mtime
    trial = replace(planned, target=key)
    try:
        done = made(trial, outcome, ratio, noise, dict(machine), seconds=when)
        from_line(to_line(done))  # what cannot be read again is not written
    except (ValueError, OverflowError) as error:
        raise UsageError(f"{code} or what is beside it is damaged: {error}.") from None
    return done, True


def _with_bests(found: Sequence[tuple[Trial, bool]]) -> list[Trial]:
    """Mark each task's default and, where it is better beyond the noise, the best of the others.

    Parameters
    ----------
    found : sequence of (Trial, bool)
        All candidates, each task's default before its others, and which of them have results;
        the others are left out.
    """
    groups: dict[tuple[str, str], list[tuple[Trial, bool]]] = {}
    for trial, is_made in found:
        groups.setdefault((trial.rule, trial.spec.to_json()), []).append((trial, is_made))
    marked: list[Trial] = []
    for (default, has_default), *rest in groups.values():
        others = [trial for trial, is_made in rest if is_made]
        if default.status == "ok":
            default = replace(default, ratio=1.0, best=True)  # it was measured against itself
        winners = [t for t in others if t.ratio is not None and Comparison(t.ratio, t.noise).wins]
        best = min(winners, key=lambda t: t.ratio or 1.0, default=None)
        marked += [default] if has_default else []
        marked += [replace(t, best=t is best) for t in others]
    return marked


def _first_line(path: Path) -> str:
    lines = _bytes(path).decode(errors="replace").splitlines()
    return lines[0].strip()[:200] if lines else ""


def _bytes(path: Path) -> bytes:
    """Read a file; empty where there is none. A bundle comes from elsewhere: no pipes, no devices.

    Raises
    ------
    UsageError
        It is too large, no file, or cannot be read.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise UsageError(f"{path} is no file of a bundle's.")
            data = file.read(_MOST_BYTES + 1)
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise UsageError(f"Cannot read {path}: {error.strerror or error}.") from None
    if len(data) > _MOST_BYTES:
        raise UsageError(f"{path} is too large for a bundle's.")
    return data
