"""Packing: the layout's sizes, the balance of the tasks, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gqsa_compiler.errors import CompileError
from gqsa_compiler.schedules.generic.config import GenericConfig
from gqsa_compiler.schedules.generic.layout import (
    BLOCK,
    BsrLayout,
    int8_order,
    nibble_order,
    pack_bsr,
    row_order,
    split_units,
)
from gqsa_compiler.schedules.spec import ACTIVATION_BLOCK, Epilogue, LinearSpec
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


def test_a_group_of_16_takes_96_bits() -> None:
    rng = np.random.default_rng(0)
    layer = random_layer(random_keep((64, 32), rng, 0.5), 16, rng)
    packed = pack_bsr(spec_of(layer), CONFIG, [layer])
    spare = BLOCK * (8 + 2 + 2)
    group_bytes = sum(packed[name].nbytes for name in ("codes", "scales", "meta")) - spare
    assert group_bytes * 8 == 96 * layer.nnz


@pytest.mark.parametrize(
    ("groups", "symmetric", "full", "expected"),
    [
        (4096, False, False, "uint16"),
        (4097, False, False, "uint32"),
        (65536, True, False, "uint16"),
        (100, False, True, "uint8"),
        (100, True, True, None),
    ],
)
def test_index_and_zero_share_the_smallest_integer(
    groups: int, symmetric: bool, full: bool, expected: str | None
) -> None:
    spec = LinearSpec(2, 8 * groups, "bsr_int4", "int4", 8, 2 * groups if full else 1, symmetric)
    layout = BsrLayout.of(spec, CONFIG)
    assert layout.meta == expected
    names = [p.name for p in layout.params(spec, CONFIG)]
    assert ("row_starts" in names) is not full
    assert ("meta" in names) is (expected is not None)


@pytest.mark.parametrize("size", [8, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("lanes", [4, 8, 16])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_nibbles_are_a_permutation(size: int, lanes: int, dtype: str) -> None:
    config = replace(CONFIG, lanes=lanes)
    spec = LinearSpec(1, size, "bsr_int4", "int4", size, 1, activation_dtype=dtype)  # type: ignore[arg-type]
    order = nibble_order(spec, BsrLayout.of(spec, config))
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
    spec = LinearSpec(
        6, 16, "bsr_int4", "int4", 16, 6, epilogue=Epilogue(activation="silu", gated=True)
    )
    assert row_order(spec).tolist() == [0, 3, 1, 4, 2, 5]


def test_parts_that_do_not_fit_the_spec_are_refused() -> None:
    rng = np.random.default_rng(0)
    layer = random_layer(random_keep((8, 4), rng, 0.5), 16, rng, name="model.q_proj")
    spec = spec_of(layer)
    with pytest.raises(CompileError, match=r"model\.q_proj.*groups"):
        pack_bsr(replace(spec, nnz=spec.nnz + 1), CONFIG, [layer])
    with pytest.raises(CompileError, match=r"model\.q_proj.*columns"):
        pack_bsr(replace(spec, k=128), CONFIG, [layer])
    with pytest.raises(CompileError, match="without zeros"):
        pack_bsr(replace(spec, symmetric=True), CONFIG, [layer])
