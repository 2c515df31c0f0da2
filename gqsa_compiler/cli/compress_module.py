"""`gqsa compress` of an ONNX file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gqsa_compiler.cli.compile_module import parse_sizes
from gqsa_compiler.cli.console import emit_json, note, progress, show_settings
from gqsa_compiler.errors import UsageError
from gqsa_compiler.outdir import check_output
from gqsa_compiler.units import seconds_text


def only_for_modules(given: Mapping[str, object]) -> None:
    """Refuse options that only ONNX files have.

    Raises
    ------
    UsageError
        One is given.
    """
    for name, value in given.items():
        if value:
            raise UsageError(f"{name} is for ONNX files; a language model has no such option.")


def compress_a_module(
    model: str,
    output: Path,
    recipe: str,
    inputs: Sequence[Path],
    sizes: Sequence[str],
    ignore: Sequence[str],
    given: Mapping[str, object],
    *,
    overwrite: bool,
    json: bool,
) -> None:
    """Compress and print what became of the layers.

    Parameters
    ----------
    given : mapping
        Options that only language models have, by name; one that is given is an error.
    """
    for name, value in given.items():
        if value:
            raise UsageError(
                f"{name} is for language models; an ONNX file is compressed in one shot, on "
                "--inputs."
            )
    if Path(model).is_dir():
        raise UsageError(f"{model} is compressed already. Next: gqsa compile {model}")
    if not inputs:
        raise UsageError(
            "An ONNX file needs --inputs FILE.npz: inputs by name, as numpy.savez writes them, to "
            "learn from."
        )
    check_output(output, overwrite, protect=(model,))
    shapes = parse_sizes(sizes)
    settings: dict[str, Any] = {
        "model": model,
        "output": output,
        "recipe": recipe,
        "inputs": ", ".join(map(str, inputs)),
        "sizes": ", ".join(sizes) or None,
        "ignore": ", ".join(ignore) or None,
    }
    show_settings("compress", settings)
    from gqsa_compiler.modules import compress_onnx, read_inputs

    with progress() as shown:
        report = compress_onnx(
            model,
            recipe,
            output,
            calibration=read_inputs(inputs),
            shapes=shapes,
            ignore=ignore,
            overwrite=overwrite,
            progress=shown,
        )
    if json:
        emit_json(report.to_dict())
        return
    print(
        f"{len(report.layers)} layers compressed to {report.bits_per_weight:.3f} bits a weight "
        f"in {seconds_text(report.seconds)}"
    )
    for layer in report.dense:
        note(f"{layer.name} stays dense: {layer.reason}.")
    note(f"Wrote {output}. Next: gqsa compile {output}")
