"""Streams of bits against numpy's bits, one at a time, and against bytes written by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gqsa_compiler.checkpoint import pack_codes, unpack_codes
from gqsa_compiler.checkpoint.bits import packed_size
from gqsa_compiler.limits import BITS


@pytest.mark.parametrize(
    ("bits", "values", "packed"),
    [
        (4, [], []),
        (4, [3], [0x03]),
        (4, [1, 2], [0x21]),
        (4, [1, 2, 15], [0x21, 0x0F]),
        (2, [1, 2, 3, 0, 3], [0b00_11_10_01, 0b11]),
        (3, [1, 2, 7, 4, 5, 6, 0, 3], [0b11_010_001, 0b0_101_100_1, 0b011_000_11]),
        (3, [7], [7]),
        (8, [1, 255, 0], [1, 255, 0]),
    ],
)
def test_known_bytes(bits: int, values: list[int], packed: list[int]) -> None:
    result = pack_codes(np.array(values, np.uint8), bits)
    assert result.dtype == np.uint8
    assert result.tolist() == packed
    assert unpack_codes(result, bits, len(values)).tolist() == values


@given(
    bits=st.sampled_from(BITS),
    rows=st.integers(0, 3),
    count=st.integers(0, 40),
    seed=st.integers(0, 2**32 - 1),
)
def test_there_and_back(bits: int, rows: int, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 1 << bits, (rows, count), dtype=np.uint8)
    packed = pack_codes(values, bits)
    assert packed.shape == (rows, packed_size(count, bits))
    single = np.unpackbits(values[..., None], axis=-1, count=bits, bitorder="little")
    stream = single.reshape(rows, count * bits)
    assert np.array_equal(packed, np.packbits(stream, axis=-1, bitorder="little"))
    unpacked = unpack_codes(packed, bits, count)
    assert unpacked.dtype == np.uint8
    assert np.array_equal(unpacked, values)
