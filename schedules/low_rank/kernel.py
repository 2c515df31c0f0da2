"""The kernel of a low-rank path for a target."""

from __future__ import annotations

from typing import Any

from gqsa_compiler.schedules.low_rank import cpu, cuda
from gqsa_compiler.schedules.low_rank.spec import LowRankSpec
from gqsa_compiler.targets import TargetSpec


def low_rank(spec: LowRankSpec, target: TargetSpec) -> Any:
    """Build the scheduled PrimFunc.

    Its arguments, all row-major: ``base`` float32 [m, N]; with slots ``u`` float32
    [m, slots * rank] and ``b`` [rank, N] of `spec.dtype`, without slots `base` once more, of which
    the gated half is read (TVM takes a function of one tensor for a reshape, or fails to); last the
    output float32 [m, N_out]. ``m``, the token count, is a symbolic int64 of at least 1.

    Raises
    ------
    CompileError
        `spec` describes nothing a kernel could compute.
    """
    spec.check()
    return cuda.low_rank(spec) if target.kind == "cuda" else cpu.low_rank(spec, target)
