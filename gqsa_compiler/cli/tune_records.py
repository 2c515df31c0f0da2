"""`gqsa tune show | best | merge | prune`: what a tuning database holds."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gqsa_compiler.cli import options
from gqsa_compiler.cli.command import command
from gqsa_compiler.cli.console import counted, emit_json, emit_table, note, show_settings

if TYPE_CHECKING:
    from gqsa_compiler.tuning.records import Trial

Directory = Annotated[
    Path, typer.Argument(metavar="DB", help="A tuning database.", show_default=False)
]


@command
def show(db: Directory, json: options.Json = False, verbose: options.Verbose = False) -> None:
    """List what a database holds: targets, processors, kernels, how many trials, what failed."""
    from gqsa_compiler.tuning.state import open_database, overview

    found = overview(open_database(db))
    if json:
        emit_json(found)
        return
    from rich.table import Table

    table = Table("target", "processor", "TVM", "kernel", "shape", box=None)
    for heading in ("trials", "failed", "gain"):
        table.add_column(heading, justify="right")
    table.add_column("records")
    for line in found["kernels"]:
        table.add_row(
            line["target"],
            line["chip"],
            line["tvm"],
            line["rule"],
            f"{line['n']} x {line['k']}, {line['density']:.0%}",
            str(line["trials"]),
            str(sum(line["failures"].values())),
            "" if line["gain"] is None else f"{line['gain']:.2f}x",
            "used" if line["current"] else "kept, of other versions",
        )
    emit_table(table)
    print(f"\n{counted(found['sessions'], 'session')}, {counted(found['trials'], 'trial')}")
    if found["unreadable"]:
        lines = counted(found["unreadable"], "line")
        note(f"{lines} cannot be read; gqsa tune prune removes such lines.")


@command
def best(
    db: Directory,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Also write these records into this database."),
    ] = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """List the best configuration of every shape, of the versions that are installed."""
    from gqsa_compiler.tuning.database import Database
    from gqsa_compiler.tuning.state import best_trials, open_database

    trials = best_trials(open_database(db).read().trials)
    if output is not None:
        Database(output).append(*trials)
        note(f"Wrote {counted(len(trials), 'record')} into {output}.")
    if json:
        emit_json([_best(trial) for trial in trials])
        return
    from rich.table import Table

    table = Table("processor", "kernel", "shape", box=None)
    table.add_column("gain", justify="right")
    table.add_column("configuration")
    for trial in trials:
        table.add_row(
            trial.target.chip,
            trial.rule,
            f"{trial.spec.n} x {trial.spec.k}, {trial.density:.0%}",
            f"{1 / (trial.ratio or 1.0):.2f}x",
            " ".join(f"{key}={value}" for key, value in trial.config.items()),
        )
    emit_table(table)


def _best(trial: Trial) -> dict[str, Any]:
    return {
        "target": trial.target.cpu or trial.target.arch,
        "chip": trial.target.chip,
        "rule": trial.rule,
        "n": trial.spec.n,
        "k": trial.spec.k,
        "density": trial.density,
        "ratio": trial.ratio,
        "seconds": {str(m): s for m, s in trial.seconds.items()},
        "config": trial.config,
    }


@command
def merge(
    db: Directory,
    others: Annotated[
        list[Path], typer.Argument(metavar="OTHER...", help="Databases whose records to add.")
    ],
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Add other databases' records to DB; those that it has are not added again."""
    from gqsa_compiler.tuning.database import Database
    from gqsa_compiler.tuning.state import open_database

    mine = Database(db)
    added = {str(other): mine.merge(open_database(other)) for other in others}
    if json:
        emit_json({"added": added})
        return
    for name, count in added.items():
        print(f"{name}: {counted(count, 'record')} added")


@command
def prune(
    db: Directory,
    failed: Annotated[
        bool, typer.Option("--failed", help="Remove trials that failed, too.")
    ] = False,
    old: Annotated[
        bool, typer.Option("--old", help="Remove records of other versions, too.")
    ] = False,
    losers: Annotated[
        bool, typer.Option("--losers", help="Remove trials that were no new best, too.")
    ] = False,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Remove lines that cannot be read, and the records that the options name."""
    show_settings("tune prune", {"database": db, "failed": failed, "old": old, "losers": losers})
    from gqsa_compiler.tuning.state import is_current, open_database

    database = open_database(db)
    drop = [
        trial
        for trial in database.read().trials
        if (failed and trial.status != "ok")
        or (old and not is_current(trial))
        or (losers and trial.status == "ok" and not trial.best)
    ]
    kinds = Counter(trial.status for trial in drop)
    removed = database.prune(drop)
    if json:
        emit_json({"removed_lines": removed, "records": dict(kinds)})
        return
    print(f"{counted(removed, 'line')} removed, {len(drop)} of them records")
