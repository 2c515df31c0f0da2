"""The decode kernel of every kind of layer, under the emulation, against the numpy reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gqsa_compiler.schedules.cuda import config as configs
from gqsa_compiler.schedules.cuda import gemv
from gqsa_compiler.schedules.cuda.arch import arch_for
from gqsa_compiler.schedules.cuda.config import CudaConfig
from gqsa_compiler.schedules.reference import decode
from gqsa_compiler.schedules.spec import Epilogue
from tests.schedules.cuda.cases import HALF_ERROR, RULE, TARGET, check, cuda_target, rule_of, run
from tests.schedules.linear_cases import random_keep, random_layer, spec_of

GATED = Epilogue(bias=True, activation="silu", gated=True, residual=True)
SMALL = CudaConfig(blocks=5, warps=2, depth=2)

# name: rows, groups a row, G, symmetric, spec's fields, configuration, tiles of tokens
Case = tuple[int, int, int, bool, dict[str, Any], CudaConfig, tuple[int, ...]]
CASES: dict[str, Case] = {
    "half": (37, 13, 16, False, {"norm_eps": 1e-5}, SMALL, (1,)),
    "half_gated_two": (38, 24, 16, True, {"epilogue": GATED}, SMALL, (2,)),
    "half_g32_small_scales": (21, 9, 32, False, {}, replace(SMALL, scale_bits=8, depth=1), (1,)),
    "integer_g128": (7, 5, 128, False, {"activation_dtype": "int16"}, SMALL, (1,)),
    "integer_gated_four": (
        38,
        40,
        16,
        False,
        {"activation_dtype": "int16", "norm_eps": 1e-5, "epilogue": GATED},
        replace(SMALL, warps=3),
        (4,),
    ),
    "two_bits_integer": (21, 24, 16, True, {"bits": 2, "activation_dtype": "int16"}, SMALL, (2,)),
    "eight_bits": (21, 24, 16, False, {"bits": 8}, SMALL, (2,)),
}
OTHER_BITS: dict[str, Case] = {
    f"{dtype}_{bits}_bits_g{size}{'_symmetric' if symmetric else ''}": (
        41,
        -(-400 // size),
        size,
        symmetric,
        {"activation_dtype": dtype, "bits": bits, "epilogue": Epilogue(residual=True)},
        CudaConfig(blocks=6, warps=3, depth=2),
        (1, 2, 4, 8),
    )
    for dtype in ("float16", "int16")
    for bits in (2, 8)
    for size in (8, 16, 32, 64, 128, 256)
    for symmetric in (size in (16, 64),)
}
SLOW: dict[str, Case] = {
    f"{dtype}_g{size}_{bits}{'_symmetric' if symmetric else ''}": (
        41,
        -(-400 // size),
        size,
        symmetric,
        {"activation_dtype": dtype, "epilogue": Epilogue(activation=activation, residual=True)},
        CudaConfig(blocks=6, warps=3, depth=depth, scale_bits=bits),  # type: ignore[arg-type]
        (1, 2, 4, 8),
    )
    for dtype, activation in (("float16", "gelu_tanh"), ("int16", "gelu"))
    for size in (8, 16, 32, 64, 128, 256)
    for bits, depth, symmetric in ((16, 3, False), (8, 1, True))
} | OTHER_BITS


@pytest.fixture(autouse=True)
def _many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut small layers into as many blocks as there are tiles."""
    monkeypatch.setattr(configs, "LEAST_TILES", 1)


def run_case(case: Case, density: float, m: int, seed: int, order: int) -> None:
    n, groups, size, symmetric, fields, config, tiles = case
    fields = {"activation_dtype": "float16", **fields}
    rng = np.random.default_rng(seed)
    keep = random_keep((n, groups), rng, density)
    # Codes of 3 and 4 bits share code where zero points are stored.
    bits = fields.pop("bits", 3 if seed % 3 == 0 and not symmetric else 4)
    layer = random_layer(keep, size, rng, symmetric=symmetric, bits=bits)
    check(spec_of(layer, **fields), config, [layer], m, rng, tiles, order)


@pytest.mark.parametrize("density", [0.0, pytest.param(0.05, marks=pytest.mark.slow), 0.5, 1.0])
@pytest.mark.parametrize("name", CASES)
def test_matches_the_reference(name: str, density: float) -> None:
    tile = CASES[name][-1][-1]
    for seed, m in enumerate({1, tile, tile + 1}):
        run_case(CASES[name], density, m, seed, order=seed)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_matches_the_reference_everywhere(name: str) -> None:
    for seed, (density, m) in enumerate(
        [(0.0, 1), (0.3, 1), (0.6, 2), (0.5, 3), (0.9, 8), (0.5, 9)]
    ):
        run_case(SLOW[name], density, m, seed, order=seed)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "int16"])
def test_the_default_configuration_at_a_real_width(dtype: str) -> None:
    """512 threads a block, 4096 inputs, half of the groups; rows of about 64 units."""
    rng = np.random.default_rng(9)
    layer = random_layer(rng.random((200, 256)) < 0.5, 16, rng)
    spec = spec_of(layer, activation_dtype=dtype, norm_eps=1e-5)
    check(spec, RULE.space(spec, TARGET)[0], [layer], 1, rng, (1,), order=2)


@pytest.mark.parametrize("order", [1, 3])
def test_rows_cut_between_blocks_are_the_same_in_any_order(order: int) -> None:
    """Two rows of 600 groups over five blocks: the blocks' order changes no bit."""
    results = []
    for turn in (0, order):
        rng = np.random.default_rng(1)
        layer = random_layer(rng.random((2, 600)) < 0.8, 16, rng)
        spec = spec_of(layer, activation_dtype="float16")
        packed = RULE.pack(spec, SMALL, [layer])
        info = packed["blocks"].reshape(-1, 8)
        assert len(info) == 5
        assert np.any(info[:, 4] < np.arange(5)), "no output is cut"
        results.append(check(spec, SMALL, [layer], 1, rng, (1,), turn))
    np.testing.assert_array_equal(results[0], results[1])


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-9, 1e7, 1e30])
def test_a_token_of_any_size_keeps_its_precision(size: float) -> None:
    """Halves would overflow above 65504 and vanish below 6e-8; tokens are scaled to fit."""
    rng = np.random.default_rng(5)
    layer = random_layer(rng.random((37, 13)) < 0.5, 16, rng)
    spec = spec_of(layer, activation_dtype="float16")
    x = rng.standard_normal((1, spec.k)).astype(np.float32) * np.float32(size)
    got = run(spec, SMALL, [layer], x, {}, (1,))
    weight = decode(layer)
    bound = HALF_ERROR * (np.abs(x.astype(np.float64)) @ np.abs(weight).T)
    assert np.all(np.abs(got - x.astype(np.float64) @ weight.T) <= bound + 1e-38)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float16", "int16"])
def test_a_token_that_is_not_finite_stays_so(dtype: str, value: float) -> None:
    """A maximum of float32 loses NaN, and integers have none."""
    rng = np.random.default_rng(5)
    layer = random_layer(np.ones((5, 9), bool), 16, rng)
    spec = spec_of(layer, activation_dtype=dtype, norm_eps=1e-5)
    x = rng.standard_normal((2, spec.k)).astype(np.float32)
    x[0, 77] = value
    got = run(spec, SMALL, [layer], x, {"norm": np.ones(spec.k, np.float32)}, (2,))
    assert not np.isfinite(got[0]).any()
    assert np.isfinite(got[1]).all()


def test_folded_layers_are_stacked() -> None:
    rng = np.random.default_rng(6)
    layers = [random_layer(rng.random((n, 13)) < 0.5, 16, rng) for n in (12, 20, 5)]
    nnz = sum(layer.nnz for layer in layers)
    spec = replace(spec_of(layers[0], activation_dtype="float16", norm_eps=1e-5), n=37, nnz=nnz)
    check(spec, SMALL, layers, 1, rng, (1,))


@pytest.mark.parametrize("symmetric", [False, True])
def test_codes_of_2_bits_in_groups_of_8_are_widened(symmetric: bool) -> None:
    rng = np.random.default_rng(8)
    layer = random_layer(rng.random((37, 13)) < 0.5, 8, rng, symmetric=symmetric, bits=2)
    check(spec_of(layer, activation_dtype="float16"), SMALL, [layer], 1, rng, (1,))


def test_what_it_runs() -> None:
    layer = random_layer(np.ones((4, 4), bool), 16, np.random.default_rng(0))
    spec = spec_of(layer, activation_dtype="float16")
    assert RULE.applies(spec, TARGET)
    assert RULE.applies(replace(spec, activation_dtype="int16"), cuda_target("sm_80"))
    assert not RULE.applies(replace(spec, activation_dtype="int8"), TARGET)
    for bits, rule in ((2, "int2"), (3, "int4"), (8, "int8")):
        assert rule_of(replace(spec, weight_dtype=f"int{bits}")).name == f"cuda.bsr_{rule}"
    assert {c.scale_bits for c in RULE.space(spec, TARGET)} == {16, 8}
    eight = replace(spec, weight_dtype="int8")
    assert {c.scale_bits for c in rule_of(eight).space(eight, TARGET)} == {16}
    assert not RULE.applies(spec, cuda_target("sm_70"))
    # A token of 100 kB does not fit the shared memory of a small GPU's block.
    wide = replace(spec, k=51200)
    assert RULE.applies(wide, TARGET)
    assert not RULE.applies(wide, cuda_target("sm_86"))
    # Nor that of every GPU which PTX is for: fewer tokens are taken at once there.
    ptx = replace(cuda_target("sm_80"), features=("compute_80",))
    assert not RULE.applies(wide, ptx)
    down = replace(spec, k=14336)
    config = RULE.space(down, ptx)[0]
    assert configs.tiles_of(down, config, arch_for(cuda_target("sm_80"))) == (1, 2, 4)
    assert configs.tiles_of(down, config, arch_for(ptx)) == (1, 2)
    # Columns have 12 bits.
    assert not RULE.applies(replace(spec, k=8 * 5000, group_size=8), TARGET)


def test_every_tile_is_a_power_of_two() -> None:
    """`device.warp_sum` halves both the sums and the lanes."""
    assert all(tile & (tile - 1) == 0 and tile <= 32 for tile in configs.TILES)
    assert gemv.WARP == 32
