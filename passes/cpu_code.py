"""From scheduled functions to what the code generator for CPUs takes."""

from __future__ import annotations

from typing import Any

from gqsa_compiler._tvm import finalize_host_passes, register_tir_pipeline, s_tir, tirx, tvm

PIPELINE = "gqsa_cpu"
"""Name that `relax.build` and `tirx.build` know it by, once `register` was called."""


def register() -> str:
    """Make the pipeline known to TVM, and return its name."""
    register_tir_pipeline(PIPELINE, _stages)
    return PIPELINE


def _stages() -> tuple[tvm.transform.Pass, Any, Any]:
    """Return the lowering, and what finishes code for the host and for devices.

    TVM's own list without what only GPUs need and without what our kernels have done already
    (loops are split, hoisted and unrolled where they are written); those passes took most of a
    compilation: they try to prove every index of the unrolled code again.
    """
    lower = tvm.ir.transform.Sequential(
        [
            s_tir.transform.CanonicalizeLoop(),
            s_tir.transform.LowerInitBlock(),
            s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
            s_tir.transform.ConvertBlocksToOpaque(),
            s_tir.transform.LowerMatchBuffer(),
            s_tir.transform.LowerOpaqueBlock(),
            tirx.transform.FlattenBuffer(),
            tirx.transform.BF16ComputeLegalize(),
            tirx.transform.VectorizeLoop(True),
            tirx.transform.StorageRewrite(),
            tirx.transform.UnrollLoop(),
            tirx.transform.StmtSimplify(),
            tirx.transform.RemoveNoOp(),
            s_tir.transform.RewriteUnsafeSelect(),
            tirx.transform.VerifyMemory(),
            tirx.transform.AnnotateEntryFunc(),
            tirx.transform.SplitHostDevice(),
            tirx.transform.MakePackedAPI(),
            tirx.transform.BF16StorageLegalize(),
        ]
    )
    return lower, finalize_host_passes, finalize_host_passes  # a CPU is host and device
