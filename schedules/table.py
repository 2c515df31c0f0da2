"""The ordered table of rules: which kernel runs a linear layer on a target."""

from __future__ import annotations

from typing import Any

from gqsa_compiler.errors import CompileError
from gqsa_compiler.schedules.arm.bsr import ArmBsrInt2, ArmBsrInt4, ArmBsrInt8
from gqsa_compiler.schedules.arm.narrow_bsr import ArmNarrowInt4
from gqsa_compiler.schedules.arm.narrow_dense_rule import ArmNarrowDense4, ArmNarrowDense8
from gqsa_compiler.schedules.cuda.bsr import CudaBsrInt2, CudaBsrInt4, CudaBsrInt8
from gqsa_compiler.schedules.cuda.dense import CudaDense
from gqsa_compiler.schedules.generic.bsr import GenericBsrInt2, GenericBsrInt4, GenericBsrInt8
from gqsa_compiler.schedules.generic.dense import GenericDense
from gqsa_compiler.schedules.rule import KernelConfig, ScheduleRule
from gqsa_compiler.schedules.spec import LinearSpec
from gqsa_compiler.schedules.x86.bsr import X86BsrInt2, X86BsrInt4, X86BsrInt8
from gqsa_compiler.targets import TargetSpec


def rules_for(target: TargetSpec) -> tuple[ScheduleRule[Any], ...]:
    """List a target's rules, most special first.

    On a CPU the generic ones are last and always apply; a GPU has none such.
    """
    if target.kind == "cuda":
        return (CudaBsrInt2(), CudaBsrInt4(), CudaBsrInt8(), CudaDense())
    rules: tuple[ScheduleRule[Any], ...] = ()
    if "avx2" in target.features:
        rules = (X86BsrInt2(), X86BsrInt4(), X86BsrInt8())
    elif target.arch == "aarch64":
        narrow = (ArmNarrowDense4(), ArmNarrowDense8(), ArmNarrowInt4())
        rules = (*narrow, ArmBsrInt2(), ArmBsrInt4(), ArmBsrInt8())
    return (*rules, GenericBsrInt2(), GenericBsrInt4(), GenericBsrInt8(), GenericDense())


def select(spec: LinearSpec, target: TargetSpec) -> tuple[ScheduleRule[Any], KernelConfig]:
    """Choose the kernel for `spec` and its default configuration.

    Raises
    ------
    CompileError
        The target has no kernels, or `spec` describes nothing a kernel could compute.
    """
    spec.check()
    for rule in rules_for(target):
        if rule.applies(spec, target):
            return rule, rule.space(spec, target)[0]
    raise CompileError(
        f"No kernel of target {target.name} runs a {spec.weight} layer of {spec.weight_dtype}."
    )
