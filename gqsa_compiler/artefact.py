"""Write an artefact: library, packed parameters, manifest, tokenizer."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from importlib import util
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gqsa_compiler._child import run_in_child
from gqsa_compiler._tvm import relax, tvm
from gqsa_compiler.checkpoint import BSRLayer
from gqsa_compiler.errors import CompileError
from gqsa_compiler.head import round_weight
from gqsa_compiler.passes import cpu_code
from gqsa_compiler.passes.plan import (
    BiasTensor,
    Kernel,
    PackedTensor,
    PackPlan,
    RawTensor,
    np_dtype,
)
from gqsa_compiler.passes.records import ParamRecord
from gqsa_compiler.runtime.library import BUNDLE, RUNTIME_LIBRARIES
from gqsa_compiler.targets import TargetSpec, host_arch

PARAMETERS = "params.safetensors"
_LITTLE_ROOM = 1 << 20  # bytes: with less, a failure is put down to the full disk

Array = npt.NDArray[Any]


class WeightLoader(Protocol):
    """Where a plan's tensors come from."""

    def load(self, name: str) -> Array:
        """Return a dense parameter."""

    def layer(self, name: str) -> BSRLayer:
        """Return a compressed layer by its parameter's name."""


def packed_tensors(
    plan: PackPlan, weights: WeightLoader, progress: Callable[[str, int, int], None]
) -> Iterator[tuple[str, Array]]:
    """Yield every tensor of `plan` in order, holding one kernel's packed weights at a time."""
    kernel: Kernel | None = None
    packed: Mapping[str, Array] = {}
    for done, tensor in enumerate(plan.tensors):
        progress("packing weights", done, len(plan.tensors))
        array: Array
        if isinstance(tensor, PackedTensor):
            if tensor.kernel is not kernel:
                kernel, packed = tensor.kernel, _pack(tensor.kernel, weights)
            array = packed[tensor.part]
        elif isinstance(tensor, BiasTensor):
            array = np.concatenate([_dense(weights, r.name, "float32") for r in tensor.records])
        else:
            array = _dense(weights, tensor.name, tensor.dtype)
        fits = len(array.shape) == len(tensor.shape) and all(
            wanted in (None, size) for wanted, size in zip(tensor.shape, array.shape, strict=True)
        )
        if not fits or array.dtype != np_dtype(tensor.dtype):
            raise CompileError(
                f"Parameter {tensor.name} was packed as {array.dtype}{list(array.shape)}, but its "
                f"kernel reads {tensor.dtype}{list(tensor.shape)}; this is a bug in the rule."
            )
        yield tensor.name, array
    progress("packing weights", len(plan.tensors), len(plan.tensors))


def _pack(kernel: Kernel, weights: WeightLoader) -> Mapping[str, Array]:
    parts: list[Any]
    if kernel.spec.weight == "dense":
        parts = [_dense(weights, r.name, kernel.spec.weight_dtype) for r in kernel.records]
    else:
        parts = [_layer(record, weights) for record in kernel.records]
    return kernel.rule.pack(kernel.spec, kernel.config, parts)


def _layer(record: ParamRecord, weights: WeightLoader) -> BSRLayer:
    if not record.linear_bits:
        return weights.layer(record.name)
    dense = _dense(weights, record.name, record.dtype)
    return round_weight(record.layer, dense, record.linear_group)


def _dense(weights: WeightLoader, name: str, dtype: str) -> Array:
    array = weights.load(name).astype(np_dtype(dtype), copy=False)
    if not np.all(np.isfinite(array.astype(np.float32, copy=False))):
        raise CompileError(f"Parameter {name} holds values that are not finite numbers in {dtype}.")
    return array


def library_name(target: TargetSpec, variants: int) -> str:
    """Name the library of one of so many variants of an artefact."""
    return "model.so" if variants == 1 else f"model.{target.name}.so"


def export_library(mod: tvm.IRModule, target: TargetSpec, path: Path) -> str:
    """Generate code, link a library and return its SHA-256.

    Parameters
    ----------
    mod : IRModule
        After every phase of the pipeline.
    target : TargetSpec
    path : Path
        Of the library.

    Raises
    ------
    CompileError
        No linker for the target, or code generation failed.
    OSError
        The disk is full.
    """
    compiler = tvm.support.cc.cross_compiler(_linker(target))
    directory = path.parent

    def generate() -> None:
        # Object files go beside the library, not to a temporary directory that may be small.
        with tempfile.TemporaryDirectory(dir=directory) as objects:
            executable = relax.build(
                mod,
                tvm.target.Target(target.tvm_dict()),
                relax_pipeline=None,
                tir_pipeline=cpu_code.register(),
            )
            executable.export_library(str(path), fcompile=compiler, workspace_dir=objects)

    try:
        run_in_child(generate, "Code generation")
    except CompileError as error:
        if shutil.disk_usage(directory).free < _LITTLE_ROOM:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _linker(target: TargetSpec) -> str:
    if target.arch == host_arch():
        names, package = ["g++", "c++", "clang++"], "g++"
    else:
        names = [f"{target.arch}-linux-gnu-g++"]
        package = f"g++-{target.arch.replace('_', '-')}-linux-gnu"
    for name in names:
        if shutil.which(name):
            return name
    raise CompileError(
        f"Linking for {target.name} needs {names[0]}, which is not on the PATH; install it "
        f"(Debian: apt-get install {package})."
    )


def check_tools(target: TargetSpec, *, bundle: bool) -> None:
    """Check, before any work, that this machine can link for a target and bundle libraries.

    Raises
    ------
    CompileError
        No linker for the target, or a bundle for another architecture than this machine's.
    """
    if bundle and (target.arch != host_arch() or sys.platform != "linux"):
        raise CompileError(
            f"--bundle copies this machine's runtime libraries, which {target.name} cannot load; "
            "compile without it and put the target's libtvm_runtime*.so and libtvm_ffi.so in "
            f"{BUNDLE}/."
        )
    _linker(target)


def bundle_libraries(directory: Path) -> None:
    """Copy TVM's runtime libraries into the artefact, so that it needs no TVM installed.

    Raises
    ------
    CompileError
        The installed packages lack a library.
    """
    library = directory / BUNDLE
    library.mkdir()
    places = [_package(p) / "lib" for p in ("tvm", "tvm_ffi")]
    for name in (*RUNTIME_LIBRARIES, "libtvm_ffi.so"):
        found = [place / name for place in places if (place / name).is_file()]
        if not found:
            raise CompileError(f"{name} is not in the installed apache-tvm; reinstall it.")
        shutil.copy2(found[0], library / name)


def _package(name: str) -> Path:
    spec = util.find_spec(name)
    if spec is None or spec.origin is None:
        raise CompileError(f"The package {name} is not installed.")
    return Path(spec.origin).parent


__all__ = [
    "PARAMETERS",
    "RawTensor",
    "WeightLoader",
    "bundle_libraries",
    "export_library",
    "library_name",
    "packed_tensors",
]
