"""A compiled model, or one kernel, with its machine code in one shared library."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gqsa_compiler._tvm import Target, relax, tvm, tvm_ffi
from gqsa_compiler.errors import CompileError
from gqsa_compiler.schedules.cuda.embed import embed_machine_code
from gqsa_compiler.schedules.cuda.lowering import register
from gqsa_compiler.schedules.cuda.nvcc import KernelUse, compile_fatbin

_CALLBACK = "tvm_callback_cuda_compile"


def export_library(
    mod: Any,
    target: Target,
    code: Sequence[str],
    path: Path,
    link: Callable[..., None],
    workspace: Path,
) -> tuple[KernelUse, ...]:
    """Generate code for the host and the GPU and link them.

    The machine it runs on needs neither nvcc nor a compiler: what nvcc makes here is in it.

    Parameters
    ----------
    mod : IRModule
        After every phase of the pipeline.
    target : Target
        With its host.
    code : sequence of str
        ``sm_90``, ``compute_80`` ...
    path : Path
        Of the library.
    link : callable
        ``link(output, objects, **options)``, as `tvm.support.cc.cross_compiler` gives it.
    workspace : Path
        An existing directory for object files.

    Returns
    -------
    tuple of KernelUse
        What ptxas says of every kernel.

    Raises
    ------
    CompileError
        There is no nvcc, or it failed.
    """
    _leave_source()
    executable = relax.build(mod, target, relax_pipeline=None, tir_pipeline=register())
    return _export(executable, target, code, path, link, workspace)


def export_kernel(
    function: Any,
    target: Target,
    code: Sequence[str],
    path: Path,
    link: Callable[..., None],
    workspace: Path,
) -> tuple[KernelUse, ...]:
    """Make a library of one scheduled PrimFunc, called ``main`` in it.

    Parameters, result and errors are those of `export_library`.
    """
    _leave_source()
    module = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
    made = tvm.compile(module, target, tir_pipeline=register())
    return _export(made, target, code, path, link, workspace)


def _leave_source() -> None:
    """Keep TVM from compiling as soon as it has the source, as it does where there is a driver."""
    tvm_ffi.register_global_func(_CALLBACK, _as_it_is, override=True)


def _export(
    executable: Any,
    target: Target,
    code: Sequence[str],
    path: Path,
    link: Callable[..., None],
    workspace: Path,
) -> tuple[KernelUse, ...]:
    uses: list[KernelUse] = []

    def pack(module: Any, _system: bool, prefix: str, folder: str) -> str:
        source = _device_source(module)
        fatbin, found = compile_fatbin(source, code)
        uses.extend(found)
        to_tensor = tvm_ffi.get_global_func("runtime.ModulePackImportsToTensor")
        blob = bytes(to_tensor(module).numpy().tobytes())
        blob = embed_machine_code(blob, source, fatbin, "fatbin")
        make = tvm_ffi.get_global_func("codegen.codegen_blob")
        made = str(Path(folder) / "device.o")
        make(blob, False, str(target.host), prefix).write_to_file(made, "o")
        return made

    executable.export_library(
        str(path), fcompile=link, fpack_imports=pack, workspace_dir=str(workspace)
    )
    return tuple(uses)


def _as_it_is(source: str | bytes, *_: Any) -> bytes:
    return source.encode() if isinstance(source, str) else source


def _device_source(module: Any) -> str:
    """Find the CUDA source among a module's imports, and theirs."""
    found: list[Any] = []
    waiting = list(module.imports)
    while waiting:
        imported = waiting.pop()
        waiting += list(imported.imports)
        if imported.kind == "cuda":
            found.append(imported)
    if len(found) != 1:
        raise CompileError(f"The compiled model has {len(found)} CUDA modules, not 1.")
    return str(found[0].inspect_source())
