"""From scheduled kernels to CUDA source, without nvcc and without a GPU.

TVM's own list of passes inserts barriers where it believes shared memory needs them, and refuses
a kernel under a condition on the host (`thread_storage_sync.cc`: "Cannot insert syncs inside
condition"). These kernels have their barriers and lay out their shared memory themselves, so the
passes that would do either are left out.
"""

from __future__ import annotations

from typing import Any

from gqsa_compiler._tvm import (
    finalize_host_passes,
    register_tir_pipeline,
    s_tir,
    split_host_device_mods,
    tirx,
    tvm,
    tvm_ffi,
)
from gqsa_compiler.schedules.cuda.arch import Arch

PIPELINE = "gqsa_cuda"
"""Name that `relax.build` and `tirx.build` know it by, once `register` was called."""


def register() -> str:
    """Make the pipeline known to TVM, and return its name."""
    register_tir_pipeline(PIPELINE, _stages)
    return PIPELINE


def _stages() -> tuple[tvm.transform.Pass, Any, Any]:
    """Return the lowering, and what finishes code for the host and for the GPU."""
    packed = [tirx.transform.MakePackedAPI(), tirx.transform.BF16StorageLegalize()]
    passes = tvm.ir.transform.Sequential([*_lowering(), *packed])
    return passes, finalize_host_passes, _finalize_device_passes


def _lowering() -> list[tvm.transform.Pass]:
    """List the passes from scheduled functions to one for the host and its device functions."""
    return [
        s_tir.transform.CanonicalizeLoop(),
        s_tir.transform.LowerInitBlock(),
        s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
        s_tir.transform.ConvertBlocksToOpaque(),
        s_tir.transform.UnifyThreadBinding(),
        s_tir.transform.LowerMatchBuffer(),
        s_tir.transform.LowerOpaqueBlock(),
        tirx.transform.FlattenBuffer(),
        tirx.transform.BF16ComputeLegalize(),
        tirx.transform.NarrowDataType(32),
        tirx.transform.VectorizeLoop(True),
        tirx.transform.StorageRewrite(),
        tirx.transform.UnrollLoop(),
        tirx.transform.StmtSimplify(),
        tirx.transform.RemoveNoOp(),
        s_tir.transform.RewriteUnsafeSelect(),
        tirx.transform.VerifyMemory(),
        tirx.transform.AnnotateEntryFunc(),
        tirx.transform.SplitHostDevice(),
    ]


def _finalize_device_passes() -> tvm.transform.Pass:
    return tvm.ir.transform.Sequential(
        [
            tirx.transform.LowerWarpMemory(),
            tirx.transform.StmtSimplify(),
            tirx.transform.LowerIntrin(),
        ]
    )


def lower(function: Any, arch: Arch, name: str = "main") -> Any:
    """Lower a kernel's PrimFunc to one function for the host and its device functions.

    Parameters
    ----------
    function : PrimFunc
        As `ScheduleRule.build` returns it.
    arch : Arch
    name : str
        The host function's; device functions are called ``<name>_kernel``, ``<name>_kernel_1``...

    Returns
    -------
    IRModule
        Not yet behind TVM's packed calling convention: the host function still takes buffers.
    """
    module = tvm.IRModule({name: function.with_attr("global_symbol", name)})
    module = tirx.transform.BindTarget(arch.target())(module)
    return tvm.ir.transform.Sequential(_lowering())(module)


def device_module(lowered: Any) -> Any:
    """Generate code for all device functions of a lowered module.

    Without a GPU's driver on this machine the module holds CUDA C source; nothing is compiled.
    """
    packed = tirx.transform.BF16StorageLegalize()(tirx.transform.MakePackedAPI()(lowered))
    _, devices = split_host_device_mods(packed)
    ((target, module),) = devices.items()
    module = _finalize_device_passes()(module)
    return tvm_ffi.get_global_func("target.build.cuda")(module, target)


def device_source(lowered: Any) -> str:
    """Generate the CUDA C source of all device functions of a lowered module."""
    return str(device_module(lowered).inspect_source())
