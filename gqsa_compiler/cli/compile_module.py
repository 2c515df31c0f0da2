"""`gqsa compile` of an ONNX file or a module checkpoint."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gqsa_compiler.cli.compile_report import print_report
from gqsa_compiler.cli.console import emit_json, note, progress, show_settings
from gqsa_compiler.errors import UsageError


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
