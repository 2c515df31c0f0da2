"""`gqsa convert`: another quantiser's checkpoint becomes a GQSA checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gqsa_compiler.cli import options
from gqsa_compiler.cli.command import command
from gqsa_compiler.cli.console import emit_json, note, progress, show_settings
from gqsa_compiler.outdir import check_output
from gqsa_compiler.units import bytes_text


@command
def convert(
    model: options.QuantisedModel,
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", metavar="DIR", help="Directory to write.", show_default=False
        ),
    ],
    keep_dense: Annotated[
        bool,
        typer.Option(
            "--keep-dense",
            help="Store layers that do not fit uncompressed; without it they are an error.",
        ),
    ] = False,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Take over a quantised MODEL (GPTQ, AWQ, compressed-tensors, GGUF) as it is, to the bit."""
    check_output(output, overwrite, protect=(model,))
    show_settings("convert", {"model": model, "output": output, "keep dense": keep_dense})
    from gqsa_compiler.convert import convert_model

    with progress() as shown:
        report = convert_model(
            model, output, keep_dense=keep_dense, overwrite=overwrite, progress=shown
        )
    if json:
        emit_json(report.to_dict())
        return
    kinds = " and ".join(f"{count} {kind}" for kind, count in report.formats.items())
    print(
        f"{kinds} layers taken over at {report.bits_per_weight:.3f} bits a weight, "
        f"{report.absent_groups:.1%} of their groups all zero; "
        f"other tensors {bytes_text(report.uncompressed_bytes)}"
    )
    for name, reason in report.dense.items():
        note(f"{name} is stored uncompressed. {reason}")
    note(f"Wrote {output}. Next: gqsa compile {output}")
