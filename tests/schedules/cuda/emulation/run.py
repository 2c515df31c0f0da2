"""Compiles generated CUDA C with g++ against the emulation's header and runs it."""

from __future__ import annotations

import atexit
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gqsa_compiler.schedules.cuda.arch import Arch
from gqsa_compiler.schedules.cuda.lowering import device_source, lower
from tests.schedules.cuda.emulation.host import Host, Launch

Array = npt.NDArray[Any]
HEADERS = Path(__file__).parent
FAILURES = {3: "deadlock", 4: "divergence", 5: "not emulated", 6: "bad input"}
_KERNEL = re.compile(r'extern "C" __global__ void __launch_bounds__\([\d, ]+\) (\w+)\(([^)]*)\);')
_SHARED = re.compile(r"extern __shared__ __align__\(\d+\) (\w+) (\w+)\[\];")
# One PTX instruction: what it is called, its operands' templates, outputs and inputs.
_ASM = re.compile(
    r'asm(?:\s+volatile)?\s*\("([\w.:]+) ([^";]*);"\s*:([^:;]*):([^:;]*)(?::\s*"memory")?\s*\);'
)


class EmulationError(Exception):
    """The emulated kernel failed; the message begins with how."""


@dataclass(frozen=True)
class Executable:
    """Device functions compiled for this CPU.

    Parameters
    ----------
    path : Path
    kernels : tuple of str
        The device functions, in the executable's order.
    """

    path: Path
    kernels: tuple[str, ...]

    @classmethod
    def of(cls, source: str, folder: Path) -> Executable:
        """Compile CUDA C as TVM generates it; `folder` takes the source and the executable."""
        kernels = _KERNEL.findall(source)
        assert kernels, source
        text = _SHARED.sub(r"\1* \2 = (\1*)emulation::shared_memory;", source)
        text = _ASM.sub(_call_instruction, text)
        cpp, path = folder / "kernel.cpp", folder / "kernel"
        cpp.write_text(f'#include "emulation.h"\n{text}\n{_dispatch(kernels)}', encoding="utf-8")
        command = ["g++", "-std=c++17", "-O1", "-w", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE"]
        # What a kernel reads before it was written is no number that could pass.
        command += ["-ftrivial-auto-var-init=pattern", f"-I{HEADERS}", str(cpp), "-o", str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[:4000]
        return cls(path, tuple(name for name, _ in kernels))

    def launch(self, launch: Launch, order: int = 0) -> None:
        """Run a launch; its arrays are changed as the kernel changes them.

        Parameters
        ----------
        order : int
            0: the first thread and block go first, 1: the last ones; else a seed by which they
            are shuffled.

        Raises
        ------
        EmulationError
            A deadlock, barriers that not all threads reach, memory read or written outside an
            argument or outside shared memory.
        """
        arrays: list[Array] = []
        words: list[int] = []
        for argument in launch.arguments:
            if isinstance(argument, np.ndarray):
                words += [1, len(arrays)]
                arrays.append(argument)
            elif isinstance(argument, float):
                words += [0, int(np.float32(argument).view(np.uint32))]
            else:
                words += [0, int(argument)]
        head = [self.kernels.index(launch.name), order, *launch.grid, *launch.threads]
        head += [launch.shared_bytes, len(arrays), len(launch.arguments)]
        sizes = [a.nbytes for a in arrays]
        data = np.array([*head, *words, *sizes], np.int64).tobytes()
        done = subprocess.run(
            [str(self.path)],
            input=data + b"".join(a.tobytes() for a in arrays),
            capture_output=True,
            timeout=120,
        )
        if done.returncode:
            how = FAILURES.get(done.returncode, "crash: memory outside a buffer")
            raise EmulationError(f"{how}: {done.stderr.decode(errors='replace').strip()}")
        at = 0
        for array in arrays:
            raw = np.frombuffer(done.stdout, np.uint8, array.nbytes, at)
            array.view(np.uint8).reshape(-1)[...] = raw
            at += array.nbytes


@dataclass(frozen=True)
class Program:
    """A kernel compiled for this CPU: what launches the device functions, and these."""

    host: Any
    device: Executable

    def run(self, arrays: Sequence[Array | int | float], order: int = 0) -> list[Array]:
        """Run the kernel on copies of `arrays`, or numbers; return them as it left them.

        `order` and errors are those of `Executable.launch`.
        """
        copies = [np.array(a, order="C") if isinstance(a, np.ndarray) else a for a in arrays]
        for launch in Host(self.host, copies).launches:
            self.device.launch(launch, order)
        return copies


def emulate(function: Any, arch: Arch, folder: Path | None = None) -> Program:
    """Generate the CUDA C of a PrimFunc for `arch` and compile it for this CPU.

    Without a folder, what it compiles lasts as long as this process.
    """
    if folder is None:
        folder = Path(tempfile.mkdtemp(prefix="emulated-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    lowered = lower(function, arch)
    return Program(lowered["main"], Executable.of(device_source(lowered), folder))


def _call_instruction(found: re.Match[str]) -> str:
    """Turn a PTX instruction into a call of the function that `ptx.h` has for it."""
    name, template, outputs, inputs = found.groups()
    operands = re.findall(r'"[^"]*"\s*\(((?:[^()]|\([^()]*\))*)\)', outputs + "," + inputs)
    template = re.sub(r"[{}\[\]]", "", template)
    arguments = re.sub(r"%(\d+)", lambda number: operands[int(number[1])], template)
    return f"ptx_{re.sub('[.:]+', '_', name)}({arguments});"


def _dispatch(kernels: list[tuple[str, str]]) -> str:
    """Write the table of kernels that `main.h` calls them by."""
    lines = []
    for name, parameters in kernels:
        arguments = []
        for i, parameter in enumerate(parameters.split(",")):
            kind = parameter.strip().rsplit(" ", 1)[0].replace("__restrict__", "").strip()
            value = f"a[{i}]" if kind.endswith("*") else f"*(int64_t*)a[{i}]"
            value = f"*(float*)a[{i}]" if kind == "float" else value
            arguments.append(f"({kind}){value}")
        lines.append(f"static void call_{name}(void** a) {{ {name}({', '.join(arguments)}); }}")
    table = ", ".join(f"call_{name}" for name, _ in kernels)
    lines.append(f"static void (*const kernel_table[])(void**) = {{{table}}};")
    lines.append('#include "main.h"')
    return "\n".join(lines)
