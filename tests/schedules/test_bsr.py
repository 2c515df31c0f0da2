"""Every rule that runs sparse layers against the numpy reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gqsa_compiler._tvm import tvm
from gqsa_compiler.checkpoint import pack_codes
from gqsa_compiler.limits import BITS
from gqsa_compiler.schedules import reference
from gqsa_compiler.schedules.rule import ScheduleRule
from gqsa_compiler.schedules.spec import ActivationDtype, Epilogue, LinearSpec
from gqsa_compiler.schedules.table import rules_for
from gqsa_compiler.targets import parse_target
from tests.schedules.linear_cases import (
    HOST,
    check,
    random_keep,
    random_layer,
    run,
    spec_of,
)

GATED = Epilogue(activation="silu", gated=True)


def sparse(bits: int, dtype: ActivationDtype) -> LinearSpec:
    """Describe some layer."""
    return LinearSpec(4, 64, "bsr", f"int{bits}", 16, 7, activation_dtype=dtype)


# Kernels differ by these; patterns, values and token counts vary within each (one compilation).
CASES: dict[str, tuple[int, int, int, dict[str, Any]]] = {
    "plain": (37, 13, 16, {}),
    "plain_int8": (37, 13, 16, {"activation_dtype": "int8"}),
    "g8": (5, 3, 8, {}),
    "g8_int8": (11, 21, 8, {"activation_dtype": "int8"}),
    "g32_norm": (19, 5, 32, {"norm_eps": 1e-5}),
    "g32_int8": (7, 5, 32, {"activation_dtype": "int8"}),
    "g128_int8": (9, 2, 128, {"activation_dtype": "int8"}),
    "g64_int8_norm": (6, 3, 64, {"norm_eps": 1e-6, "activation_dtype": "int8"}),
    "g128_bias": (9, 2, 128, {"epilogue": Epilogue(bias=True)}),
    "g256_int8": (70, 2, 256, {"activation_dtype": "int8"}),
    "g256": (3, 1, 256, {}),
    "gated_all": (
        38,
        40,
        16,
        {
            "norm_eps": 1e-5,
            "epilogue": Epilogue(bias=True, activation="gelu_tanh", gated=True, residual=True),
        },
    ),
    "gated_int8": (150, 4, 16, {"epilogue": GATED, "activation_dtype": "int8"}),
    "gelu": (8, 4, 16, {"epilogue": Epilogue(activation="gelu", residual=True)}),
    "relu_bias": (8, 4, 16, {"epilogue": Epilogue(bias=True, activation="relu")}),
    "one_row": (1, 1, 16, {"epilogue": Epilogue(residual=True)}),
    "plain_int16": (37, 13, 16, {"activation_dtype": "int16"}),
    "g8_int16_norm": (11, 21, 8, {"norm_eps": 1e-5, "activation_dtype": "int16"}),
    "g32_int16": (7, 5, 32, {"activation_dtype": "int16"}),
    "g64_int16": (9, 3, 64, {"activation_dtype": "int16"}),
    "g256_int16_bias": (
        70,
        2,
        256,
        {"epilogue": Epilogue(bias=True), "activation_dtype": "int16"},
    ),
    "gated_all_int16": (
        38,
        40,
        16,
        {
            "norm_eps": 1e-5,
            "epilogue": Epilogue(bias=True, activation="silu", gated=True, residual=True),
            "activation_dtype": "int16",
        },
    ),
    "one_row_int16": (1, 1, 16, {"activation_dtype": "int16"}),
}
DTYPES: tuple[ActivationDtype, ...] = ("float32", "int8", "int16")
RULES = [
    rule
    for rule in rules_for(HOST)
    if any(rule.applies(sparse(bits, dtype), HOST) for bits in BITS for dtype in DTYPES)
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test with every rule, and with the cases or activations that the rule runs."""
    if "int8_rule" in metafunc.fixturenames:
        rules = [rule for rule in RULES if runs(rule, "int8")]
        metafunc.parametrize("int8_rule", rules, ids=[rule.name for rule in rules])
        return
    second = next((n for n in ("case", "activation_dtype") if n in metafunc.fixturenames), None)
    if second is None:
        metafunc.parametrize("rule", RULES, ids=[rule.name for rule in RULES])
        return
    dtypes = {dtype: dtype for dtype in DTYPES}
    if second == "case":
        dtypes = {
            name: fields.get("activation_dtype", "float32") for name, (*_, fields) in CASES.items()
        }
    pairs = [(rule, n) for rule in RULES for n, dtype in dtypes.items() if runs(rule, dtype)]
    every = second == "case" or "lanes" in metafunc.fixturenames
    metafunc.parametrize(
        ("rule", second),
        [
            pytest.param(
                rule,
                name,
                id=f"{rule.name}-{name}",
                marks=pytest.mark.slow if every and not is_quick(rule, name) else (),
            )
            for rule, name in pairs
        ],
    )


def is_quick(rule: ScheduleRule[Any], name: str) -> bool:
    """Say whether a pair of a rule and a case, or of activations, is among the quick tests.

    Rules of one kind differ by how they unpack codes: those of 4 bits see every case, the others
    what differs most.
    """
    return 4 in bits_of(rule) or name in (*ALL_TILES, *MOST_DIFFERENT, exact_dtype(rule))


def runs(rule: ScheduleRule[Any], dtype: ActivationDtype) -> bool:
    """Say whether a rule runs layers with such activations."""
    return any(rule.applies(sparse(bits, dtype), HOST) for bits in BITS)


def bits_of(rule: ScheduleRule[Any]) -> list[int]:
    """List the bits of the codes that a rule runs."""
    return [b for b in BITS if any(rule.applies(sparse(b, dtype), HOST) for dtype in DTYPES)]


def exact_dtype(rule: ScheduleRule[Any]) -> ActivationDtype:
    """Return the activations that a rule loses least with."""
    return "float32" if runs(rule, "float32") else "int16"


ALL_TILES = ("plain", "plain_int8", "gated_all", "plain_int16", "gated_all_int16")
MOST_DIFFERENT = ("g8", "g8_int8", "g256", "g256_int8", "g8_int16_norm", "g256_int16_bias")
FEW_TILES = (2, 4)
TOKENS = st.sampled_from([1, 2, 3, 4, 5, 8, 9, 12, 13, 16, 17, 24, 25, 31, 33, 64, 65])


@settings(max_examples=4, deadline=None)
@given(
    m=TOKENS,
    seed=st.integers(0, 2**32 - 1),
    density=st.sampled_from([0.0, 0.05, 0.5, 0.7, 0.95]),
    data=st.data(),
)
def test_matches_the_reference(
    rule: ScheduleRule[Any], case: str, m: int, seed: int, density: float, data: st.DataObject
) -> None:
    n, groups, size, fields = CASES[case]
    rng = np.random.default_rng(seed)
    keep = random_keep((n, groups), rng, density)
    keep[rng.integers(n), rng.integers(groups)] = False  # all kept is another kernel
    layer = random_layer(keep, size, rng, bits=data.draw(st.sampled_from(bits_of(rule))))
    x = rng.standard_normal((m, layer.shape[1])).astype(np.float32)
    tiles = None if case in ALL_TILES else FEW_TILES
    check(rule, spec_of(layer, **fields), [layer], x, rng, tiles)


@settings(max_examples=4, deadline=None)
@given(
    n=st.integers(1, 90),
    groups=st.integers(1, 40),
    size=st.sampled_from([8, 16, 32]),
    m=st.integers(1, 600),
    symmetric=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
    data=st.data(),
)
def test_any_shape(
    rule: ScheduleRule[Any],
    n: int,
    groups: int,
    size: int,
    m: int,
    symmetric: bool,
    seed: int,
    data: st.DataObject,
) -> None:
    rng = np.random.default_rng(seed)
    bits = data.draw(st.sampled_from(bits_of(rule)))
    keep = random_keep((n, groups), rng, 0.6)
    layer = random_layer(keep, size, rng, symmetric=symmetric, bits=bits)
    x = rng.standard_normal((m, layer.shape[1])).astype(np.float32)
    spec = spec_of(layer, activation_dtype=exact_dtype(rule))
    check(rule, spec, [layer], x, rng, (8,))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("m", [1, pytest.param(7, marks=pytest.mark.slow), 20])
def test_all_groups_kept(
    rule: ScheduleRule[Any], activation_dtype: str, symmetric: bool, m: int
) -> None:
    rng = np.random.default_rng(m)
    for bits in bits_of(rule):
        layer = random_layer(np.ones((10, 18), bool), 16, rng, symmetric=symmetric, bits=bits)
        x = rng.standard_normal((m, 288)).astype(np.float32)
        spec = spec_of(layer, activation_dtype=activation_dtype)
        check(rule, spec, [layer], x, rng, FEW_TILES)


@pytest.mark.parametrize("m", [1, 7])
@pytest.mark.parametrize("size", [pytest.param(8, marks=pytest.mark.slow), 32])
def test_the_largest_codes_and_activations(
    rule: ScheduleRule[Any], activation_dtype: str, m: int, size: int
) -> None:
    """Products as large as can be, of one sign, at both ends of the zero points."""
    rng = np.random.default_rng(m)
    for bits in bits_of(rule):
        top = 2**bits - 1
        layer = random_layer(random_keep((6, 9), rng, 0.7), size, rng, bits=bits)
        high = rng.random(layer.nnz) < 0.5
        codes = np.broadcast_to(np.where(high, top, 0)[:, None], (layer.nnz, size))
        layer = replace(
            layer,
            qweight=pack_codes(codes.astype(np.uint8), bits),
            qzeros=pack_codes(np.where(high, 0, top).astype(np.uint8), bits),
        )
        x = np.full((m, 9 * size), -3.0, np.float32)
        x[:, : 4 * size] = 3.0
        spec = spec_of(layer, activation_dtype=activation_dtype)
        check(rule, spec, [layer], x, rng, FEW_TILES)


@pytest.mark.parametrize("m", [1, 7])
def test_every_bits_without_zero_points(
    rule: ScheduleRule[Any], activation_dtype: str, m: int
) -> None:
    for bits in bits_of(rule):
        rng = np.random.default_rng(bits)
        keep = random_keep((21, 11), rng, 0.5)
        layer = random_layer(keep, 16, rng, symmetric=True, bits=bits)
        x = rng.standard_normal((m, 176)).astype(np.float32)
        spec = spec_of(layer, activation_dtype=activation_dtype)
        check(rule, spec, [layer], x, rng, FEW_TILES)


@pytest.mark.parametrize(
    "scales", [pytest.param((6e-8, 1e-6), marks=pytest.mark.slow), (1e4, 6e4), (6e-8, 6e4)]
)
def test_extreme_scales(
    rule: ScheduleRule[Any], activation_dtype: str, scales: tuple[float, float]
) -> None:
    rng = np.random.default_rng(0)
    keep = random_keep((37, 13), rng, 0.5)
    layer = random_layer(keep, 16, rng, scales=scales, bits=bits_of(rule)[-1])
    for m in (1, 6):
        x = (rng.standard_normal((m, 208)) * 10.0 ** rng.integers(-6, 6, 208)).astype(np.float32)
        check(rule, spec_of(layer, activation_dtype=activation_dtype), [layer], x, rng)


def test_a_single_group_in_all_and_zero_activations(
    rule: ScheduleRule[Any], activation_dtype: str
) -> None:
    rng = np.random.default_rng(0)
    keep = np.zeros((37, 13), bool)
    keep[20, 12] = True
    layer = random_layer(keep, 16, rng, bits=bits_of(rule)[-1])
    x = np.zeros((3, 208), np.float32)
    x[1, -1] = 3.0
    check(rule, spec_of(layer, activation_dtype=activation_dtype), [layer], x, rng)


@pytest.mark.parametrize("m", [1, 10])
def test_folded_layers_one_of_them_symmetric(rule: ScheduleRule[Any], m: int) -> None:
    rng = np.random.default_rng(5)
    bits = bits_of(rule)[0]
    parts = [
        random_layer(random_keep((16, 4), rng, 0.5), 16, rng, symmetric=symmetric, bits=bits)
        for symmetric in (False, True)
    ]
    dtype = exact_dtype(rule)
    fields = spec_of(parts[0], epilogue=GATED, activation_dtype=dtype).__dict__
    nnz = sum(p.nnz for p in parts)
    spec = type(spec_of(parts[0]))(**{**fields, "n": 32, "nnz": nnz, "symmetric": False})
    x = rng.standard_normal((m, 64)).astype(np.float32)
    check(rule, spec, parts, x, rng, FEW_TILES)


@pytest.mark.parametrize("symmetric", [False, True])
def test_an_index_beyond_16_bits_with_its_zero_point(
    rule: ScheduleRule[Any], symmetric: bool
) -> None:
    rng = np.random.default_rng(1)
    keep = rng.random((2, 5000)) < 0.3
    keep[:, 4999] = True
    layer = random_layer(keep, 8, rng, symmetric=symmetric, bits=bits_of(rule)[-1])
    x = rng.standard_normal((1, 40000)).astype(np.float32)
    spec = spec_of(layer, activation_dtype=exact_dtype(rule))
    check(rule, spec, [layer], x, rng, FEW_TILES)


@pytest.mark.parametrize(
    "size",
    [8, pytest.param(16, marks=pytest.mark.slow), pytest.param(64, marks=pytest.mark.slow), 256],
)
@pytest.mark.parametrize("m", [1, 6])
def test_int8_scales_belong_to_eight_columns(
    int8_rule: ScheduleRule[Any], size: int, m: int
) -> None:
    """A large value costs its own block's precision only, whatever the group size."""
    rng = np.random.default_rng(size)
    layer = random_layer(np.ones((3, 512 // size), bool), size, rng, bits=bits_of(int8_rule)[-1])
    x = np.where(np.arange(512) % 127 % 3, 1.0, -1.0).astype(np.float32)[None].repeat(m, 0)
    for block in range(0, 64, 2):
        x[:, 8 * block : 8 * block + 8] *= 1e4  # every value is +- its block's peak: no rounding
    spec = spec_of(layer, activation_dtype="int8")
    exact = x.astype(np.float64) @ reference.decode(layer).T
    magnitude = np.abs(x.astype(np.float64)) @ np.abs(reference.decode(layer)).T
    assert np.all(
        np.abs(reference.linear(spec, reference.decode(layer), x) - exact) <= 1e-6 * magnitude
    )
    check(int8_rule, spec, [layer], x, rng, FEW_TILES)


@pytest.mark.parametrize("threads", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_any_number_of_threads(rule: ScheduleRule[Any], threads: int) -> None:
    rng = np.random.default_rng(2)
    layer = random_layer(random_keep((37, 13), rng, 0.5), 16, rng, bits=bits_of(rule)[-1])
    configure = tvm.get_global_func("runtime.config_threadpool")
    configure(1, threads)
    try:
        for m in (1, 30):
            x = rng.standard_normal((m, 208)).astype(np.float32)
            check(rule, spec_of(layer, activation_dtype=exact_dtype(rule)), [layer], x, rng)
    finally:
        configure(1, 0)


@pytest.mark.skipif(HOST.arch != "x86_64", reason="this machine cannot run x86 code")
@pytest.mark.parametrize(
    ("lanes", "size"),
    [
        (4, 8),
        (8, 16),
        (16, 32),
        pytest.param(4, 16, marks=pytest.mark.slow),
        pytest.param(8, 32, marks=pytest.mark.slow),
    ],
)
def test_layouts_of_narrower_vectors(
    rule: ScheduleRule[Any], activation_dtype: str, lanes: int, size: int
) -> None:
    target = parse_target("x86-64-v4" if lanes == 16 else "x86-64-v3")
    if lanes == 4:  # NEON's layout, on a CPU without float16 conversion
        target = replace(target, cpu="x86-64-v2", features=())
    elif not set(target.features) <= set(HOST.features):
        pytest.skip(f"this machine cannot run {target.name} code")
    assert target.vector_bits == 32 * lanes
    rng = np.random.default_rng(size)
    keep = random_keep((37, 13), rng, 0.5)
    layer = random_layer(keep, size, rng, scales=(1e-7, 6e4), bits=bits_of(rule)[-1])
    spec = spec_of(layer, activation_dtype=activation_dtype)
    for m in (1, 6):
        x = rng.standard_normal((m, spec.k)).astype(np.float32)
        check(rule, spec, [layer], x, rng, FEW_TILES, target)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("tokens", [1, pytest.param(3, marks=pytest.mark.slow), 30])
@pytest.mark.parametrize("name", ["cpu", "x86-64-v3"])
def test_a_token_that_is_not_finite_stays_so(
    rule: ScheduleRule[Any], name: str, tokens: int, value: float
) -> None:
    """A model that is broken must not look healthy."""
    target = parse_target(name)
    rng = np.random.default_rng(0)
    layer = random_layer(random_keep((9, 5), rng, 0.9), 16, rng, bits=bits_of(rule)[-1])
    spec = spec_of(layer, activation_dtype=exact_dtype(rule))
    x = rng.standard_normal((tokens, layer.shape[1])).astype(np.float32)
    x[0] = value
    out = run(rule, spec, [layer], x, target=target, tiles=FEW_TILES)
    kept = np.diff(layer.indptr) > 0
    assert not np.isfinite(out[0, kept]).any()
    assert np.isfinite(out[1:]).all()
