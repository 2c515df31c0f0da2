"""`gqsa compile` of an ONNX file or a module checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gqsa_compiler.cli.compile_report import print_report
from gqsa_compiler.cli.console import emit_json, note, progress, show_settings
from gqsa_compiler.errors import UsageError

_PROGRAMS = (".pt2", ".pt", ".pth")


def refuse_program(model: str) -> None:
    """Refuse a file of PyTorch's, and an ONNX file that is not there, with a sentence of its own.

    Raises
    ------
    UsageError
        The model is one.
    """
    if model.endswith(".onnx") and not Path(model).is_file():
        raise UsageError(f"There is no file {model}.")
    if Path(model).suffix in _PROGRAMS and Path(model).is_file():
        raise UsageError(
            f"{model} is a file of PyTorch's, which gqsa does not open: loading it can run code "
            "that is in it. Export the module to ONNX, or compress it from Python "
            "(docs/modules.md)."
        )


def only_for_models(given: Mapping[str, object]) -> None:
    """Refuse options that only language models have.

    Raises
    ------
    UsageError
        One is given.
    """
    for name, value in given.items():
        if value:
            raise UsageError(
                f"{name} is for language models, and this is a module (docs/modules.md)."
                + (" gqsa compress compresses an ONNX file." if name == "--recipe" else "")
            )


def parse_sizes(texts: Sequence[str]) -> dict[str, int | tuple[int, int]]:
    """Read ``NAME=N`` and ``NAME=LOW:HIGH``.

    Raises
    ------
    UsageError
        A text has another form.
    """
    found: dict[str, int | tuple[int, int]] = {}
    for text in texts:
        match = re.fullmatch(r"(\w+)=(\d{1,9})(?::(\d{1,9}))?", text)
        if match is None:
            raise UsageError(f"--size {text!r} is not of the form NAME=N or NAME=LOW:HIGH.")
        low = int(match[2])
        found[match[1]] = low if match[3] is None else (low, int(match[3]))
    return found


def compile_a_module(
    model: str, output: Path, sizes: Sequence[str], *, overwrite: bool, json: bool, **options: Any
) -> None:
    """Compile and print the report; `options` are fields of `ModuleOptions`."""
    shapes = parse_sizes(sizes)
    show_settings(
        "compile", {"module": model, "output": output, "sizes": ", ".join(sizes) or None, **options}
    )
    from gqsa_compiler.modules import ModuleOptions, compile_module

    with progress() as report_progress:
        report = compile_module(
            model,
            output,
            ModuleOptions(shapes=shapes, **options),
            overwrite=overwrite,
            progress=report_progress,
        )
    if json:
        emit_json(report.to_dict())
        return
    print_report(report.to_dict())
    note(f"Wrote {output}. Next, in Python: gqsa_compiler.runtime.load_module({str(output)!r})")
