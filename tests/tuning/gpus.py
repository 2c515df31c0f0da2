"""A GPU that is none: its driver, and nvcc's place taken by the emulation."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from gqsa_compiler.schedules.cuda.nvcc import KernelUse, find_nvcc
from gqsa_compiler.schedules.spec import LinearSpec
from gqsa_compiler.schedules.table import select
from gqsa_compiler.targets import parse_target
from gqsa_compiler.tuning.tasks import Task
from tests.schedules.cuda.emulation.run import _KERNEL, Executable

GPU = parse_target("cuda:sm_90")
Fatbin = tuple[bytes, tuple[KernelUse, ...]]


def gpu_task(n: int = 32, k: int = 256) -> Task:
    """Describe a layer with 1 to 16 groups a row, called with 1 and 5 tokens."""
    spec = LinearSpec(
        n, k, "bsr", "int4", 16, 8 * n, activation_dtype="float16", norm_eps=1e-5
    )  # fmt: skip
    rule, _ = select(spec, GPU)
    return Task(f"layer {n}x{k}", rule, spec, (1, 4, 8, 12, 16), 2, {1: 8.0, 5: 1.0})


def build_fake_gpu(folder: Path) -> Path:
    """Compile `fake_gpu.cpp` as the driver and CUDA's runtime library; returns their folder.

    Raises
    ------
    CompileError
        There is no nvcc, which knows where cuda.h is.
    """
    nvcc, source = str(find_nvcc()), str(Path(__file__).with_name("fake_gpu.cpp"))
    words = [nvcc, "-std=c++17", "-shared", "-cudart", "none", "-Xcompiler", "-fPIC,-w"]
    driver, empty = folder / "libcuda.so.1", folder / "empty.cpp"
    names = ["-Xlinker", "-soname=libcuda.so.1"]
    subprocess.run([*words, source, *names, "-o", str(driver)], check=True)
    # What is looked up in the second library is found in the first, which it needs.
    empty.write_text("")
    words = ["g++", "-shared", "-fPIC", str(empty), "-Wl,--no-as-needed", str(driver)]
    names = ["-Wl,-soname=libcudart.so.13", "-Wl,-rpath,$ORIGIN"]
    subprocess.run([*words, *names, "-o", str(folder / "libcudart.so.13")], check=True)
    return folder


def emulated_fatbin(folder: Path) -> Callable[[str, Sequence[str]], Fatbin]:
    """Return what `compile_fatbin` is replaced by: "machine code" as `fake_gpu.cpp` takes it."""

    def compile_source(source: str, code: Sequence[str]) -> Fatbin:
        place = folder / str(len(list(folder.iterdir())))
        place.mkdir(parents=True)
        lines = [str(Executable.of(source, place).path)]
        for name, parameters in _KERNEL.findall(source):
            lines.append(f"{name} {''.join(_kind(one) for one in parameters.split(','))}")
        return "\n".join(lines).encode() + b"\n\0", ()

    return compile_source


def _kind(parameter: str) -> str:
    if "*" in parameter:
        return "p"
    if "float" in parameter:
        return "f"
    return "l" if "64" in parameter or "long" in parameter else "i"
