"""A model compiled for a GPU, run on the CPU: every launch goes through the emulation."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp
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


@contextmanager
def emulated_gpu() -> Iterator[None]:
    """Compile and run artefacts for GPUs by emulation inside the block.

    Decode kernels have code for one token only: more of them go to the tensor cores' kernel, or
    around the loop.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(configs, "TILES", (1,))
        patch.setattr(artefact, "export_library", _export)
        patch.setattr(library, "check_target", lambda *_: None)
        patch.setattr(library, "CUDA_LIBRARY", library.RUNTIME_LIBRARIES[0])
        patch.setattr(library, "_load_cuda_runtime", lambda: None)
        patch.setitem(devices._NAMES, CUDA, "cpu")
        patch.setattr(Device, "vm_arguments", property(lambda _: (CPU, 0, 2)))
        patch.setattr(Device, "free_bytes", lambda _: 1 << 30)
        yield


def _export(mod: Any, target: TargetSpec, path: Path) -> str:
    """Build a library whose kernels call the emulation."""
    for gvar, function in mod.functions.items():
        if isinstance(function, tirx.PrimFunc) and SCHEDULED in (function.attrs or {}):
            name = f"emulated.{path.parent.name}.{gvar.name_hint}"
            folder = Path(mkdtemp(prefix="emulated-"))
            clean = function.without_attr("global_symbol")
            _register(name, function, emulate(clean, arch_of(target.arch), folder))
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


def _register(name: str, function: Any, program: Program) -> None:
    kinds = [_kind(param) for param in function.params]

    def call(*arguments: Any) -> None:
        numbers = iter(arguments)
        given: list[Any] = []
        for kind in kinds:
            if kind is None:
                given.append(next(numbers))
                continue
            dtype, axes = kind
            address, shape = next(numbers), [int(next(numbers)) for _ in range(axes)]
            given.append(_view(address, shape, dtype))
        for old, new in zip(given, program.run(given), strict=True):
            if isinstance(old, np.ndarray):
                old[...] = new

    tvm_ffi.register_global_func(name, call, override=True)


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


__all__ = ["emulated_gpu"]
