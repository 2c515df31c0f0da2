"""What inputs may be rounded to on a target, and which targets share packed weights."""

from __future__ import annotations

import pytest

from gqsa_compiler.errors import UsageError
from gqsa_compiler.schedules.activations import check_activations, check_shared_weights
from gqsa_compiler.targets import GPU_NAMES, parse_target, parse_targets


def test_which_targets_share_packed_weights() -> None:
    x86, arm = parse_targets("x86-64-v3,x86-64-v4"), parse_targets("aarch64,aarch64-i8mm")
    check_shared_weights("int16", x86)
    check_shared_weights("int8", arm)
    check_shared_weights("int8", x86[:1])
    for dtype in ("float32", "int8"):
        with pytest.raises(UsageError, match=rf"With {dtype} activations .* x86-64-v4 and x86-64"):
            check_shared_weights(dtype, x86)


def test_float16_activations_are_for_gpus() -> None:
    with pytest.raises(UsageError, match="float16 activations for target x86-64-v3, only for GPUs"):
        check_activations("float16", parse_target("x86-64-v3"))


@pytest.mark.parametrize("name", GPU_NAMES)
@pytest.mark.parametrize("wrong", ["float32", "int8"])
def test_what_gpus_have_no_kernels_for(name: str, wrong: str) -> None:
    with pytest.raises(UsageError, match=f"no kernels with {wrong} activations for target {name};"):
        check_activations(wrong, parse_target(name))  # type: ignore[arg-type]
