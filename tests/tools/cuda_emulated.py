"""A device for the GPU benchmarks that runs kernels under the CPU emulation."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gqsa_compiler.schedules.cuda.arch import Arch
from gqsa_compiler.schedules.cuda.nvcc import KernelUse
from tests.schedules.cuda.emulation.host import Launch
from tests.schedules.cuda.emulation.run import Executable

Array = npt.NDArray[Any]
_FIRST, _STEP = 1 << 44, 1 << 32  # addresses that no integer argument is
SECONDS_A_LAUNCH = 1e-5


def emulated_compiler(folder: Path) -> Callable[[str, Arch], tuple[bytes, tuple[KernelUse, ...]]]:
    """Return a compiler whose machine code is the path of a program for this CPU."""

    def compile_source(source: str, arch: Arch) -> tuple[bytes, tuple[KernelUse, ...]]:
        place = folder / f"{len(list(folder.iterdir()))}"
        place.mkdir()
        built = Executable.of(source, place)
        code = json.dumps([str(built.path), list(built.kernels)]).encode()
        return code, tuple(KernelUse(name, 32, 0, 0) for name in built.kernels)

    return compile_source


def instant_compiler(source: str, arch: Arch) -> tuple[bytes, tuple[KernelUse, ...]]:
    """Compile nothing: for what is not run."""
    names = re.findall(r"__launch_bounds__\([\d, ]+\) (\w+)\([^;{]*\);", source)
    return f"\x7fELF\0{arch.name}\n{len(source)}".encode(), tuple(
        KernelUse(n, 40, 0, 0) for n in names
    )


class EmulatedDevice:
    """`cuda_driver.Device` over numpy arrays; a launch's time is made up."""

    def __init__(self) -> None:
        self.arrays: dict[int, Array] = {}
        self.modules: list[Executable] = []
        self.functions: list[tuple[int, str]] = []
        self.launched = 0
        self.freed = 0

    def info(self) -> dict[str, Any]:
        return {"l2_bytes": 0}

    def load(self, image: bytes) -> int:
        path, kernels = json.loads(image)
        self.modules.append(Executable(Path(path), tuple(kernels)))
        return len(self.modules) - 1

    def function(self, module: int, name: str) -> int:
        assert name in self.modules[module].kernels
        self.functions.append((module, name))
        return len(self.functions) - 1

    def allocate(self, size: int) -> int:
        address = _FIRST + _STEP * (len(self.arrays) + self.freed)
        self.arrays[address] = np.full(size, 0xFF, np.uint8)
        return address

    def free(self, address: int) -> None:
        del self.arrays[address]
        self.freed += 1

    def upload(self, address: int, array: Array) -> None:
        self.arrays[address][:] = np.ascontiguousarray(array).view(np.uint8).reshape(-1)

    def download(self, address: int, array: Array) -> None:
        array.view(np.uint8).reshape(-1)[:] = self.arrays[address]

    def copy(self, to: int, source: int, size: int) -> None:
        self.arrays[to][:size] = self.arrays[source][:size]

    def fill(self, address: int, value: int, size: int) -> None:
        self.arrays[address][:size] = value

    def launch(
        self,
        function: int,
        grid: tuple[int, int, int],
        threads: tuple[int, int, int],
        shared_bytes: int,
        arguments: Sequence[int],
    ) -> None:
        module, name = self.functions[function]
        given = tuple(self.arrays.get(argument, argument) for argument in arguments)
        launch = Launch(name, given, grid, threads, shared_bytes)
        self.launched += 1
        self.modules[module].launch(launch, self.launched)

    def synchronize(self) -> None:
        pass

    def time(self, work: Callable[[], None], repeats: int) -> list[float]:
        before = self.launched
        work()
        return [SECONDS_A_LAUNCH * (self.launched - before)] * repeats
