"""`gqsa inspect`: what a checkpoint or an artefact holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from gqsa_compiler.cli import options
from gqsa_compiler.cli.command import command
from gqsa_compiler.cli.console import emit_json, emit_table
from gqsa_compiler.units import bytes_text


@command
def inspect(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH", help="A GQSA checkpoint or a compiled artefact.", show_default=False
        ),
    ],
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Show the layers of a checkpoint, or the manifest of an artefact."""
    from gqsa_compiler.inspect import inspect_path, variant_here
    from gqsa_compiler.runtime.manifest import is_artefact

    found = inspect_path(path)
    if json:
        emit_json(found)
    elif is_artefact(path):
        _show_artefact(found, variant_here(path))
    else:
        _show_checkpoint(found)


def _show_checkpoint(found: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table("layer", box=None)
    for heading in ("N", "K", "bits", "group", "sparsity", "bytes"):
        table.add_column(heading, justify="right")
    for layer in found["layers"]:
        table.add_row(
            layer["name"],
            str(layer["n"]),
            str(layer["k"]),
            str(layer["bits"]),
            str(layer["group_size"]),
            f"{layer['sparsity']:.1%}",
            bytes_text(layer["bytes"]),
        )
    emit_table(table)
    print(
        f"\n{len(found['layers'])} compressed layers, {bytes_text(found['compressed_bytes'])}, "
        f"{found['bits_per_weight']:.3f} bits a weight; "
        f"other tensors {bytes_text(found['uncompressed_bytes'])}."
    )


def _show_artefact(found: dict[str, Any], here: str | None) -> None:
    """Print a manifest; `here` is the variant that this machine runs."""
    targets = [variant["target"] for variant in found["variants"]]
    model = found.get("model")
    kind = "module" if model is None else model["architecture"]
    what = f"{(model or found)['name']} ({kind})"
    names = ", ".join(target["name"] for target in targets)
    print(f"{what} for {names}: {targets[0]['triple']}")
    print(f"made by         {found['producer']}, TVM {found['versions']['tvm']}")
    for target in targets:
        own = "GPU code" if target["kind"] == "cuda" else "CPU features"
        title = own if len(targets) == 1 else target["name"]
        print(f"{title:<16}{' '.join(target['flags']) or 'none beyond the base'}")
    if len(targets) > 1:
        print(f"runs here       {here or 'none of them'}")
    if model is None:
        _show_module(found)
    else:
        _show_model(found)
    _show_kernels(found["kernels"])


def _show_module(found: dict[str, Any]) -> None:
    """Print what only a module's manifest has."""
    for title, tensors in (("takes", found["inputs"]), ("gives", found["outputs"])):
        for tensor in tensors:
            print(f"{title:<16}{tensor['name']} {tensor['dtype']} [{', '.join(tensor['shape'])}]")
            title = ""
    for size in found["sizes"]:
        print(f"size            {size['name']} {size['smallest']} to {size['largest']}")
    memory = found["memory"]
    print(
        f"memory          weights {bytes_text(memory['weights_bytes'])}, "
        f"workspace {bytes_text(memory['workspace_bytes'])}\n"
    )


def _show_model(found: dict[str, Any]) -> None:
    """Print what only a language model's manifest has."""
    model = found["model"]
    print(
        f"limits          context {model['context_length']} tokens, "
        f"{model['max_batch']} sequences, prefill in chunks of {model['prefill_chunk']}"
    )
    memory = found["memory"]
    cache = memory["kv_cache_bytes_per_token"]
    print(
        f"memory          weights {bytes_text(memory['weights_bytes'])}, "
        f"KV cache ({found['kv_cache']['dtype']}) {bytes_text(cache)} a token "
        f"({bytes_text(cache * model['context_length'])} for one full context), "
        f"workspace {bytes_text(memory['workspace_bytes'])}"
    )
    print(f"read a token    {bytes_text(found['bytes_per_token'])}")
    if adapters := found.get("adapters"):
        named = ", ".join(f"{adapter['name']} (rank {adapter['rank']})" for adapter in adapters)
        print(f"adapters        {named}")
    print()


def _show_kernels(kernels: list[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table("layer", "kernel", "weight", box=None)
    for heading in ("N", "K", "sparsity", "bytes"):
        table.add_column(heading, justify="right")
    for kernel in kernels:
        table.add_row(
            kernel["layer"],
            kernel["kernel"] + (" (fallback)" if kernel["fallback"] else ""),
            kernel["weight"],
            str(kernel["n"]),
            str(kernel["k"]),
            f"{kernel['sparsity']:.1%}",
            bytes_text(kernel["bytes"]),
        )
    emit_table(table)
