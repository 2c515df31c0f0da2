"""What the code generator makes of the Arm kernels."""

from __future__ import annotations

import re

import pytest

from gqsa_compiler.schedules.arm.bsr import ArmBsrInt4
from gqsa_compiler.schedules.arm.narrow_bsr import ArmNarrowInt4
from gqsa_compiler.schedules.arm.narrow_dense_rule import ArmNarrowDense4
from gqsa_compiler.schedules.spec import Epilogue, LinearSpec
from gqsa_compiler.targets import parse_target
from tests.schedules.test_codegen import library_calls
from tools.arm_kernels import compile_for, inner_loop, loop_of

FULL = Epilogue(bias=True, activation="silu", gated=True, residual=True)
SPEC = LinearSpec(
    64, 512, "bsr", "int4", 16, 700, activation_dtype="int16", norm_eps=1e-5, epilogue=FULL
)


@pytest.mark.parametrize(
    ("name", "instructions", "others"),
    [
        ("aarch64", ("sdot",), ("bfmmla", "smlal")),
        ("aarch64-i8mm", ("sdot", "bfmmla"), ("smlal",)),
        ("aarch64:cortex-a72", ("smlal",), ("sdot", "bfmmla")),
    ],
)
def test_each_target_gets_its_instructions(
    name: str, instructions: tuple[str, ...], others: tuple[str, ...]
) -> None:
    target, rule = parse_target(name), ArmBsrInt4()
    function = rule.build(SPEC, rule.space(SPEC, target)[0], target)
    text = str(compile_for(target, function).mod.inspect_source("asm"))
    for instruction in instructions:
        assert re.search(rf"\t{instruction}\tv\d+\.4s", text)
    assert not re.search(rf"\t({'|'.join(others)})2?\tv\d+\.4s", text)
    assert library_calls(text) == set()
    if "sdot" in instructions:
        loop = inner_loop(text)
        # Four groups of 16: two sdot for each; pointers move on as they are loaded from.
        assert sum("\tsdot\t" in line for line in loop) == 8
        assert sum(bool(re.search(r"\tld1\t.*\], x\d+", line)) for line in loop) == 3
        assert len(loop) <= 54


def assembly(rule: ArmNarrowInt4 | ArmNarrowDense4, spec: LinearSpec) -> str:
    """Compile a kernel for cores with dot products."""
    target = parse_target("aarch64")
    function = rule.build(spec, rule.space(spec, target)[0], target)
    return str(compile_for(target, function).mod.inspect_source("asm"))


@pytest.mark.slow
def test_a_sparse_group_takes_six_instructions_with_bytes() -> None:
    text = assembly(ArmNarrowInt4(), LinearSpec(64, 512, "bsr", "int4", 16, 700))
    assert library_calls(text) == set()
    loop = loop_of(text, r"\tmla\tv\d+\.4s", 16)
    # Two loads of codes, and for each group its column, its activations and a multiplication.
    assert sum("\tld1\t" in line for line in loop) == 2
    assert sum(bool(re.search(r"\tldu?rb\t", line)) for line in loop) == 16
    assert sum(bool(re.search(r"\tmla\t.*\.s\[\d\]", line)) for line in loop) == 16
    assert len(loop) <= 92


def test_full_rows_take_one_instruction_for_five_codes() -> None:
    text = assembly(ArmNarrowDense4(), LinearSpec(64, 512, "bsr", "int4", 32, 1024))
    assert library_calls(text) == set()
    loop = inner_loop(text)
    assert sum("\tsdot\t" in line for line in loop) == 16
    assert sum("\tand\t" in line for line in loop) == 8
    assert len(loop) <= 53
