"""Compiles kernels for aarch64 and runs them in an emulator, without TVM's runtime.

`tests/schedules/arm` compares them with numpy this way, and `tools/arm_counts.py` counts what
they execute. Needs Debian's ``gcc-aarch64-linux-gnu`` and ``qemu-user``.
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gqsa_compiler._tvm import Target, tvm, tvm_ffi
from gqsa_compiler.passes import cpu_code
from gqsa_compiler.targets import TargetSpec

Array = npt.NDArray[Any]
COMPILER = "aarch64-linux-gnu-gcc"
EMULATOR = "qemu-aarch64"
_HARNESS = Path(__file__).with_name("arm_harness.c")
_CODES = {"i": 0, "u": 1, "f": 2}


def missing_tool() -> str | None:
    """Name the program that is missing here, if one is."""
    return next((tool for tool in (COMPILER, EMULATOR) if shutil.which(tool) is None), None)


def compile_for(target: TargetSpec, function: Any) -> Any:
    """Compile one scheduled PrimFunc to an executable of `target`."""
    module = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
    return tvm.compile(module, Target(target.tvm_dict()), tir_pipeline=cpu_code.register())


def inner_loop(assembly: str, multiplies: str = r"\t(sdot|smlal2?)\t") -> list[str]:
    """Return the instructions of the first loop that multiplies, that of one token."""
    return next(_loops(assembly, multiplies))


def loop_of(assembly: str, multiplies: str, count: int) -> list[str]:
    """Return the first loop that has so many `sdot`, and an instruction that `multiplies` finds."""
    found = _loops(assembly, multiplies)
    return next(loop for loop in found if sum("\tsdot\t" in line for line in loop) == count)


def _loops(assembly: str, multiplies: str) -> Iterator[list[str]]:
    lines = assembly.split("\n")
    for first, line in enumerate(lines):
        if re.search(multiplies, line):
            start = max(i for i in range(first) if lines[i].startswith(".LBB"))
            end = next(i for i in range(first, len(lines)) if re.match(r"\tb\.?\w*\t", lines[i]))
            yield [line for line in lines[start + 1 : end + 1] if re.match(r"\t[a-z]", line)]


def link(executable: Any, folder: Path) -> Path:
    """Make a program of what `compile_for` returned, in `folder`."""
    library, program = folder / "kernel.o", folder / "kernel"
    executable.mod.write_to_file(str(library), "o")
    paths = (tvm_ffi.libinfo.find_include_path(), tvm_ffi.libinfo.find_dlpack_include_path())
    includes = [f"-I{path}" for path in paths]
    files = [str(_HARNESS), str(library), "-o", str(program)]
    subprocess.run([COMPILER, "-O1", "-static", *includes, *files], check=True)
    return program


def write_arguments(path: Path, arrays: Sequence[Array]) -> None:
    """Write a program's arguments, its output last, as `arm_harness.c` reads them."""
    with path.open("wb") as file:
        file.write(struct.pack("<i", len(arrays)))
        for array in arrays:
            kind = (_CODES[array.dtype.kind], 8 * array.itemsize, array.ndim)
            file.write(struct.pack(f"<3i{array.ndim}q", *kind, *array.shape))
            file.write(np.ascontiguousarray(array).tobytes())


def emulate(words: Sequence[str], *, plugin: Path | None = None) -> str:
    """Run a program for aarch64 with its arguments; return its standard error.

    Raises
    ------
    RuntimeError
        It failed; with what it said.
    """
    plugins = [] if plugin is None else ["-plugin", str(plugin)]
    command = [EMULATOR, "-cpu", "max", *plugins, *words]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError(f"{words[0]} ended with {done.returncode}: {done.stderr}")
    return done.stderr


def call(program: Path, arrays: Sequence[Array], out: Array) -> Array:
    """Run a program of `link` once on arrays, and return what it makes of `out`."""
    source, result = program.with_suffix(".in"), program.with_suffix(".out")
    write_arguments(source, [*arrays, out])
    emulate([str(program), str(source), str(result), "1"])
    return np.fromfile(result, out.dtype).reshape(out.shape)
