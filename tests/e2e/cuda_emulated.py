"""A model compiled for a GPU, run on the CPU: every launch goes through the emulation."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gqsa_compiler import artefact
from gqsa_compiler._tvm import B, IRBuilder, T, Target, relax, tirx, tvm_ffi
from gqsa_compiler.passes import cpu_code
from gqsa_compiler.runtime import devices, library
from gqsa_compiler.runtime.devices import Device
from gqsa_compiler.runtime.gpus import CPU, CUDA
from gqsa_compiler.schedules.cuda import config as configs
from gqsa_compiler.schedules.cuda.arch import arch_of
from gqsa_compiler.schedules.generic.emit import SCHEDULED
from gqsa_compiler.targets import TargetSpec, parse_target
from tests.schedules.cuda.emulation.run import Program, emulate

PAGES = "page_values"
"""The table that a graph reads further than when it was captured, as the cache gets pages: it lies
in a buffer whose parts begin at multiples of 16 bytes, and a graph is for as many as these."""


@dataclass
class Graphs:
    """CUDA graphs as TVM's `cuda_graph_builtin.cc` makes them: lists of launches, played again.

    Parameters
    ----------
    captured, played : int
        How many were made, and how many times one was played.
    """

    captured: int = 0
    played: int = 0
    _launches: list[tuple[Callable[..., None], tuple[Any, ...]]] | None = None
    _made: dict[tuple[Any, ...], tuple[Any, list[Any]]] = field(default_factory=dict)
    _memory: dict[int, Any] = field(default_factory=dict)

    def launch(self, call: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        """Run a launch, or put it into the graph that is being captured."""
        if self._launches is None:
            call(*arguments)
        else:
            self._launches.append((call, arguments))

    def run_or_capture(self, vm: Any, function: Any, given: Any, index: int, shape: Any) -> Any:
        """Do as ``vm.builtin.cuda_graph.run_or_capture`` does."""
        graph = (_number(vm), index, *shape)
        if graph in self._made:
            self.played += 1
            result, launches = self._made[graph]
            for call, arguments in launches:
                call(*arguments)
            return result
        invoke = tvm_ffi.get_global_func("vm.builtin.invoke_closure")
        invoke(vm, function, *given)  # once without a graph: what it writes is the result
        self._launches = []
        result = invoke(vm, function, *given)
        self._made[graph] = (result, self._launches)
        self._launches = None
        self.captured += 1
        return result

    def cached_alloc(self, vm: Any, function: Any, index: int) -> Any:
        """Do as ``vm.builtin.cuda_graph.get_cached_alloc`` does."""
        assert index == 0
        if _number(vm) not in self._memory:
            invoke = tvm_ffi.get_global_func("vm.builtin.invoke_closure")
            self._memory[_number(vm)] = invoke(vm, function)
        return self._memory[_number(vm)]

    def register(self) -> None:
        """Take the place of TVM's builtins, which only its runtime for CUDA has."""
        name = "vm.builtin.cuda_graph"
        register = tvm_ffi.register_global_func
        register(f"{name}.run_or_capture", self.run_or_capture, override=True)
        register(f"{name}.get_cached_alloc", self.cached_alloc, override=True)


def _number(pointer: Any) -> int:
    """Return an opaque pointer as a number."""
    return int(getattr(pointer, "value", pointer))


@contextmanager
def emulated_gpu() -> Iterator[Graphs]:
    """Compile and run artefacts for GPUs by emulation inside the block.

    Decode kernels have code for one token only: more of them go to the tensor cores' kernel, or
    around the loop.
    """
    graphs = Graphs()
    graphs.register()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(configs, "TILES", (1,))
        patch.setattr(artefact, "export_library", partial(_export, graphs))
        patch.setattr(library, "check_target", lambda *_: None)
        patch.setattr(library, "CUDA_LIBRARY", library.RUNTIME_LIBRARIES[0])
        patch.setattr(library, "_load_cuda_runtime", lambda: None)
        patch.setitem(devices._NAMES, CUDA, "cpu")
        patch.setattr(Device, "vm_arguments", property(lambda _: (CPU, 0, 2)))
        patch.setattr(Device, "free_bytes", lambda _: 1 << 30)
        yield graphs


def _export(graphs: Graphs, mod: Any, target: TargetSpec, path: Path) -> str:
    """Build a library whose kernels call the emulation."""
    for gvar, function in mod.functions.items():
        if isinstance(function, tirx.PrimFunc) and SCHEDULED in (function.attrs or {}):
            name = f"emulated.{path.parent.name}.{gvar.name_hint}"
            clean = function.without_attr("global_symbol")
            _register(graphs, name, function, emulate(clean, arch_of(target.arch)))
            mod.update_func(gvar, _caller(function, name, str(gvar.name_hint)))
    host = parse_target("cpu")
    executable = relax.build(
        mod,
        Target(host.tvm_dict()),
        relax_pipeline=None,
        tir_pipeline=cpu_code.register(),
    )
    executable.export_library(str(path))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _register(graphs: Graphs, name: str, function: Any, program: Program) -> None:
    kinds = [(str(param.name), _kind(param)) for param in function.params]

    def call(*arguments: Any) -> None:
        numbers = iter(arguments)
        given: list[Any] = []
        for param, kind in kinds:
            if kind is None:
                given.append(next(numbers))
                continue
            dtype, axes = kind
            address, shape = next(numbers), [int(next(numbers)) for _ in range(axes)]
            if param == PAGES:
                shape = [-(-shape[0] // 4) * 4]
            given.append(_view(address, shape, dtype))
        for old, new in zip(given, program.run(given), strict=True):
            if isinstance(old, np.ndarray):
                old[...] = new

    def launch(*arguments: Any) -> None:
        graphs.launch(call, arguments)

    tvm_ffi.register_global_func(name, launch, override=True)


def _kind(param: Any) -> tuple[str, int] | None:
    """Return dtype and axes of an argument that is a tensor."""
    if not hasattr(param.ty, "shape"):
        return None
    return str(param.ty.dtype.dtype), len(param.ty.shape)


def _view(address: Any, shape: list[int], dtype: str) -> np.ndarray:
    """View memory of TVM's as an array."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    place = getattr(address, "value", address)
    memory = (ctypes.c_uint8 * size).from_address(place) if size else bytearray()
    return np.frombuffer(memory, dtype).reshape(shape)


def _caller(function: Any, name: str, symbol: str) -> Any:
    """Make a function of the same arguments that hands on addresses, sizes and numbers."""
    with IRBuilder() as builder, B.prim_func(is_private=True, s_tir=True):
        B.func_attr({SCHEDULED: True})
        arguments: list[Any] = []
        for param in function.params:
            declared = B.arg(param.name, param)
            if _kind(param) is None:
                arguments.append(declared)
            else:
                shape = list(param.ty.shape)
                arguments += [B.address_of(declared[tuple(0 for _ in shape)]), *shape]
        B.evaluate(T.call_packed(name, *arguments))
    return builder.get().with_attr("global_symbol", symbol)


__all__ = ["Graphs", "emulated_gpu"]
