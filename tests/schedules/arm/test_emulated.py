"""The Arm kernels against the numpy reference, in an emulator."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gqsa_compiler.checkpoint import pack_codes
from gqsa_compiler.schedules.arm.bsr import ArmBsrInt2, ArmBsrInt4, ArmBsrInt8
from gqsa_compiler.schedules.rule import ScheduleRule
from gqsa_compiler.schedules.spec import Epilogue
from gqsa_compiler.targets import TargetSpec, parse_target
from tests.schedules import linear_cases
from tests.schedules.arm.emulated import Kernels
from tests.schedules.linear_cases import check, random_keep, random_layer, spec_of
from tools.arm_kernels import missing_tool

pytestmark = pytest.mark.skipif(missing_tool() is not None, reason=f"there is no {missing_tool()}")

BYTES = parse_target("aarch64")
MATRICES = parse_target("aarch64-i8mm")
HALVES = replace(BYTES, name="neon", features=("neon",))
RULES = {2: ArmBsrInt2(), 3: ArmBsrInt4(), 4: ArmBsrInt4(), 8: ArmBsrInt8()}
ALL = Epilogue(bias=True, activation="silu", gated=True, residual=True)
EVERY = (1, 2, 4, 5, 8, 11, 16, 19)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernels]:
    """Run what `check` checks in the emulator."""
    emulated = Kernels(tmp_path_factory.mktemp("kernels"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_cases, "run", emulated.run)
        yield emulated


# bits, group size, rows, column groups, symmetric, target, token counts, fields of the spec
CASES: dict[str, tuple[int, int, int, int, bool, TargetSpec, tuple[int, ...], dict[str, Any]]] = {
    "g16": (4, 16, 37, 13, False, BYTES, EVERY, {}),
    "g16_halves": (4, 16, 37, 13, False, HALVES, EVERY, {}),
    "g8": (4, 8, 11, 21, False, BYTES, (1, 3), {"norm_eps": 1e-5}),
    "g32": (3, 32, 7, 5, True, BYTES, (1, 3), {}),
    "g128": (4, 128, 9, 3, False, BYTES, (1, 3), {}),
    "int2": (2, 16, 19, 9, False, BYTES, (1, 3), {}),
    "int2_g128": (2, 128, 9, 2, True, BYTES, (1, 3), {}),
    "int8": (8, 32, 21, 7, True, BYTES, (1, 3), {}),
    "int8_zeros": (8, 16, 21, 7, False, BYTES, (1, 3), {}),
    "one_row": (4, 16, 1, 1, False, BYTES, (1, 3), {}),
    "matrices": (4, 16, 37, 13, False, MATRICES, (3, 32, 67), {}),
    "matrices_g8": (4, 8, 9, 21, False, MATRICES, (33,), {"norm_eps": 1e-5}),
    "matrices_int8": (8, 64, 9, 3, True, MATRICES, (40,), {}),
    "matrices_all": (4, 32, 38, 8, False, MATRICES, (41,), {"norm_eps": 1e-5, "epilogue": ALL}),
    "all": (4, 16, 38, 40, False, BYTES, (1, 6), {"norm_eps": 1e-5, "epilogue": ALL}),
    "all_halves": (4, 64, 38, 4, False, HALVES, (1, 6), {"norm_eps": 1e-5, "epilogue": ALL}),
}


QUICK = {("g16", False), ("int8", True), ("g16_halves", False), ("matrices", False), ("all", False)}


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("name", "full"),
    [
        pytest.param(
            name,
            full,
            id=f"{name}-{'full' if full else 'some'}",
            marks=() if (name, full) in QUICK else pytest.mark.slow,
        )
        for name in CASES
        for full in (False, True)
    ],
)
def test_matches_the_reference(name: str, full: bool) -> None:
    bits, size, n, groups, symmetric, target, tokens, fields = CASES[name]
    rule: ScheduleRule[Any] = RULES[bits]
    rng = np.random.default_rng(bits * size)
    tiles = None if tokens is EVERY else (4,)
    for m in tokens:
        keep = np.ones((n, groups), bool) if full else random_keep((n, groups), rng, 0.5)
        keep[0, 0] = full
        layer = random_layer(keep, size, rng, bits=bits, symmetric=symmetric)
        spec = spec_of(layer, activation_dtype="int16", **fields)
        x = rng.standard_normal((m, spec.k)).astype(np.float32)
        check(rule, spec, [layer], x, rng, tiles, target)


@pytest.mark.usefixtures("kernels")
def test_the_largest_codes_and_activations() -> None:
    """Every code is as far from its zero point as can be, and every activation a peak."""
    rng = np.random.default_rng(0)
    layer = random_layer(random_keep((37, 13), rng, 0.7), 16, rng)
    high = rng.random(layer.nnz) < 0.5
    codes = np.repeat(np.where(high, 15, 0).astype(np.uint8)[:, None], 16, axis=1)
    zeros = np.where(high, 0, 15).astype(np.uint8)
    layer = replace(layer, qweight=pack_codes(codes, 4), qzeros=pack_codes(zeros, 4))
    for m in EVERY:
        x = np.where(rng.random((m, 208)) < 0.5, -3.0, 3.0).astype(np.float32)
        spec = spec_of(layer, activation_dtype="int16")
        check(RULES[4], spec, [layer], x, rng, None, BYTES)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_token_that_is_not_finite_stays_so(kernels: Kernels, value: float) -> None:
    rng = np.random.default_rng(0)
    layer = random_layer(random_keep((37, 13), rng, 0.9), 16, rng)
    spec = spec_of(layer, activation_dtype="int16")
    kept = np.diff(layer.indptr) > 0
    for m in (1, 5):
        x = rng.standard_normal((m, 208)).astype(np.float32)
        x[0, 17] = value
        out = kernels.run(RULES[4], spec, [layer], x, {}, None, BYTES)
        assert not np.isfinite(out[0, kept]).any()
        assert np.isfinite(out[1:]).all()
