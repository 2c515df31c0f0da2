"""The kernel for many tokens, under the emulation with its tensor cores, against the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gqsa_compiler.schedules.cuda.config import FEW_TOKENS, MANY_TOKENS, CudaConfig
from gqsa_compiler.schedules.spec import Epilogue
from tests.schedules.cuda.cases import check
from tests.schedules.linear_cases import random_keep, random_layer, spec_of

GATED = Epilogue(bias=True, activation="silu", gated=True, residual=True)
CONFIG = CudaConfig(blocks=5, warps=2, depth=1)
SMALL = CudaConfig(blocks=5, warps=2, depth=1, scale_bits=8)

# rows, groups a row, G, symmetric, spec's fields, configuration
Case = tuple[int, int, int, bool, dict[str, Any], CudaConfig]
CASES: dict[str, Case] = {
    "half_norm": (45, 40, 16, False, {"norm_eps": 1e-5, "epilogue": Epilogue(bias=True)}, CONFIG),
    "eight_bits": (45, 40, 16, False, {"bits": 8, "norm_eps": 1e-5}, CONFIG),
    "gated_small_scales": (70, 9, 32, True, {"epilogue": GATED}, SMALL),
}
SLOW: dict[str, Case] = {
    f"g{size}_{config.scale_bits}": (
        67 + size % 3,
        -(-600 // size),
        size,
        config is SMALL,
        {"epilogue": Epilogue(activation="gelu", residual=True), "norm_eps": 1e-6},
        config,
    )
    for size in (8, 16, 32, 64, 128, 256)
    for config in (CONFIG, SMALL)
} | {
    f"g{size}_of_{bits}": (40, -(-600 // size), size, size == 32, {"bits": bits}, CONFIG)
    for size in (8, 16, 32, 64, 128, 256)
    for bits in (2, 8)
}


def run_case(case: Case, density: float, m: int, seed: int) -> None:
    n, groups, size, symmetric, fields, config = case
    rng = np.random.default_rng(seed)
    fields = dict(fields)
    keep, bits = random_keep((n, groups), rng, density), fields.pop("bits", 4)
    layer = random_layer(keep, size, rng, symmetric=symmetric, bits=bits)
    spec = spec_of(layer, activation_dtype="float16", **fields)
    check(spec, config, [layer], m, rng, (), order=seed)


@pytest.mark.parametrize(("m", "density"), [(9, 0.5), (64, 0.0), (65, 0.3), (130, 1.0)])
@pytest.mark.parametrize("name", CASES)
def test_matches_the_reference(name: str, m: int, density: float) -> None:
    run_case(CASES[name], density, m, seed=m)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_matches_the_reference_everywhere(name: str) -> None:
    for seed, (density, m) in enumerate([(0.05, 10), (0.5, 33), (0.9, 64), (0.6, 100), (0.5, 200)]):
        run_case(SLOW[name], density, m, seed)


def test_scales_of_any_size_become_halves() -> None:
    """A code times a scale of 60000 is no half, and one of 1e-7 has no digits."""
    rng = np.random.default_rng(0)
    keep = rng.random((45, 40)) < 0.5
    for scales in ((1e-7, 1e-6), (1e4, 6e4)):
        layer = random_layer(keep, 16, rng, scales=scales)
        spec = spec_of(
            layer, activation_dtype="float16", norm_eps=1e-5, epilogue=Epilogue(bias=True)
        )
        check(spec, CONFIG, [layer], 20, rng, ())


@pytest.mark.parametrize("tile", [FEW_TOKENS, MANY_TOKENS])
def test_tiles_are_whole(tile: Any) -> None:
    assert tile.tokens % tile.warp_tokens == 0 == tile.rows % tile.warp_rows
    assert tile.warp_tokens % 16 == 0 == tile.warp_rows % 8
    assert tile.tokens * 32 % tile.threads == 0, (
        "a slab's 32 chunks of all tokens are loaded evenly"
    )
    # 32 lanes of a fragment, 8 rows apart and 4 words side by side, meet 32 banks.
    banks = {(row * tile.stride + word) % 32 for row in range(8) for word in range(4)}
    assert len(banks) == 32
    assert sum(tile.shared_parts().values()) * 4 <= 99 * 1024
