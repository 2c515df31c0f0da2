"""`gqsa compress`: a dense model becomes a GQSA checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Literal

import typer

from gqsa_compiler.cli import options
from gqsa_compiler.cli.command import command
from gqsa_compiler.cli.compile_module import refuse_program
from gqsa_compiler.cli.compress_module import compress_a_module, only_for_modules
from gqsa_compiler.cli.console import PlainProgress, emit_json, note, progress, show_settings
from gqsa_compiler.errors import GqsaError
from gqsa_compiler.outdir import check_output
from gqsa_compiler.units import seconds_text


@command
def compress(
    model: options.DenseModel,
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", metavar="DIR", help="Directory to write.", show_default=False
        ),
    ],
    recipe: Annotated[
        str,
        typer.Option(
            metavar="RECIPE",
            help="w<bits>s<sparsity %>g<group>: w4s30g16 keeps 70% of the groups of 16 weights in "
            "4 bits. Or baseline/..., or a YAML file; see docs/recipes.md.",
        ),
    ] = "w4s30g16",
    stages: Annotated[
        str | None,
        typer.Option(
            metavar="STAGES",
            help="Training stages: block,weights,scales or some of them; none is one shot, quick "
            "and worse.",
            show_default="the recipe's",
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Size of the compressed layers, e.g. 3.1 (bits a weight) or 60MB: each layer's "
            "sparsity is chosen for it.",
            show_default=False,
        ),
    ] = None,
    balance: Annotated[
        Literal["model", "matrix", "row"] | None,
        typer.Option(
            help="What keeps the sparsity: the whole model (its layers differ), each matrix or "
            "each row.",
            show_default="the recipe's",
        ),
    ] = None,
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="Text file (repeatable), or hf:NAME for a Hugging Face data set; see "
            "docs/calibration.md.",
            show_default="text that the model writes itself",
        ),
    ] = None,
    samples: Annotated[
        str | None,
        typer.Option(
            metavar="N|all",
            help="Calibration sequences, or all that the text files have.",
            show_default="768, 128 for one shot; fewer if a text has fewer",
        ),
    ] = None,
    sequence_length: Annotated[
        int | None,
        typer.Option(
            min=2,
            metavar="N",
            help="Tokens in a calibration sequence.",
            show_default="512, 128 for one shot; at most what the model takes",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, metavar="N", help="Seed of every random choice.")
    ] = 0,
    device: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="auto (a CUDA GPU if there is one), cpu, cuda or cuda:N."
        ),
    ] = "auto",
    restart: Annotated[
        bool,
        typer.Option(
            "--restart",
            help="Begin anew and discard what an unfinished run has left; without it, the same "
            "command goes on with that.",
        ),
    ] = False,
    inputs: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE.npz",
            help="For an ONNX MODEL, which needs it: what to calibrate on, arrays by the names of "
            "the inputs, one call in each file (repeatable); see docs/modules.md.",
            show_default=False,
        ),
    ] = None,
    size: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=LOW:HIGH",
            help="Of an ONNX MODEL: bound a size that varies, or fix it (NAME=N). May be given "
            "several times.",
            show_default=False,
        ),
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LAYER",
            help="Of an ONNX MODEL: leave this layer dense, or all that a pattern with * names "
            "(repeatable).",
            show_default=False,
        ),
    ] = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Compress MODEL: prune groups of weights, quantise the rest, and train what is left."""
    from gqsa_compiler.modules import is_module

    refuse_program(model)
    if is_module(model):
        given = {
            "--stages": stages,
            "--budget": budget,
            "--balance": balance,
            "--calibration": calibration,
            "--samples": samples,
            "--sequence-length": sequence_length,
            "--device": device not in ("auto", "cpu"),
            "--restart": restart,
        }
        compress_a_module(
            model,
            output,
            recipe,
            inputs or [],
            size or [],
            ignore or [],
            given,
            overwrite=overwrite,
            json=json,
        )
        return
    only_for_modules({"--inputs": inputs, "--size": size, "--ignore": ignore})
    from gqsa_compiler.compress.calibration.spec import parse_samples
    from gqsa_compiler.compress.parallel.launch import find_launch
    from gqsa_compiler.compress.report import REPORT_FILE
    from gqsa_compiler.compress.request import choose_calibration, choose_recipe

    number: int | Literal["all"] | None = None
    if samples is not None:
        number = parse_samples(samples) or "all"
    chosen = choose_recipe(recipe, stages=stages, budget=budget, balance=balance)
    check_output(output, overwrite, protect=(model,))
    from gqsa_compiler.frontends.resolve import resolve

    source = resolve(model)  # a wrong name is found before PyTorch is loaded
    spec = choose_calibration(
        source,
        chosen,
        calibration,
        samples=number,
        sequence_length=sequence_length,
        seed=seed,
    )
    launch = find_launch()
    leads = launch is None or not launch.index  # the only one of several processes that talks
    settings = {
        "model": model,
        "output": output,
        "recipe": chosen.name,
        "training": ", ".join(chosen.stages) or "none",
        "balance": chosen.balance,
        "budget": chosen.budget,
        "calibration": spec.describe(),
        "samples": spec.describe_samples(),
        "sequence length": spec.sequence_length,
        "seed": seed,
        "device": device,
        "processes": None if launch is None else launch.count,
    }
    if leads:
        show_settings("compress", settings)
    from gqsa_compiler.compress import compress_model

    with (
        saying_it_goes_on(output if leads else None),
        progress() if leads else nullcontext(PlainProgress()) as shown,
    ):
        report = compress_model(
            source,
            output,
            chosen,
            calibration=spec,
            seed=seed,
            device=device,
            overwrite=overwrite,
            restart=restart,
            progress=shown,
            status=shown.status,
        )
    if not leads:
        return
    if json:
        emit_json(report.to_dict())
        return
    far = "" if report.divergence is None else f", KL {report.divergence:.3f} from the dense model"
    head = "" if report.head is None else f", the head to {report.head.bits_per_weight:.3f}"
    print(
        f"{len(report.layers)} layers compressed to {report.bits_per_weight:.3f} bits a weight"
        f"{head}{far} in {seconds_text(report.seconds)}"
    )
    note(
        f"Calibrated on {report.calibration_samples} sequences, {report.calibration_tokens} "
        f"tokens.\nWrote {output}, with a report of the run in {REPORT_FILE}. "
        f"Next: gqsa compile {output}"
    )


@contextmanager
def saying_it_goes_on(output: Path | None) -> Iterator[None]:
    """Where a run is interrupted, say that the same command goes on, if anything was saved.

    Errors of our own say themselves what to do.
    """
    try:
        yield
    except GqsaError:
        raise
    except BaseException:
        from gqsa_compiler.compress.work.workdir import work_path

        if output is not None and (place := work_path(output)).is_dir():
            note(f"What is done is kept in {place}: the same command goes on from there.")
        raise
