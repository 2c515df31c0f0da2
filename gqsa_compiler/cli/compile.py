"""`gqsa compile`, also `gqsa-compile`: a checkpoint becomes an artefact."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from gqsa_compiler.cli import options
from gqsa_compiler.cli.command import command
from gqsa_compiler.cli.compile_module import compile_a_module, only_for_models, refuse_program
from gqsa_compiler.cli.compile_report import print_report
from gqsa_compiler.cli.console import emit_json, note, progress, show_settings
from gqsa_compiler.errors import UsageError
from gqsa_compiler.outdir import check_output

_MAX_BATCH, _PREFILL_CHUNK = 4, 512


@command
def compile_(
    model: options.Model,
    target: Annotated[
        str,
        typer.Option(
            help="cpu (this machine), x86-64-v3, x86-64-v4, x86-64-v4-bf16, aarch64, "
            "aarch64-i8mm, aarch64:NAME (a core: aarch64:cortex-a76), android-arm64, cuda (the GPU "
            "here, else any since sm_80), cuda:sm_80, cuda:sm_86, cuda:sm_89, cuda:sm_90, or a "
            "GPU's name (nvidia/nvidia-h100). Several CPUs of one architecture with commas between "
            "them: code for each, and one copy of the weights."
        ),
    ] = "cpu",
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help="Directory to write.", show_default="MODEL-TARGET, here"
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="For a dense MODEL: compress it on the way in one shot (e.g. w4s30g16), or "
            "'dense' to compile it as it is."
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            min=2, help="Longest sequence, in tokens.", show_default="the model's, at most 2048"
        ),
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Most sequences at once.")] = _MAX_BATCH,
    prefill_chunk: Annotated[
        int, typer.Option(min=1, help="Prompt tokens taken in one step.")
    ] = _PREFILL_CHUNK,
    activations: Annotated[
        Literal["auto", "float32", "float16", "int16", "int8"],
        typer.Option(
            help="What sparse layers round their inputs to; auto: float16 on GPUs, int16 where "
            "there are kernels for it (x86-64 with AVX2, aarch64), else float32."
        ),
    ] = "auto",
    head: Annotated[
        Literal["int8", "stored"],
        typer.Option(
            help="A language-model head that the checkpoint holds in 16 bits: rounded to 8, or as "
            "stored. A compressed head stays as it is."
        ),
    ] = "int8",
    kv_cache: Annotated[
        Literal["float16", "float32"],
        typer.Option(
            help="What keys and values of earlier tokens are kept in; float16 takes half the "
            "memory."
        ),
    ] = "float16",
    bundle: Annotated[
        bool,
        typer.Option(
            "--bundle",
            help="Add TVM's runtime libraries and, for a CPU, gqsa-run, if it is built (8 MB): "
            "neither TVM nor, with gqsa-run, Python is needed then.",
        ),
    ] = False,
    no_fallback: Annotated[
        bool,
        typer.Option("--no-fallback", help="Fail where a layer cannot run compressed."),
    ] = False,
    debug_dump: Annotated[
        Path | None, typer.Option(help="Write the module after every phase into this directory.")
    ] = None,
    db: Annotated[
        Path | None,
        typer.Option(
            "--db",
            help="Take kernels' configurations from this tuning database (gqsa tune).",
            show_default="what is shipped for this processor",
        ),
    ] = None,
    chip: Annotated[
        str | None,
        typer.Option(
            help="Processor whose measurements to take (gqsa tune show lists them).",
            show_default="with --target cpu this machine's, else the database's only one",
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=DIR",
            help="A LoRA adapter (PEFT) to choose at run time. May be given several times.",
        ),
    ] = None,
    merge_adapter: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A LoRA adapter that is always on.")
    ] = None,
    adapter_dtype: Annotated[
        Literal["float16", "float32"], typer.Option(help="What adapters are stored in.")
    ] = "float16",
    size: Annotated[
        list[str] | None,
        typer.Option(
            help="Of an ONNX file or module checkpoint: fix a size that varies (NAME=N), or bound "
            "it (NAME=LOW:HIGH). May be given several times."
        ),
    ] = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Compile MODEL for a target; ends with a report of what runs on which kernel.

    MODEL may also be an ONNX file or a module checkpoint (docs/modules.md).
    """
    from gqsa_compiler.lora.names import parse_adapters
    from gqsa_compiler.modules import is_module
    from gqsa_compiler.targets import parse_targets

    refuse_program(model)
    adapters = parse_adapters(adapter or [])
    if is_module(model):
        only_for_models(
            {
                "--recipe": recipe,
                "--context": context,
                "--max-batch": max_batch != _MAX_BATCH,
                "--prefill-chunk": prefill_chunk != _PREFILL_CHUNK,
                "--head": head != "int8",
                "--kv-cache": kv_cache != "float16",
                "--db": db,
                "--chip": chip,
                "--adapter": adapters,
                "--merge-adapter": merge_adapter,
                "--adapter-dtype": adapter_dtype != "float16",
            }
        )
        compile_a_module(
            model,
            output if output is not None else default_output(model, target),
            size or [],
            overwrite=overwrite,
            json=json,
            target=target,
            activations=activations,
            bundle=bundle,
            no_fallback=no_fallback,
            debug_dump=debug_dump,
        )
        return
    if size:
        raise UsageError("--size is for ONNX files and module checkpoints; use --context here.")
    specs = parse_targets(target)
    for spec in specs:
        if spec.kind == "cuda" and spec.features:
            note(
                f"No GPU is here that has code of its own: the code is for {spec.arch}, with PTX "
                "that the driver of a later GPU translates. For one elsewhere, name its "
                "architecture (--target cuda:sm_90)."
            )
    directory = output if output is not None else default_output(model, target)
    check_output(directory, overwrite, protect=(model,))
    show_settings(
        "compile",
        {
            "model": model,
            "target": ", ".join(
                f"{spec.name} ({spec.cpu or spec.arch}{''.join(f' +{f}' for f in spec.features)})"
                for spec in specs
            ),
            "output": directory,
            "recipe": recipe,
            "context": context or "the model's, at most 2048",
            "max batch": max_batch,
            "prefill chunk": prefill_chunk,
            "activations": activations,
            "head": head,
            "KV cache": kv_cache,
            "bundle": bundle,
            "no fallback": no_fallback,
            "debug dump": debug_dump,
            "database": db,
            "chip": chip,
            "adapters": ", ".join(f"{name} ({path})" for name, path in adapters.items()) or None,
            "merged adapter": merge_adapter,
        },
    )
    if recipe not in (None, "dense"):
        note(
            "The model is compressed in one shot here. gqsa compress trains it too, which takes "
            "longer and gives a much better model."
        )
    from gqsa_compiler.compile import compile_model
    from gqsa_compiler.compile_options import CompileOptions

    settings = CompileOptions(
        target=target,
        context_length=context,
        prefill_chunk=prefill_chunk,
        max_batch=max_batch,
        activations=activations,
        head=head,
        kv_cache=kv_cache,
        bundle=bundle,
        no_fallback=no_fallback,
        debug_dump=debug_dump,
        database=db,
        chip=chip,
        adapters=adapters,
        merge_adapter=merge_adapter,
        adapter_dtype=adapter_dtype,
    )
    with progress() as report_progress:
        report = compile_model(
            model,
            directory,
            settings,
            recipe=recipe,
            overwrite=overwrite,
            progress=report_progress,
        )
    if json:
        emit_json(report.to_dict())
        return
    print_report(report.to_dict())
    if bundle and not (Path(directory) / "gqsa-run").exists():
        note("The bundle has no gqsa-run: gqsa native builds it (docs/mobile.md).")
    if specs[0].linked:
        note(f"Wrote {directory}. Next: copy it to the device and run its gqsa-run there.")
        return
    note(f'Wrote {directory}. Next: gqsa run {directory} -p "Once upon a time"')


def default_output(model: str, target: str) -> Path:
    """Name the artefact of a model: its last part and the target's, in the current directory."""
    name = Path(model).resolve().name if Path(model).is_dir() else model.rsplit("/", 1)[-1]
    return Path(f"{name.removesuffix('.gguf')}-{re.sub('[ :/,]+', '-', target.strip())}")
