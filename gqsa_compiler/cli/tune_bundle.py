"""`gqsa tune export | import`: measuring on a machine that cannot be reached."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from gqsa_compiler.cli import options
from gqsa_compiler.cli.command import command
from gqsa_compiler.cli.console import counted, emit_json, note, progress, show_settings


@command
def export(
    model: options.Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory to write.")],
    target: Annotated[str, typer.Option(help="One TARGET, see gqsa compile.")],
    trials: Annotated[int, typer.Option(min=1, help="Candidates to build.")] = 100,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 128,
    gen: Annotated[int, typer.Option(min=1, help="Tokens generated after it.")] = 128,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of that machine.")] = 4,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Candidates built at once.", show_default="one for every core"),
    ] = None,
    db: Annotated[
        Path | None, typer.Option("--db", help="Build the best of this database too.")
    ] = None,
    chip: Annotated[
        str | None,
        typer.Option(help="Processor in --db.", show_default="the only one it has measurements of"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the choice and of the data.")] = 0,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Build candidates into a directory that needs no compiler to be measured."""
    show_settings(
        "tune export",
        {
            "model": model,
            "target": target,
            "output": output,
            "candidates": trials,
            "workload": f"prompts of {prompt} tokens, {gen} generated after each",
            "threads": None if target.startswith(("cuda", "nvidia/")) else threads,
            "jobs": jobs or "one for every core",
            "database": db,
            "chip": chip,
            "seed": seed,
        },
    )
    from gqsa_compiler.tune import TuneOptions, export_model

    settings = TuneOptions(target, prompt, gen, trials, threads=threads, seed=seed, chip=chip)
    with progress() as report_progress:
        found = export_model(
            model, output, settings, database=db, jobs=jobs, progress=report_progress
        )
    if json:
        emit_json(dataclasses.asdict(found))
        return
    for name, count in found.candidates.items():
        failed = found.failed[name]
        rest = f", {failed} could not be built" if failed else ""
        print(f"{name}: {counted(count, 'kernel')}{rest}")
    note(
        f"Wrote {output}. Copy it to the machine, run {output.name}/run.sh there, copy it back: "
        f"gqsa tune import {output} --db DB"
    )


@command
def import_(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="A bundle that was run.", show_default=False)
    ],
    db: Annotated[Path, typer.Option("--db", help="Database to add the results to.")],
    chip: Annotated[
        str | None,
        typer.Option(
            help="Name of the processor.", show_default="by what its system or driver says"
        ),
    ] = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Read a bundle's results into a database."""
    from gqsa_compiler.tuning.bundle_results import import_bundle
    from gqsa_compiler.tuning.database import Database
    from gqsa_compiler.tuning.report import write_report

    session, count = import_bundle(directory, Database(db), chip)
    page = db / f"{session}.html"
    write_report(Database(db), session, page)
    if json:
        emit_json({"session": session, "records": count, "report": str(page)})
        return
    print(f"{counted(count, 'record')} added")
    note(f"Wrote {page}.")
