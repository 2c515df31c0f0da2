"""The driver of tuning: a model's tasks, a measurer, a session, a report."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

from gqsa_compiler.bandwidth import (
    available_bytes,
    last_level_cache_bytes,
    measure_read_bandwidth,
)
from gqsa_compiler.compile import plan_kernels
from gqsa_compiler.compile_options import CompileOptions
from gqsa_compiler.errors import UsageError
from gqsa_compiler.outdir import check_output, staged_directory
from gqsa_compiler.progress import Progress
from gqsa_compiler.runtime.cpus import allowed_cpus, default_threads
from gqsa_compiler.targets import TargetSpec, parse_target
from gqsa_compiler.tuning.bundle import Exported, export_bundle
from gqsa_compiler.tuning.database import Database
from gqsa_compiler.tuning.here import check_runs_here
from gqsa_compiler.tuning.key import gpu_chip, host_chip, slug
from gqsa_compiler.tuning.lookup import Known, Tuned, open_tuned, shipped
from gqsa_compiler.tuning.measure.builders import BuilderPool
from gqsa_compiler.tuning.measure.local import LocalMeasurer, Measurer
from gqsa_compiler.tuning.measure.workspace import Limits
from gqsa_compiler.tuning.session import Observe, Session
from gqsa_compiler.tuning.task_state import How, Result, Settings
from gqsa_compiler.tuning.tasks import Task, Workload, extract


@dataclass(frozen=True)
class TuneOptions:
    """How to tune a model.

    Parameters
    ----------
    target : str
        One TARGET name.
    prompt, gen : int
        The workload: tokens of a prompt, and tokens generated after it.
    trials : int or None
    minutes : float or None
        The budget; with neither, 20 minutes.
    threads : int or None
        None: one a core.
    search : str
        ``model``, ``random`` or ``all``.
    seed : int
    resume : bool
    compile : CompileOptions
        What else the model is compiled with; its target is not read.
    limits : Limits
    tracker : str or None
        ``HOST:PORT`` of a TVM RPC tracker whose machines measure, instead of this one.
    key : str
        Of those machines there.
    chip : str or None
        Their processor's name; this machine's is known. Of a bundle: the processor whose records
        of the database are taken, if it has several's.
    """

    target: str = "cpu"
    prompt: int = 128
    gen: int = 128
    trials: int | None = None
    minutes: float | None = None
    threads: int | None = None
    search: How = "model"
    seed: int = 0
    resume: bool = False
    compile: CompileOptions = field(default_factory=CompileOptions)
    limits: Limits = field(default_factory=Limits)
    tracker: str | None = None
    key: str = "gqsa"
    chip: str | None = None


DEFAULT_MINUTES = 20.0
_MOST_TOKENS = 1_000_000_000
_MOST_TRIALS = 1_000_000_000
_MOST_THREADS = 1024
_CACHES = 2
_MOST_BUILDERS = 4  # a GPU measures faster than nvcc compiles; each takes some 500 MB
_MEMORY_SHARE = 8  # of the memory that is available, for each of two kernels


def _one_target(options: TuneOptions) -> TargetSpec:
    """Check what can be checked before the model is read, and look the target up."""
    if "," in options.target:
        raise UsageError(f"One target is tuned at a time; {options.target} names several.")
    if options.prompt < 1 or options.gen < 1:
        raise UsageError("A workload has at least one token of a prompt and one generated.")
    if max(options.prompt, options.gen) > _MOST_TOKENS:
        raise UsageError(f"A workload has at most {_MOST_TOKENS} tokens of each kind.")
    if options.trials is not None and options.trials < 1:
        raise UsageError(f"trials is {options.trials} and must be at least 1.")
    if options.trials is not None and options.trials > _MOST_TRIALS:
        raise UsageError(f"trials is more than {_MOST_TRIALS}; leave it out for no limit.")
    if not 0 <= options.seed < 1 << 32:
        raise UsageError(f"seed is {options.seed} and must be from 0 to {(1 << 32) - 1}.")
    if options.threads is not None and not 1 <= options.threads <= _MOST_THREADS:
        raise UsageError(f"threads is {options.threads} and must be from 1 to {_MOST_THREADS}.")
    if options.minutes is not None and not options.minutes >= 0:  # NaN neither
        raise UsageError(f"minutes is {options.minutes} and must be 0 or more.")
    return parse_target(options.target)


def model_tasks(
    model: str, options: TuneOptions, progress: Progress | None = None
) -> tuple[TargetSpec, tuple[Task, ...]]:
    """Compile a model's passes and list its tasks.

    Raises
    ------
    UsageError
        Bad options, or several targets.
    ModelError, CheckpointError, CompileError
        The model cannot be read or compiled.
    """
    target = _one_target(options)
    settings = CompileOptions(
        target=options.target,
        context_length=options.compile.context_length,
        prefill_chunk=options.compile.prefill_chunk,
        max_batch=options.compile.max_batch,
        activations=options.compile.activations,
        head=options.compile.head,
        kv_cache=options.compile.kv_cache,
    )
    plan, weights = plan_kernels(model, settings, progress=progress)
    workload = Workload(options.prompt, options.gen, settings.prefill_chunk)
    return target, extract(plan, weights, workload)


def tune_model(
    model: str,
    database: Path,
    options: TuneOptions | None = None,
    *,
    progress: Progress | None = None,
    observe: Observe | None = None,
) -> Result:
    """Tune a model's kernels on this machine.

    Parameters
    ----------
    model : str
        A GQSA checkpoint, or a dense model, whose layers are tuned as they are.
    database : Path
        Directory of the records; made if it is missing.
    options : TuneOptions or None
    progress : callable, optional
        Called as ``progress(stage, done, total)`` while the model is read.
    observe : callable, optional
        Called with the session after everything that happens in it.

    Raises
    ------
    UsageError
        Bad options, a target that this machine cannot run, or a library that is missing.
    ModelError, CheckpointError, CompileError
        The model cannot be read or compiled, or nothing of it can be measured.
    """
    options = options or TuneOptions()
    if options.tracker is not None and options.chip is None:
        raise UsageError(
            "With --tracker the processor of its machines has to be named: --chip NAME, which "
            "gqsa compile --chip then takes."
        )
    target = _one_target(options)
    if options.tracker is None:
        check_runs_here(target)
        if target.kind != "cuda" and (options.threads or 1) > len(allowed_cpus()):
            raise UsageError(
                f"threads is {options.threads} and this process may use {len(allowed_cpus())} "
                f"CPUs; choose 1 to {len(allowed_cpus())}."
            )
    elif target.kind == "cuda":
        raise UsageError(
            "Machines of a tracker measure for CPUs only; run gqsa tune on the machine with the "
            "GPU, or carry a bundle to it: gqsa tune export."
        )
    files = Database(database)
    files.check()
    target, tasks = model_tasks(model, options, progress)
    minutes = options.minutes
    if minutes is None and options.trials is None:
        minutes = DEFAULT_MINUTES
    threads = options.threads or default_threads()
    settings = Settings(
        options.trials,
        None if minutes is None else 60.0 * minutes,
        options.search,
        options.seed,
        threads,
        options.resume,
        options.limits if target.kind == "cuda" else _here(options.limits),
    )
    if options.chip:
        chip = slug(options.chip)
    else:
        chip = gpu_chip() if target.kind == "cuda" else host_chip()
    known = [Known(trial, 0) for trial in files.read().trials]
    known += [Known(trial, 1) for trial in shipped()]
    with tempfile.TemporaryDirectory(prefix="gqsa-tune-") as folder:
        measurer = _measurer(options, target, Path(folder) / "program")
        session = Session(
            tasks,
            target,
            chip,
            Path(model).name,
            Workload(options.prompt, options.gen, options.compile.prefill_chunk),
            files,
            measurer,
            settings,
            Path(folder) / "tasks",
            Tuned(known, chip),
            observe,
            _read_bandwidth(options, measurer, threads),
            _builders(options, target, measurer),
        )
        return session.run()


def _here(limits: Limits) -> Limits:
    """Let calls take turns on more weights than this machine's caches hold, if memory allows."""
    wanted = max(limits.rotate_bytes, _CACHES * last_level_cache_bytes())
    return replace(limits, rotate_bytes=min(wanted, available_bytes() // _MEMORY_SHARE))


def _read_bandwidth(options: TuneOptions, measurer: Measurer, threads: int) -> float:
    """Measure this machine's memory, or its GPU's, in bytes a second; 0 where nobody asks."""
    known = measurer.read_bandwidth
    if known or options.tracker is not None or options.resume:
        return known
    return measure_read_bandwidth(threads, repeats=3)


def _builders(options: TuneOptions, target: TargetSpec, measurer: Measurer) -> BuilderPool | None:
    """Start what builds while others are measured; nothing does where this CPU is measured."""
    cores = default_threads()
    if options.tracker is not None:
        return BuilderPool(max(1, min(measurer.slots, cores)))
    return BuilderPool(max(1, min(_MOST_BUILDERS, cores - 1))) if target.kind == "cuda" else None


def _measurer(options: TuneOptions, target: TargetSpec, folder: Path) -> Measurer:
    if options.tracker is None:
        return LocalMeasurer(folder, target)
    from gqsa_compiler.tuning.measure.remote import (
        RemoteMeasurer,
        parse_tracker,
        tracker_connect,
    )

    connect, count = tracker_connect(*parse_tracker(options.tracker), options.key)
    return RemoteMeasurer(connect, count, f"{options.key} at {options.tracker}")


def export_model(
    model: str,
    output: Path,
    options: TuneOptions,
    *,
    database: Path | None = None,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Exported:
    """Build candidates of a model's kernels into a bundle for another machine.

    Parameters
    ----------
    model : str
    output : Path
        The bundle's directory; written aside and renamed when whole.
    options : TuneOptions
        `trials` candidates in all, 100 if that is None.
    database : Path or None
        What it knows to be good is among the candidates.
    jobs : int or None
        Candidates that are built at once; None: one a core.
    progress : callable or None

    Raises
    ------
    UsageError, ModelError, CheckpointError, CompileError
        As `tune_model`; or the target has no bundles.
    """
    check_output(output)
    target, tasks = model_tasks(model, options, progress)
    known = open_tuned(database, target, options.chip) if database is not None else None
    with staged_directory(output) as staging:
        return export_bundle(
            staging,
            tasks,
            target,
            Path(model).name,
            Workload(options.prompt, options.gen, options.compile.prefill_chunk),
            trials=options.trials or 100,
            threads=options.threads or default_threads(),
            seed=options.seed,
            limits=options.limits,
            known=known,
            progress=progress,
            jobs=jobs or default_threads(),
        )
