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
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from gqsa_compiler.errors import CompileError, UsageError
from gqsa_compiler.native import native_folder
from gqsa_compiler.progress import Progress
from gqsa_compiler.runtime.cpus import host_arch
from gqsa_compiler.schedules.cuda.nvcc import find_nvcc
from gqsa_compiler.schedules.rule import KernelConfig
from gqsa_compiler.targets import TargetSpec
from gqsa_compiler.tuning.key import TargetKey
from gqsa_compiler.tuning.lookup import Tuned
from gqsa_compiler.tuning.measure.builders import BuilderPool
from gqsa_compiler.tuning.measure.case import make_case
from gqsa_compiler.tuning.measure.code import BuildError
from gqsa_compiler.tuning.measure.program import (
    PROGRAM,
    build_program,
    host_libraries,
    libraries_of,
)
from gqsa_compiler.tuning.measure.workspace import Candidate, Limits, Workspace
from gqsa_compiler.tuning.records import to_line
from gqsa_compiler.tuning.spaces import tuned_space
from gqsa_compiler.tuning.tasks import Task, Workload
from gqsa_compiler.tuning.trials import new_name, planned

FILE, SCRIPT, RESULTS, SESSION = "bundle.json", "run.sh", "results", "session"
FORMAT, VERSION = "gqsa-tuning-bundle", 1

_SCRIPT = """#!/bin/sh
# Measures the candidates of this bundle; what has a result already is left as it is.
# GQSA_EMULATOR may name a program that runs another machine's, with its options.
cd "$(dirname "$0")" || exit 1
mkdir -p results
if [ -f results/{file} ] && [ "$(cat results/{file})" != "{session}" ]; then
  echo "results/ is of another bundle; move it away" >&2
  exit 1
fi
echo "{session}" > results/{file}
cat /proc/cpuinfo > results/cpuinfo 2>/dev/null
uname -snrm > results/uname
{gpu}limit=""
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
_SCRIPT_GPU = """./{program} --gpu ./lib > results/gpu.part || exit 1
mv results/gpu.part results/gpu
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
    jobs: int = 1,
) -> Exported:
    """Build candidates of tasks into a directory.

    Parameters
    ----------
    directory : Path
        Empty.
    tasks : sequence of Task
    target : TargetSpec
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
    jobs : int
        Candidates that are built at once.

    Raises
    ------
    UsageError
        The target is a phone, whose code is linked into a program.
    CompileError
        The program, the libraries or a default kernel cannot be made, or there is no nvcc.
    """
    if target.linked:
        raise UsageError(
            f"{target.name} has no measuring program: bundles are for Linux. Name another target, "
            "such as aarch64."
        )
    if target.kind == "cuda":
        find_nvcc()
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
        default = tuned_space(task.rule, task.spec, target)[0]
        case = make_case(task, default, seed)
        work = Workspace(folder, case, target, threads, limits)
        chosen = _candidates(task, target, counts[task.name], seed, known)
        incumbent = None
        failed[task.name] = 0
        # Closed here, whatever happens: what is still being built would keep this process alive.
        with closing(_build(work, chosen, jobs)) as built:
            for config, candidate in built:
                say("building candidates", done, total)
                done += 1
                if isinstance(candidate, BuildError):
                    if incumbent is None:
                        raise CompileError(f"The default kernel of {task.name}: {candidate}")
                    failed[task.name] += 1
                    continue
                incumbent = incumbent or candidate
                work.write_job(candidate, incumbent)
                name = "-".join(candidate.folder.relative_to(directory).parts)
                # The chip is known when it has run.
                trial = planned(task, TargetKey.of(target, ""), config, session)
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
    gpu = _SCRIPT_GPU.format(program=PROGRAM) if target.kind == "cuda" else ""
    script = _SCRIPT.format(
        seconds=round(limits.run_seconds), program=PROGRAM, gpu=gpu, file=SESSION, session=session
    )
    (directory / SCRIPT).write_text(script, encoding="utf-8")
    (directory / SCRIPT).chmod(0o755)
    made = {task.name: counts[task.name] + 1 - failed[task.name] for task in tasks}
    return Exported(made, failed)


def _build(
    work: Workspace, configs: Sequence[KernelConfig], jobs: int
) -> Generator[tuple[KernelConfig, Candidate | BuildError], None, None]:
    """Build candidates, in their order, each as soon as it and those before it are there."""
    if jobs == 1:
        for config in configs:
            try:
                yield config, work.build(config)
            except BuildError as error:
                yield config, error
        return
    with closing(BuilderPool(jobs)) as pool, ThreadPoolExecutor(jobs) as threads:
        try:
            folders = [work.place() for _ in configs]
            pending = [
                threads.submit(pool.build, work, config, folder)
                for config, folder in zip(configs, folders, strict=True)
            ]
            for config, folder, future in zip(configs, folders, pending, strict=True):
                try:
                    future.result()
                    yield config, work.complete(config, folder)
                except BuildError as error:
                    yield config, error
        finally:
            pool.close()
            threads.shutdown(cancel_futures=True)


def _shares(tasks: Sequence[Task], target: TargetSpec, trials: int) -> dict[str, int]:
    """Share trials out by the weights that a task's layers read and multiply."""
    costs = {t.name: t.layers * t.spec.n * t.spec.k * t.density for t in tasks}
    total = sum(costs.values()) or 1.0  # nothing is kept at all
    most = {t.name: len(tuned_space(t.rule, t.spec, target)) - 1 for t in tasks}
    return {
        name: min(most[name], max(1, round(trials * cost / total))) for name, cost in costs.items()
    }


def _candidates(
    task: Task, target: TargetSpec, count: int, seed: int, known: Tuned | None
) -> list[KernelConfig]:
    """Choose the default, what is known to be good, and others at random."""
    space = list(tuned_space(task.rule, task.spec, target))
    first = [space[0]]
    if known is not None:
        good = known.choose(task.rule, task.spec, target).config
        first += [good] if good in space else []
    rest = [config for config in space if config not in first]
    random.Random(f"{seed} {task.name}").shuffle(rest)
    return list(dict.fromkeys([*first, *rest]))[: count + 1]


def _libraries(target: TargetSpec, folder: Path) -> None:
    """Copy TVM's runtime libraries for a target."""
    if target.machine == host_arch():
        for link in list(host_libraries(folder, target).iterdir()):
            found = link.resolve()
            link.unlink()
            shutil.copy2(found, link)
        return
    place = native_folder(target.machine) / "lib"
    folder.mkdir()
    for name in libraries_of(target):
        if not (place / name).is_file():
            raise CompileError(
                f"A bundle for {target.arch} needs its runtime libraries, and there is no "
                f"{place / name}; make it with gqsa native {target.arch}."
            )
        shutil.copy2(place / name, folder / name)
