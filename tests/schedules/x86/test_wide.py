"""Many tokens at once as bfloat16, on machines that have the instructions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gqsa_compiler.schedules.spec import Epilogue
from gqsa_compiler.schedules.x86.bsr import X86BsrInt2, X86BsrInt4, X86BsrInt8, has_bfloat16
from gqsa_compiler.schedules.x86.config import LEAST
from gqsa_compiler.schedules.x86.wide import TILE, row_block
from gqsa_compiler.targets import parse_target
from tests.schedules.linear_cases import HOST, check, random_keep, random_layer, spec_of

needs_bfloat16 = pytest.mark.skipif(
    not has_bfloat16(HOST), reason="bfloat16 products need AVX-512 BF16 (AMD Zen 4, Intel SPR)"
)
GATED = Epilogue(bias=True, activation="silu", gated=True, residual=True)


@needs_bfloat16
@pytest.mark.parametrize("tokens", [LEAST, TILE, TILE + 1, 3 * TILE - 1])
@pytest.mark.parametrize(
    ("rule", "shape", "size", "fields"),
    [
        (X86BsrInt4(), (37, 13), 16, {}),
        (X86BsrInt4(), (3, 5), 8, {"norm_eps": 1e-5}),
        (X86BsrInt4(), (26, 21), 16, {"epilogue": GATED, "norm_eps": 1e-5}),
        (X86BsrInt4(), (2, 3), 32, {"epilogue": GATED}),
        (X86BsrInt4(), (9, 2), 128, {"epilogue": Epilogue(residual=True)}),
        (X86BsrInt2(), (17, 9), 16, {}),
        (X86BsrInt2(), (17, 5), 8, {}),
        (X86BsrInt8(), (11, 3), 64, {}),
        (X86BsrInt8(), (1, 3), 16, {}),
    ],
)
@pytest.mark.parametrize("density", [0.5, 1.0])
def test_matches_the_reference(
    rule: Any,
    shape: tuple[int, int],
    size: int,
    fields: dict[str, Any],
    tokens: int,
    density: float,
) -> None:
    rng = np.random.default_rng(tokens)
    keep = random_keep(shape, rng, density)
    if density == 1.0:
        keep[:] = True
    layer = random_layer(keep, size, rng, bits=rule.bits[-1])
    spec = spec_of(layer, activation_dtype="int16", **fields)
    x = rng.standard_normal((tokens, layer.shape[1])).astype(np.float32)
    check(rule, spec, [layer], x, rng, target=HOST)


@pytest.mark.parametrize(("rows", "block"), [(1, 1), (2, 2), (7, 4), (8, 8), (1000, 8)])
def test_rows_decoded_together(rows: int, block: int) -> None:
    rng = np.random.default_rng(0)
    assert row_block(spec_of(random_layer(np.ones((rows, 1), bool), 16, rng))) == block


def test_only_targets_with_the_feature_use_it() -> None:
    assert has_bfloat16(parse_target("x86-64-v4-bf16"))
    assert not has_bfloat16(parse_target("x86-64-v4"))
    assert not has_bfloat16(parse_target("x86-64-v3"))
