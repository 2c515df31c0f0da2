"""`gqsa tune MODEL`: search for the configurations that a model's kernels run fastest with."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from gqsa_compiler.cli import options
from gqsa_compiler.cli.command import command
from gqsa_compiler.cli.console import counted, emit_json, emit_table, note, show_settings
from gqsa_compiler.cli.paths import require_place
from gqsa_compiler.cli.signals import own_ctrl_c
from gqsa_compiler.cli.tune_live import live
from gqsa_compiler.units import seconds_text

if TYPE_CHECKING:
    from gqsa_compiler.tuning.task_state import Result, TaskState

INTERRUPTED = 130
DEFAULT_DB = Path("tuning")

Db = Annotated[Path, typer.Option("--db", help="Directory of the database; made if it is missing.")]


@command
def tune(
    model: options.Model,
    target: Annotated[
        str, typer.Option(help="One TARGET that this machine can run, see gqsa compile.")
    ] = "cpu",
    db: Db = DEFAULT_DB,
    trials: Annotated[
        int | None, typer.Option(min=1, help="Most configurations to try.", show_default="no limit")
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(min=0.0, help="Most time.", show_default="20, or no limit with --trials"),
    ] = None,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 128,
    gen: Annotated[int, typer.Option(min=1, help="Tokens generated after it.")] = 128,
    threads: options.Threads = None,
    search: Annotated[
        Literal["model", "random", "all"],
        typer.Option(help="By a cost model that learns on the way, at random, or everything."),
    ] = "model",
    seed: Annotated[int, typer.Option(help="Seed of the search and of the data.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the last session of this model.")
    ] = False,
    tracker: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Measure on the machines of this TVM RPC tracker, all at once.",
            show_default="on this machine",
        ),
    ] = None,
    key: Annotated[str, typer.Option(help="The machines' key at the tracker.")] = "gqsa",
    chip: Annotated[
        str | None,
        typer.Option(help="Their processor's name, for --tracker.", show_default="this machine's"),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(help="Where to write the HTML report.", show_default="DB/SESSION.html"),
    ] = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Tune MODEL's kernels; every trial is kept in the database at once."""
    show_settings(
        "tune",
        {
            "model": model,
            "target": target,
            "database": db,
            "trials": trials,
            "minutes": minutes if minutes is not None or trials is not None else 20,
            "workload": f"prompts of {prompt} tokens, {gen} generated after each",
            "threads": threads or "one for every core",
            "search": search,
            "seed": seed,
            "resume": resume or None,
            "tracker": f"{tracker}, machines of the key {key}" if tracker else None,
            "chip": chip,
        },
    )
    if report is not None:
        require_place(report, "--report")
    from gqsa_compiler.tune import TuneOptions, tune_model
    from gqsa_compiler.tuning.database import Database
    from gqsa_compiler.tuning.report import write_report

    settings = TuneOptions(
        target,
        prompt,
        gen,
        trials,
        minutes,
        threads,
        search,
        seed,
        resume=resume,
        tracker=tracker,
        key=key,
        chip=chip,
    )
    with own_ctrl_c():
        with live() as view:
            result = tune_model(model, db, settings, progress=view.stage, observe=view)
        page = report or db / f"{result.session}.html"
        write_report(Database(db), result.session, page)
    if json:
        emit_json({**summary(result), "report": str(page)})
    else:
        print_result(result)
        note(f"Wrote {page}. Next: gqsa compile {model} --target {target} --db {db}")
    if result.interrupted:
        note("Interrupted; all trials are kept. Go on with --resume.")
        raise typer.Exit(INTERRUPTED)


def summary(result: Result) -> dict[str, Any]:
    """Return what a session came to as plain dictionaries."""
    before, after = result.decode_seconds(False), result.decode_seconds(True)
    return {
        "session": result.session,
        "trials": result.trials,
        "seconds": round(result.seconds, 3),
        "interrupted": result.interrupted,
        "gain": result.gain(),
        "linear_decode_seconds": {"default": before, "tuned": after},
        "tasks": [
            {
                "name": state.task.name,
                "rule": state.task.rule.name,
                "layers": state.task.layers,
                "share": state.share,
                "trials": state.trials,
                "failures": dict(state.failures),
                "ratio": state.ratio,
                "seconds": {str(m): s for m, s in state.seconds.items()},
                "default_seconds": {str(m): s for m, s in state.baseline.items()},
                "config": dataclasses.asdict(state.incumbent.config),
            }
            for state in result.tasks
        ],
        "failed_tasks": result.failed_tasks,
    }


def _changes(state: TaskState) -> str:
    """Write what of the best configuration is not as in the default one."""
    default = dataclasses.asdict(next(iter(state.space.values())))
    best = dataclasses.asdict(state.incumbent.config)
    changed = [f"{key}={value}" for key, value in best.items() if value != default[key]]
    return " ".join(changed) or "default"


def print_result(result: Result) -> None:
    """Print the tasks and what was gained on standard output."""
    from rich.table import Table

    table = Table("task", box=None)
    for heading in ("layers", "share", "trials", "failed", "gain"):
        table.add_column(heading, justify="right")
    table.add_column("configuration")
    for state in result.tasks:
        table.add_row(
            state.task.name,
            str(state.task.layers),
            f"{state.share:.1%}",
            str(state.trials),
            str(state.failures.total()),
            f"{1 / state.ratio:.2f}x",
            _changes(state),
        )
    emit_table(table)
    for name, reason in result.failed_tasks.items():
        note(f"{name} was not tuned: {reason}")
    before, after = result.decode_seconds(False), result.decode_seconds(True)
    if after:
        print(
            f"\nlinear layers of a token: {before * 1e3:.3f} ms by default, {after * 1e3:.3f} ms "
            f"tuned; those of the workload {result.gain():.2f} times faster"
        )
    print(f"{counted(result.trials, 'trial')} in {seconds_text(result.seconds)}")
