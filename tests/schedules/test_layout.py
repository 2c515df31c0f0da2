"""Packing: the layout's sizes, the balance of the tasks, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gqsa_compiler.checkpoint import unpack_codes
from gqsa_compiler.errors import CompileError
from gqsa_compiler.limits import BITS
from gqsa_compiler.schedules.generic.config import GenericConfig
from gqsa_compiler.schedules.generic.layout import (
    BLOCK,
    BsrLayout,
    check_parts,
    code_order,
    int8_order,
    pack_bsr,
    row_order,
    split_units,
)
from gqsa_compiler.schedules.spec import ACTIVATION_BLOCK, Epilogue, LinearSpec
from gqsa_compiler.schedules.table import select
from gqsa_compiler.targets import parse_target
from tests.schedules.linear_cases import random_keep, random_layer, spec_of

CONFIG = GenericConfig(tasks=8, lanes=16, tiles=(4, 8, 16))


@given(
    costs=st.lists(st.integers(1, 300), max_size=400),
    tasks=st.integers(1, 70),
)
def test_tasks_are_balanced(costs: list[int], tasks: int) -> None:
    array = np.array(costs, np.int64)
    cuts = split_units(array, tasks)
    assert cuts.dtype == np.int32
    assert len(cuts) == tasks + 1
    assert cuts[0] == 0
    assert cuts[-1] == len(costs)
    assert np.all(np.diff(cuts) >= 0)
    shares = [int(array[a:b].sum()) for a, b in pairwise(cuts)]
    largest = max(costs, default=0)
    assert max(shares) <= array.sum() / tasks + largest + 1


@pytest.mark.parametrize(("bits", "expected"), [(2, 64), (3, 96), (4, 96), (8, 160)])
def test_bits_of_a_group_of_16(bits: int, expected: int) -> None:
    """Codes of 3 bits are widened to 4."""
    rng = np.random.default_rng(0)
    layer = random_layer(random_keep((64, 32), rng, 0.5), 16, rng, bits=bits)
    packed = pack_bsr(spec_of(layer), CONFIG, [layer])
    group_bytes = sum(packed[name].nbytes for name in ("codes", "scales", "meta"))
    assert group_bytes * 8 == expected * (layer.nnz + BLOCK)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", [8, 16, 32, 256])
def test_avx2_and_avx512_read_the_same_bytes(bits: int, size: int) -> None:
    rng = np.random.default_rng(bits)
    layer = random_layer(random_keep((24, 6), rng, 0.5), size, rng, bits=bits)
    spec = spec_of(layer, activation_dtype="int16")
    packed = []
    for name in ("x86-64-v3", "x86-64-v4"):
        rule, config = select(spec, parse_target(name))
        packed.append((rule.packed_by(config), rule.pack(spec, config, [layer])))
    assert packed[0][0] == packed[1][0]
    for name, array in packed[0][1].items():
        np.testing.assert_array_equal(array, packed[1][1][name])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_packed_group_holds_the_codes_in_the_kernels_order(bits: int, dtype: str) -> None:
    rng = np.random.default_rng(bits)
    layer = random_layer(random_keep((5, 4), rng, 0.7), 32, rng, bits=bits)
    spec = spec_of(layer, activation_dtype=dtype)
    layout = BsrLayout.of(spec, CONFIG)
    packed = pack_bsr(spec, CONFIG, [layer])["codes"].reshape(layer.nnz + BLOCK, -1)
    codes = unpack_codes(packed[: layer.nnz], layout.code_bits, 32)
    assert np.array_equal(codes, layer.codes()[:, code_order(spec, layout)])
    assert not packed[layer.nnz :].any()


@pytest.mark.parametrize(
    ("dtype", "groups", "symmetric", "full", "expected"),
    [
        ("int4", 4096, False, False, "uint16"),
        ("int4", 4097, False, False, "uint32"),
        ("int3", 4097, False, False, "uint32"),
        ("int2", 16384, False, False, "uint16"),
        ("int2", 16385, False, False, "uint32"),
        ("int8", 256, False, False, "uint16"),
        ("int8", 257, False, False, "uint32"),
        ("int8", 65536, False, False, "uint32"),
        ("int4", 65536, True, False, "uint16"),
        ("int8", 65536, True, False, "uint16"),
        ("int4", 100, False, True, "uint8"),
        ("int8", 100, False, True, "uint8"),
        ("int4", 100, True, True, None),
    ],
)
def test_index_and_zero_share_the_smallest_integer(
    dtype: str, groups: int, symmetric: bool, full: bool, expected: str | None
) -> None:
    spec = LinearSpec(2, 8 * groups, "bsr", dtype, 8, 2 * groups if full else 1, symmetric)
    layout = BsrLayout.of(spec, CONFIG)
    assert layout.meta == expected
    names = [p.name for p in layout.params(spec, CONFIG)]
    assert ("row_starts" in names) is not full
    assert ("meta" in names) is (expected is not None)


@pytest.mark.parametrize("size", [8, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("lanes", [4, 8, 16])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("weight", ["int2", "int4", "int8"])
def test_codes_are_a_permutation(size: int, lanes: int, dtype: str, weight: str) -> None:
    config = replace(CONFIG, lanes=lanes)
    spec = LinearSpec(1, size, "bsr", weight, size, 1, activation_dtype=dtype)  # type: ignore[arg-type]
    order = code_order(spec, BsrLayout.of(spec, config))
    assert sorted(order) == list(range(size))


@pytest.mark.parametrize("size", [8, 16, 32, 256])
@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_int8_bytes_belong_to_one_block_and_blocks_take_turns(size: int, lanes: int) -> None:
    lanes = min(lanes, size // 2)
    blocks = int8_order(size, lanes) // ACTIVATION_BLOCK
    assert np.array_equal(blocks[0::2], blocks[1::2])
    per_chunk = 2 * lanes // ACTIVATION_BLOCK
    chunk, lane = np.divmod(np.arange(size // 2), lanes)
    assert np.array_equal(blocks[0::2], chunk * per_chunk + lane % per_chunk)


def test_gated_rows_are_stored_in_pairs() -> None:
    spec = LinearSpec(6, 16, "bsr", "int4", 16, 6, epilogue=Epilogue(activation="silu", gated=True))
    assert row_order(spec).tolist() == [0, 3, 1, 4, 2, 5]


def test_parts_that_do_not_fit_the_spec_are_refused() -> None:
    rng = np.random.default_rng(0)
    layer = random_layer(random_keep((8, 4), rng, 0.5), 16, rng, name="model.q_proj")
    spec = spec_of(layer)
    with pytest.raises(CompileError, match=r"model\.q_proj.*groups"):
        pack_bsr(replace(spec, nnz=spec.nnz + 1), CONFIG, [layer])
    with pytest.raises(CompileError, match=r"model\.q_proj.*columns"):
        pack_bsr(replace(spec, k=128), CONFIG, [layer])
    with pytest.raises(CompileError, match=r"model\.q_proj: it has codes of 4 bits.*built for 3"):
        pack_bsr(replace(spec, weight_dtype="int3"), CONFIG, [layer])
    with pytest.raises(CompileError, match="without zeros"):
        pack_bsr(replace(spec, symmetric=True), CONFIG, [layer])


@pytest.mark.parametrize("scale", [np.inf, -np.inf, np.nan])
def test_scales_that_are_no_numbers_are_refused(scale: float) -> None:
    rng = np.random.default_rng(0)
    layer = random_layer(random_keep((4, 3), rng, 1.0), 16, rng)
    scales = layer.scales.copy()
    scales[5] = scale
    with pytest.raises(CompileError, match="a scale is infinite or NaN"):
        check_parts(spec_of(layer), [replace(layer, scales=scales)])
