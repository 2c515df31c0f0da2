"""Write an artefact: library, packed parameters, manifest, tokenizer."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gqsa_compiler._child import run_in_child
from gqsa_compiler._tvm import relax, tvm
from gqsa_compiler.bundle import link_program
from gqsa_compiler.checkpoint import BSRLayer
from gqsa_compiler.errors import CompileError
from gqsa_compiler.head import round_weight
from gqsa_compiler.native import PROGRAM
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
from gqsa_compiler.runtime import schema
from gqsa_compiler.schedules.cuda import library as cuda
from gqsa_compiler.targets import TargetSpec
from gqsa_compiler.toolchain import library_linker

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


def manifest_target(target: TargetSpec) -> schema.Target:
    """Return what a manifest says of a target."""
    return schema.Target(
        target.name,
        target.kind,
        target.arch,
        target.required_flags,
        target.device_type,
        target.triple,
    )


def library_name(target: TargetSpec, variants: int) -> str:
    """Name the library of one of so many variants of an artefact."""
    if target.linked:
        return PROGRAM
    name = target.name.replace("/", "-")  # a GPU's name has one
    return "model.so" if variants == 1 else f"model.{name}.so"


def export_library(mod: tvm.IRModule, target: TargetSpec, path: Path) -> str:
    """Generate code, link a library, or a linked target's program, and return its SHA-256.

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
    directory = path.parent

    def link(output: str, objects: list[str], **_options: Any) -> None:
        if target.linked:
            link_program(target, objects, Path(output))
        else:
            library_linker(target)(Path(output), objects)

    def generate() -> None:
        # Object files go beside the library, not to a temporary directory that may be small.
        with tempfile.TemporaryDirectory(dir=directory) as objects:
            if target.kind == "cuda":
                described = tvm.target.Target(target.tvm_dict())
                code = target.required_flags
                cuda.export_library(mod, described, code, path, link, Path(objects))
                return
            executable = relax.build(
                mod,
                tvm.target.Target(target.tvm_dict()),
                relax_pipeline=None,
                tir_pipeline=cpu_code.register(),
                system_lib=target.linked,
            )
            executable.export_library(str(path), fcompile=link, workspace_dir=objects)

    try:
        run_in_child(generate, "Code generation")
    except CompileError as error:
        if shutil.disk_usage(directory).free < _LITTLE_ROOM:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise
    return hashlib.sha256(path.read_bytes()).hexdigest()


__all__ = [
    "PARAMETERS",
    "RawTensor",
    "WeightLoader",
    "export_library",
    "library_name",
    "packed_tensors",
]
