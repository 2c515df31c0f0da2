"""Bundles: candidates built here, measured on a machine that cannot be reached.

bundle.json                 what is inside
run.sh                      measures everything that has no result yet
gqsa-measure, lib/          the measuring program, and the runtime libraries that it needs
tasks/0/...                 a workspace for each task (`measure/workspace.py`)
results/                    what `run.sh` leaves: an output and an exit code a candidate
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from gqsa_compiler.errors import CompileError, GqsaError, UsageError
from gqsa_compiler.native import native_folder
from gqsa_compiler.progress import Progress
from gqsa_compiler.runtime.cpus import host_arch
from gqsa_compiler.targets import TargetSpec
from gqsa_compiler.tuning.database import Database
from gqsa_compiler.tuning.key import TargetKey, host_chip, slug, source_hash
from gqsa_compiler.tuning.lookup import Tuned, config_fields
from gqsa_compiler.tuning.measure.case import make_case
from gqsa_compiler.tuning.measure.local import (
    LIBRARIES,
    PROGRAM,
    build_program,
    host_libraries,
    read_outcome,
)
from gqsa_compiler.tuning.measure.outcome import Comparison, Outcome, compare
from gqsa_compiler.tuning.measure.workspace import BuildError, Limits, Workspace
from gqsa_compiler.tuning.records import Entry, SessionStart, Trial, from_line, to_line
from gqsa_compiler.tuning.session import new_name, now
from gqsa_compiler.tuning.tasks import Task, Workload

FILE, SCRIPT, RESULTS = "bundle.json", "run.sh", "results"
FORMAT, VERSION = "gqsa-tuning-bundle", 1
_MOST_BYTES = 64 << 20

_SCRIPT = """#!/bin/sh
# Measures the candidates of this bundle; what has a result already is left as it is.
# GQSA_EMULATOR may name a program that runs another machine's, with its options.
cd "$(dirname "$0")" || exit 1
mkdir -p results
cat /proc/cpuinfo > results/cpuinfo 2>/dev/null
uname -snrm > results/uname
limit=""
if command -v timeout > /dev/null; then limit="timeout -s KILL {seconds}"; fi
for folder in tasks/*/candidates/*; do
  name=$(echo "$folder" | tr / -)
  if [ -f "results/$name.code" ]; then continue; fi
  echo "$name" >&2
  $limit $GQSA_EMULATOR ./{program} "$folder" ./lib > "results/$name.out" 2> "results/$name.err"
  echo $? > "results/$name.part"
  mv "results/$name.part" "results/$name.code"
done
echo "done; take this directory back and: gqsa tune import DIRECTORY --db DB" >&2
"""


@dataclass(frozen=True)
class Exported:
    """What a bundle holds: candidates by task, and those that could not be built."""

    candidates: dict[str, int]
    failed: dict[str, int]


def export_bundle(
    directory: Path,
    tasks: Sequence[Task],
    target: TargetSpec,
    model: str,
    workload: Workload,
    *,
    trials: int,
    threads: int,
    seed: int = 0,
    limits: Limits | None = None,
    known: Tuned | None = None,
    progress: Progress | None = None,
) -> Exported:
    """Build candidates of tasks into a directory.

    Parameters
    ----------
    directory : Path
        Empty.
    tasks : sequence of Task
    target : TargetSpec
        A CPU's.
    model : str
    workload : Workload
    trials : int
        Candidates in all, besides each task's default.
    threads : int
        That kernels run on.
    seed : int
        Of the choice of candidates, and of the data.
    limits : Limits or None
    known : Tuned or None
        Where the candidates to take in any case are looked up.
    progress : callable or None

    Raises
    ------
    UsageError
        The target is no CPU.
    CompileError
        The program, the libraries or a default kernel cannot be made.
    """
    if target.kind != "llvm" or target.linked:
        raise UsageError(
            f"{target.name} has no measuring program: bundles are for CPUs with Linux. Name "
            "another target, such as aarch64."
        )
    limits = limits or Limits()
    build_program(target, directory / PROGRAM)
    _libraries(target, directory / "lib")
    counts, failed = _shares(tasks, target, trials), {}
    lines: dict[str, str] = {}
    say = progress or (lambda *_: None)
    done, total = 0, sum(counts.values()) + len(tasks)
    session = f"bundle-{new_name()}"
    for number, task in enumerate(tasks):
        folder = directory / "tasks" / str(number)
        space = list(task.rule.space(task.spec, target))
        case = make_case(task, space[0], seed)
        work = Workspace(folder, case, target, threads, limits)
        chosen = _candidates(task, target, counts[task.name], seed, known)
        incumbent = None
        failed[task.name] = 0
        for config in chosen:
            say("building candidates", done, total)
            done += 1
            try:
                candidate = work.build(config)
            except BuildError as error:
                if incumbent is None:
                    raise CompileError(f"The default kernel of {task.name}: {error}") from error
                failed[task.name] += 1
                continue
            incumbent = incumbent or candidate
            work.write_job(candidate, incumbent)
            name = "-".join(candidate.folder.relative_to(directory).parts)
            trial = _trial(task, target, config, session)
            lines[name] = to_line(trial).decode()
        facts = {**task.describe(), "bytes": work.weight_bytes, "share": 0.0}
        lines[f"task-{number}"] = json.dumps(facts)
    say("building candidates", total, total)
    head = {
        "format": FORMAT,
        "version": VERSION,
        "session": session,
        "model": model,
        "prompt": workload.prompt,
        "gen": workload.gen,
        "target": target.name,
        "threads": threads,
        "tasks": [json.loads(lines.pop(f"task-{n}")) for n in range(len(tasks))],
        "candidates": lines,
    }
    (directory / FILE).write_text(json.dumps(head, indent=1) + "\n", encoding="utf-8")
    script = _SCRIPT.format(seconds=round(limits.run_seconds), program=PROGRAM)
    (directory / SCRIPT).write_text(script, encoding="utf-8")
    (directory / SCRIPT).chmod(0o755)
    built = {task.name: counts[task.name] + 1 - failed[task.name] for task in tasks}
    return Exported(built, failed)


def _shares(tasks: Sequence[Task], target: TargetSpec, trials: int) -> dict[str, int]:
    """Share trials out by the weights that a task's layers read and multiply."""
    costs = {t.name: t.layers * t.spec.n * t.spec.k * t.density for t in tasks}
    total = sum(costs.values())
    most = {t.name: len(t.rule.space(t.spec, target)) - 1 for t in tasks}
    return {
        name: min(most[name], max(1, round(trials * cost / total))) for name, cost in costs.items()
    }


def _candidates(
    task: Task, target: TargetSpec, count: int, seed: int, known: Tuned | None
) -> list[Any]:
    """Choose the default, what is known to be good, and others at random."""
    space = list(task.rule.space(task.spec, target))
    first = [space[0]]
    if known is not None:
        first.append(known.choose(task.rule, task.spec, target).config)
    rest = [config for config in space if config not in first]
    random.Random(f"{seed} {task.name}").shuffle(rest)
    return list(dict.fromkeys([*first, *rest]))[: count + 1]


def _trial(task: Task, target: TargetSpec, config: Any, session: str) -> Trial:
    return Trial(
        target=TargetKey.of(target, ""),  # known when it has run
        kernels=source_hash(task.rule),
        producer=metadata.version("gqsa-compiler"),
        rule=task.rule.name,
        layout_version=task.rule.layout_version,
        spec=task.code,
        density=task.density,
        rows=task.rows,
        config=config_fields(config),
        status="build",
        calls=dict(task.calls),
        session=session,
    )


def _libraries(target: TargetSpec, folder: Path) -> None:
    """Copy TVM's runtime libraries for a target."""
    if target.arch == host_arch():
        links = host_libraries(folder)
        for name in LIBRARIES:
            found = (links / name).resolve()
            (links / name).unlink()
            shutil.copy2(found, links / name)
        return
    place = native_folder(target.arch) / "lib"
    folder.mkdir()
    for name in LIBRARIES:
        if not (place / name).is_file():
            raise CompileError(
                f"A bundle for {target.arch} needs its runtime libraries, and there is no "
                f"{place / name}; make it with gqsa native {target.arch}."
            )
        shutil.copy2(place / name, folder / name)


def import_bundle(directory: Path, database: Database, chip: str | None = None) -> tuple[str, int]:
    """Read a bundle's results into a database.

    Parameters
    ----------
    directory : Path
        A bundle that was run.
    database : Database
    chip : str or None
        The processor; None: by the /proc/cpuinfo that the run has left.

    Returns
    -------
    str, int
        The session's name in the database, and the number of new records.

    Raises
    ------
    UsageError
        It is no bundle, or was not run.
    """
    head = _read_head(directory)
    results = directory / RESULTS
    if not results.is_dir():
        raise UsageError(f"{directory} has no results; run {SCRIPT} in it on the machine first.")
    if chip is None and (results / "cpuinfo").is_file():
        chip = host_chip(results / "cpuinfo")
    if not chip:
        raise UsageError(f"{results} does not tell the processor; name it with --chip.")
    machine = {"host": _first_line(results / "uname"), "how": "bundle", "threads": head["threads"]}
    trials = []
    for name, line in head["candidates"].items():
        trial = _measured(results, name, line, slug(chip), machine)
        if trial is not None:
            trials.append(trial)
    if not trials:
        raise UsageError(f"{results} has no results; run {SCRIPT} on the machine first.")
    entries = [*_with_bests(trials)]
    start = SessionStart(
        entries[0].target,
        head["session"],
        head["model"],
        head["prompt"],
        head["gen"],
        tuple(head["tasks"]),
        entries[0].time,
    )
    known = {to_line(entry) for entry in database.read().entries}
    made: list[Entry] = [start, *entries]
    new = [entry for entry in made if to_line(entry) not in known]
    database.append(*new)
    return head["session"], sum(isinstance(entry, Trial) for entry in new)


def _read_head(directory: Path) -> dict[str, Any]:
    path = directory / FILE
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise UsageError(f"{path} is too large for a bundle's.")
        head = json.loads(path.read_bytes())
    except OSError:
        raise UsageError(f"{directory} is no tuning bundle: it has no {FILE}.") from None
    except (ValueError, RecursionError):
        raise UsageError(f"{path} is damaged: it is not JSON.") from None
    if not isinstance(head, dict) or head.get("format") != FORMAT or head.get("version") != VERSION:
        raise UsageError(f"{path} is not of a tuning bundle that this release reads.")
    checks: dict[str, Callable[[Any], bool]] = {
        **{k: lambda v: isinstance(v, str) and len(v) < 200 for k in ("session", "model")},
        **{k: lambda v: type(v) is int and 0 < v < 1 << 31 for k in ("prompt", "gen", "threads")},
        "tasks": lambda v: isinstance(v, list) and all(isinstance(t, dict) for t in v),
        "candidates": lambda v: isinstance(v, dict) and all(isinstance(x, str) for x in v.values()),
    }
    for name, fits in checks.items():
        if not fits(head.get(name)):
            raise UsageError(f"{path} is damaged: {name} is missing or wrong.")
    return {**head, "threads": str(head["threads"])}


def _measured(
    results: Path, name: str, line: str, chip: str, machine: Mapping[str, str]
) -> Trial | None:
    """Read a candidate's result; None where it has none."""
    if "/" in name or name.startswith("."):
        raise UsageError(f"{FILE} is damaged: {name!r} is no candidate.")
    code = results / f"{name}.code"
    if not code.is_file():
        return None
    try:
        planned = from_line(line.encode())
        if not isinstance(planned, Trial):
            raise ValueError("no trial")
        number = int(_first_line(code))
    except ValueError as error:
        raise UsageError(f"{FILE} or {code} is damaged: {error}.") from None
    out, err = (_bytes(results / f"{name}.{end}") for end in ("out", "err"))
    # A shell gives 128 + n after signal n; timeout kills.
    outcome = read_outcome(128 - number if number > 128 else number, out, err)
    if number == 137:
        outcome = Outcome("hang", "It took too long, or was killed.")
    ratio, noise = None, 0.0
    if outcome.status == "ok":
        if set(planned.calls) - set(outcome.samples):
            outcome = Outcome("crash", "Samples are missing.")
        else:
            found = compare(outcome, planned.calls)
            ratio, noise = found.ratio, found.noise
    return Trial(
        **{
            **planned.__dict__,
            "target": TargetKey(**{**planned.target.__dict__, "chip": chip}),
            "status": outcome.status,
            "message": outcome.message[:1000],
            "seconds": outcome.medians() if outcome.status == "ok" else {},
            "ratio": ratio,
            "noise": noise,
            "machine": dict(machine),
            "time": now(code.stat().st_mtime),
        }
    )


def _with_bests(trials: Sequence[Trial]) -> list[Trial]:
    """Mark each task's default and, where it is better beyond the noise, the best of the others."""
    groups: dict[tuple[str, str], list[Trial]] = {}
    for trial in trials:
        groups.setdefault((trial.rule, trial.spec.to_json()), []).append(trial)
    marked: list[Trial] = []
    for first, *others in groups.values():
        default = first
        if default.status == "ok":
            default = replace(default, ratio=1.0, best=True)  # it was measured against itself
        winners = [t for t in others if t.ratio is not None and Comparison(t.ratio, t.noise).wins]
        best = min(winners, key=lambda t: t.ratio or 1.0, default=None)
        marked.append(default)
        marked += [replace(t, best=t is best) for t in others]
    return marked


def _first_line(path: Path) -> str:
    lines = _bytes(path).decode(errors="replace").splitlines()
    return lines[0].strip()[:200] if lines else ""


def _bytes(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise GqsaError(f"{path} is too large for a result.")
        return path.read_bytes()
    except FileNotFoundError:
        return b""
