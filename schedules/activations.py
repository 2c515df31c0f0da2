"""What compressed layers' inputs may be rounded to on a target, and what targets share of it."""

from __future__ import annotations

from collections.abc import Sequence

from gqsa_compiler.errors import UsageError
from gqsa_compiler.schedules.arm.narrow_bsr import multiplies_bytes
from gqsa_compiler.schedules.spec import ActivationDtype
from gqsa_compiler.targets import TargetSpec


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


def _sixteen(target: TargetSpec) -> bool:
    """Say whether a CPU has kernels with 16-bit integers."""
    return "avx2" in target.features or target.arch == "aarch64"
