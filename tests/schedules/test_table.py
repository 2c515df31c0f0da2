"""Choosing a kernel, and the descriptions that are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gqsa_compiler.errors import CompileError, UsageError
from gqsa_compiler.limits import BITS
from gqsa_compiler.schedules.activations import (
    check_activations,
    default_activations,
)
from gqsa_compiler.schedules.spec import Epilogue, LinearSpec
from gqsa_compiler.schedules.table import rules_for, select
from gqsa_compiler.targets import CPU_NAMES, GPU_NAMES, parse_target

SPARSE = LinearSpec(64, 128, "bsr", "int4", 16, 100)
DENSE = LinearSpec(64, 128, "dense", "float16")


@pytest.mark.parametrize("target", CPU_NAMES)
def test_the_generic_rules_always_apply(target: str) -> None:
    spec = parse_target(target)
    assert select(SPARSE, spec)[0].name == "generic.bsr_int4"
    for bits, rule in ((2, "int2"), (3, "int4"), (8, "int8")):
        other = replace(SPARSE, weight_dtype=f"int{bits}")
        assert select(other, spec)[0].name == f"generic.bsr_{rule}"
    assert select(DENSE, spec)[0].name == "generic.dense"
    names = [rule.name for rule in rules_for(spec)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("spec", [SPARSE, DENSE])
def test_the_default_configuration_is_the_first_of_the_space(spec: LinearSpec) -> None:
    target = parse_target("cpu")
    rule, config = select(spec, target)
    assert config == rule.space(spec, target)[0]


def test_int16_activations_have_kernels_on_x86_and_arm() -> None:
    sixteen = replace(SPARSE, activation_dtype="int16")
    for name in CPU_NAMES:
        target = parse_target(name)
        if "avx2" in target.features:
            assert default_activations(target) == "int16"
            check_activations("int16", target)
            assert select(sixteen, target)[0].name == "x86.bsr_int4"
        elif target.arch == "aarch64":
            assert default_activations(target) == "int16"
            check_activations("int16", target)
            assert select(sixteen, target)[0].name == "arm.bsr_int4"
        else:
            assert default_activations(target) == "float32"
            with pytest.raises(UsageError, match=f"int16 activations for target {name}"):
                check_activations("int16", target)
            with pytest.raises(CompileError, match="No kernel"):
                select(sixteen, target)


@pytest.mark.parametrize("name", GPU_NAMES)
def test_what_runs_on_a_gpu(name: str) -> None:
    target = parse_target(name)
    assert default_activations(target) == "float16"
    for dtype in ("float16", "int16"):
        check_activations(dtype, target)  # type: ignore[arg-type]
        spec = replace(SPARSE, activation_dtype=dtype)  # type: ignore[arg-type]
        assert select(spec, target)[0].name == "cuda.bsr_int4"
        for bits, rule in ((2, 2), (3, 4), (8, 8)):
            other = replace(spec, weight_dtype=f"int{bits}")
            assert select(other, target)[0].name == f"cuda.bsr_int{rule}"
    assert select(DENSE, target)[0].name == "cuda.dense"
    with pytest.raises(CompileError, match=r"No kernel of target .* runs a bsr layer of int4"):
        select(replace(SPARSE, activation_dtype="int8"), target)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"group_size": 12}, "12 is not one of 8, 16, 32"),
        ({"group_size": 512}, "512 is not one of"),
        ({"k": 130}, "does not divide 130"),
        ({"nnz": 64 * 8 + 1}, "do not fit"),
        ({"weight_dtype": "int5"}, "no sparse layers of int5 codes"),
        ({"weight_dtype": "float16"}, "no sparse layers of float16 codes"),
        ({"n": 0}, "nothing to compute"),
        ({"n": 63, "epilogue": Epilogue(activation="silu", gated=True)}, "even number"),
        ({"epilogue": Epilogue(gated=True)}, "an activation"),
    ],
)
def test_a_spec_that_means_nothing_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(CompileError, match=message):
        select(replace(SPARSE, **fields), parse_target("cpu"))  # type: ignore[arg-type]


def test_an_unknown_weight_dtype_is_refused() -> None:
    with pytest.raises(CompileError, match="float8"):
        select(replace(DENSE, weight_dtype="float8"), parse_target("cpu"))


def test_a_spec_survives_json() -> None:
    spec = replace(SPARSE, epilogue=Epilogue(bias=True, activation="gelu"), norm_eps=1e-5)
    assert LinearSpec.from_json(spec.to_json()) == spec


def test_layers_that_differ_in_their_groups_only_share_code() -> None:
    rule, _ = select(SPARSE, parse_target("cpu"))
    assert rule.code_key(SPARSE) == rule.code_key(replace(SPARSE, nnz=7))
    assert rule.code_key(SPARSE) != rule.code_key(replace(SPARSE, nnz=64 * 8))


def test_codes_that_are_widened_share_code_where_their_zero_points_are_stored() -> None:
    rule, _ = select(SPARSE, parse_target("cpu"))
    narrow = replace(SPARSE, weight_dtype="int3")
    assert rule.code_key(SPARSE) == rule.code_key(narrow)
    symmetric = replace(SPARSE, symmetric=True)
    assert rule.code_key(symmetric) != rule.code_key(replace(narrow, symmetric=True))


@pytest.mark.parametrize("bits", BITS)
def test_a_spec_knows_the_bits_of_its_codes(bits: int) -> None:
    assert replace(SPARSE, weight_dtype=f"int{bits}").bits == bits
    assert DENSE.bits == 0
