"""`gqsa native`: build the native program for bundles."""

from __future__ import annotations

from typing import Annotated

import typer

from gqsa_compiler.cli import options
from gqsa_compiler.cli.command import command
from gqsa_compiler.cli.console import emit_json, note, show_settings


@command
def native(
    kind: Annotated[
        str,
        typer.Argument(
            metavar="KIND",
            help="x86_64 or aarch64 (Linux), or android-arm64 (phones, and any aarch64 Linux).",
        ),
    ],
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Build gqsa-run, the program in C++ that --bundle puts beside a model."""
    from gqsa_compiler.native import build, native_folder

    show_settings("native", {"kind": kind, "output": native_folder(kind)})
    folder = build(kind)
    if json:
        emit_json({"kind": kind, "folder": str(folder)})
        return
    target = {"x86_64": "x86-64-v3"}.get(kind, kind)
    note(f"Next: gqsa compile CHECKPOINT --target {target} --bundle -o dist")
