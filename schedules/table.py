"""The ordered table of rules: which kernel runs a linear layer on a target."""

from __future__ import annotations

from typing import Any

from gqsa_compiler.errors import CompileError
from gqsa_compiler.schedules.generic.bsr import GenericBsrInt2, GenericBsrInt4, GenericBsrInt8
from gqsa_compiler.schedules.generic.dense import GenericDense
from gqsa_compiler.schedules.rule import KernelConfig, ScheduleRule
from gqsa_compiler.schedules.spec import LinearSpec
from gqsa_compiler.targets import TargetSpec


def rules_for(target: TargetSpec) -> tuple[ScheduleRule[Any], ...]:
    """List a target's rules, most special first; the generic ones are last and always apply.

    Raises
    ------
    CompileError
        There are no kernels for the target's code generator.
    """
    if target.kind != "llvm":
        raise CompileError(
            f"There are no kernels for target {target.name} (code generator {target.kind}); "
            "choose a CPU target."
        )
    return (GenericBsrInt2(), GenericBsrInt4(), GenericBsrInt8(), GenericDense())


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
