"""`gqsa export`: a compressed model in the format of other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from gqsa_compiler.cli import options
from gqsa_compiler.cli.command import command
from gqsa_compiler.cli.console import emit_json, note, progress, show_settings
from gqsa_compiler.outdir import check_output
from gqsa_compiler.units import bytes_text


@command
def export(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT",
            help="A GQSA checkpoint, or one of another quantiser that gqsa reads.",
            show_default=False,
        ),
    ],
    to: Annotated[
        Literal["dense", "gptq", "compressed-tensors", "gguf", "onnx"],
        typer.Option(help="The format to write.", show_default=False),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", metavar="DIR", help="Directory to write.", show_default=False
        ),
    ],
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"] | None,
        typer.Option(
            help="What decoded layers are stored as (dense, gguf).",
            show_default="dense: float32, which is exact; gguf: float16",
        ),
    ] = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Write CHECKPOINT for others: dense safetensors, GPTQ, compressed-tensors, GGUF or ONNX."""
    check_output(output, protect=(checkpoint,))
    settings = {"checkpoint": checkpoint, "to": to, "output": output, "dtype": dtype}
    show_settings("export", settings)
    from gqsa_compiler.export import export_model

    with progress() as shown:
        report = export_model(checkpoint, output, to, dtype=dtype, progress=shown)
    if json:
        emit_json(report.to_dict())
        return
    kinds = ", ".join(f"{count} as {kind}" for kind, count in report.layers.items())
    exactness = (
        "every weight exact"
        if report.exact
        else f"the weights of {len(report.rounded)} layers rounded"
    )
    print(f"layers: {kinds}; {exactness}; {bytes_text(report.bytes)}")
    for text in report.notes:
        note(text)
    note(f"Wrote {output}.")
