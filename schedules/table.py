"""The ordered table of rules: which kernel runs a linear layer on a target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gqsa_compiler.errors import CompileError, UsageError
from gqsa_compiler.schedules.arm.bsr import ArmBsrInt2, ArmBsrInt4, ArmBsrInt8
from gqsa_compiler.schedules.arm.narrow_bsr import ArmNarrowInt4, multiplies_bytes
from gqsa_compiler.schedules.arm.narrow_dense_rule import ArmNarrowDense4, ArmNarrowDense8
from gqsa_compiler.schedules.cuda.bsr import CudaBsrInt2, CudaBsrInt4, CudaBsrInt8
from gqsa_compiler.schedules.cuda.dense import CudaDense
from gqsa_compiler.schedules.generic.bsr import GenericBsrInt2, GenericBsrInt4, GenericBsrInt8
from gqsa_compiler.schedules.generic.dense import GenericDense
from gqsa_compiler.schedules.rule import KernelConfig, ScheduleRule
from gqsa_compiler.schedules.spec import ActivationDtype, LinearSpec
from gqsa_compiler.schedules.x86.bsr import X86BsrInt2, X86BsrInt4, X86BsrInt8
from gqsa_compiler.targets import TargetSpec


def rules_for(target: TargetSpec) -> tuple[ScheduleRule[Any], ...]:
    """List a target's rules, most special first.

    On a CPU the generic ones are last and always apply; a GPU has none such.
    """
    if target.kind == "cuda":
        return (CudaBsrInt2(), CudaBsrInt4(), CudaBsrInt8(), CudaDense())
    rules: tuple[ScheduleRule[Any], ...] = ()
    if _x86(target):
        rules = (X86BsrInt2(), X86BsrInt4(), X86BsrInt8())
    elif target.arch == "aarch64":
        narrow = (ArmNarrowDense4(), ArmNarrowDense8(), ArmNarrowInt4())
        rules = (*narrow, ArmBsrInt2(), ArmBsrInt4(), ArmBsrInt8())
    return (*rules, GenericBsrInt2(), GenericBsrInt4(), GenericBsrInt8(), GenericDense())


def default_activations(target: TargetSpec) -> ActivationDtype:
    """Return what compressed layers' inputs are rounded to unless something else is asked for.

    16-bit integers lose next to nothing (7e-4 of SmolLM2-135M's logits), so they are taken where
    there are kernels for them. On GPUs halves, which prompts need for tensor cores.
    """
    if target.kind == "cuda":
        return "float16"
    return "int16" if _sixteen(target) else "float32"


def check_activations(dtype: ActivationDtype, target: TargetSpec) -> None:
    """Check that compressed layers can run with such inputs on a target.

    Raises
    ------
    UsageError
        They cannot.
    """
    if target.kind == "cuda":
        if dtype not in ("int16", "float16"):
            raise UsageError(
                f"There are no kernels with {dtype} activations for target {target.name}; choose "
                "int16 or float16."
            )
        return
    if dtype == "float16":
        raise UsageError(
            f"There are no kernels with float16 activations for target {target.name}, only for "
            "GPUs; choose float32, int16 or int8."
        )
    if dtype == "int16" and not _sixteen(target):
        raise UsageError(
            f"There are no kernels with int16 activations for target {target.name}; they need an "
            "x86-64 with AVX2 or a 64-bit Arm. Choose float32 or int8."
        )


def check_shared_weights(dtype: ActivationDtype, targets: Sequence[TargetSpec]) -> None:
    """Check that code for each of several targets can read the same packed weights.

    Raises
    ------
    UsageError
        It cannot: the generic kernels' layouts depend on the vector width, and not all aarch64
        targets have the kernels of bytes.
    """
    first = targets[0]
    for other in targets[1:]:
        if dtype == "int8" and multiplies_bytes(other) != multiplies_bytes(first):
            raise UsageError(
                f"With int8 activations the weights are packed differently for {first.name} and "
                f"{other.name}, of which one has no dot products; compile an artefact for each, or "
                "choose int16."
            )
        if dtype != "int16" and other.vector_bits != first.vector_bits:
            raise UsageError(
                f"With {dtype} activations the weights are packed differently for {first.name} "
                f"and {other.name}, whose vectors differ in width; compile an artefact for each, "
                "or choose int16."
            )


def _x86(target: TargetSpec) -> bool:
    return "avx2" in target.features


def _sixteen(target: TargetSpec) -> bool:
    return _x86(target) or target.arch == "aarch64"


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
