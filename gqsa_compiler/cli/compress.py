"""`gqsa compress`: a dense model becomes a GQSA checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from gqsa_compiler.cli import options
from gqsa_compiler.cli.command import command
from gqsa_compiler.cli.console import emit_json, note, progress, seconds_text, show_settings
from gqsa_compiler.cli.paths import require_file
from gqsa_compiler.compress.recipe import (
    DEFAULT_SAMPLES,
    DEFAULT_SEQUENCE_LENGTH,
    parse_recipe,
)
from gqsa_compiler.outdir import check_output


@command
def compress(
    model: options.Model,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Directory to write.", show_default=False)
    ],
    recipe: Annotated[
        str,
        typer.Option(
            help="w<bits>s<sparsity %>g<group>: w4s30g16 keeps 70% of the groups of 16 weights."
        ),
    ] = "w4s30g16",
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="Text file to calibrate on.", show_default="text that the model writes itself"
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Calibration sequences.")] = DEFAULT_SAMPLES,
    sequence_length: Annotated[
        int, typer.Option(min=2, help="Tokens in a calibration sequence.")
    ] = DEFAULT_SEQUENCE_LENGTH,
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="Seed of the calibration text.")
    ] = 0,
    balance: Annotated[
        Literal["matrix", "row"],
        typer.Option(help="matrix: drop what costs least. row: keep as much in every row."),
    ] = "matrix",
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Compress MODEL: prune groups of weights and quantise the rest to 4 bits."""
    parse_recipe(recipe)
    check_output(output, overwrite, protect=(model, *([calibration] if calibration else [])))
    if calibration is not None:
        require_file(calibration, "--calibration")
    show_settings(
        "compress",
        {
            "model": model,
            "output": output,
            "recipe": recipe,
            "calibration": calibration or "sampled from the model",
            "samples": samples,
            "sequence length": sequence_length,
            "balance": balance,
            "seed": seed,
        },
    )
    from gqsa_compiler.frontends.source import resolve

    source = resolve(model)  # a wrong name is found before PyTorch is loaded
    from gqsa_compiler.compress import compress_model

    with progress() as report_progress:
        report = compress_model(
            source,
            output,
            recipe,
            calibration=calibration,
            samples=samples,
            sequence_length=sequence_length,
            seed=seed,
            balance=balance,
            overwrite=overwrite,
            progress=report_progress,
        )
    if json:
        emit_json(report.to_dict())
        return
    print(
        f"{len(report.layers)} layers compressed to {report.bits_per_weight:.3f} bits a weight "
        f"in {seconds_text(report.seconds)}"
    )
    note(f"Wrote {output}. Next: gqsa compile {output}")
