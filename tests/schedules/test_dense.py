"""Every rule that runs dense layers against the numpy reference."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gqsa_compiler.errors import CompileError
from gqsa_compiler.schedules.rule import ScheduleRule
from gqsa_compiler.schedules.spec import Epilogue, LinearSpec
from gqsa_compiler.schedules.table import select
from tests.schedules.linear_cases import (
    HOST,
    assert_within,
    expected,
    random_operands,
    rules_that_run,
    run,
)

DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
}


def check(rule: ScheduleRule[Any], spec: LinearSpec, m: int, rng: np.random.Generator) -> None:
    weight: npt.NDArray[Any] = rng.standard_normal((spec.n, spec.k)).astype(
        DTYPES[spec.weight_dtype]
    )
    x = rng.standard_normal((m, spec.k)).astype(np.float32)
    operands = random_operands(spec, m, rng)
    got = run(rule, spec, [weight], x, operands)
    dense = weight.astype(np.float64)
    assert_within(got, expected(spec, dense, np.abs(dense), x, operands))


CASES = {
    "float16": LinearSpec(131, 577, "dense", "float16"),
    "bfloat16": LinearSpec(66, 64, "dense", "bfloat16", norm_eps=1e-5),
    "float32": LinearSpec(7, 33, "dense", "float32"),
    "one_by_one": LinearSpec(1, 1, "dense", "float16"),
    "gated": LinearSpec(
        300,
        40,
        "dense",
        "float16",
        norm_eps=1e-6,
        epilogue=Epilogue(bias=True, activation="silu", gated=True, residual=True),
    ),
    "epilogue": LinearSpec(
        10, 5, "dense", "float32", epilogue=Epilogue(bias=True, activation="gelu", residual=True)
    ),
}


every_rule = pytest.mark.parametrize("rule", rules_that_run(CASES.values()))


@every_rule
@pytest.mark.parametrize("case", CASES)
@settings(max_examples=6, deadline=None)
@given(m=st.sampled_from([1, 2, 3, 4, 5, 7, 8, 63, 64, 65, 130]), seed=st.integers(0, 2**32 - 1))
def test_matches_the_reference(rule: ScheduleRule[Any], case: str, m: int, seed: int) -> None:
    check(rule, CASES[case], m, np.random.default_rng(seed))


@every_rule
@settings(max_examples=4, deadline=None)
@given(
    n=st.integers(1, 100),
    k=st.integers(1, 100),
    m=st.integers(1, 600),
    dtype=st.sampled_from(sorted(DTYPES)),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape(rule: ScheduleRule[Any], n: int, k: int, m: int, dtype: str, seed: int) -> None:
    check(rule, LinearSpec(n, k, "dense", dtype), m, np.random.default_rng(seed))


@every_rule
def test_every_finite_half_is_converted_exactly(rule: ScheduleRule[Any]) -> None:
    bits = np.arange(65536, dtype=np.uint16)
    halves = bits.view(np.float16)
    finite = halves[np.isfinite(halves)]
    spec = LinearSpec(len(finite), 1, "dense", "float16")
    got = run(rule, spec, [finite.reshape(-1, 1)], np.ones((1, 1), np.float32))
    np.testing.assert_array_equal(got[0], finite.astype(np.float32))


def test_one_stored_weight_is_not_copied() -> None:
    weight = np.ones((4, 3), np.float16)
    spec = LinearSpec(4, 3, "dense", "float16")
    rule, config = select(spec, HOST)
    assert rule.reads_stored_layout
    assert rule.pack(spec, config, [weight])["weight"] is weight
    folded = LinearSpec(8, 3, "dense", "float16")
    assert rule.pack(folded, config, [weight, 2 * weight])["weight"].shape == (8, 3)


def test_a_weight_of_another_shape_or_dtype_is_refused() -> None:
    spec = LinearSpec(4, 3, "dense", "float16")
    rule, config = select(spec, HOST)
    with pytest.raises(CompileError, match="Cannot pack a dense weight"):
        rule.pack(spec, config, [np.ones((3, 4), np.float16)])
    with pytest.raises(CompileError, match="float32"):
        rule.pack(spec, config, [np.ones((4, 3), np.float32)])
