"""The packed records of the x86 kernels, read back byte by byte."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gqsa_compiler.checkpoint import BSRLayer
from gqsa_compiler.errors import CompileError
from gqsa_compiler.limits import BITS, GROUP_SIZES
from gqsa_compiler.schedules.generic.config import GenericConfig
from gqsa_compiler.schedules.generic.layout import row_order
from gqsa_compiler.schedules.records.layout import Records, output_block, pack, stored
from gqsa_compiler.schedules.reference import decode
from gqsa_compiler.schedules.spec import Epilogue, LinearSpec
from tests.schedules.linear_cases import random_keep, random_layer, spec_of

CONFIG = GenericConfig(tasks=5, lanes=16, tiles=(4, 16))
GATED = Epilogue(activation="silu", gated=True)


def unpacked(spec: LinearSpec, packed: dict[str, Any]) -> np.ndarray:
    """Decode packed tensors to the stored rows, float64 [N, K], one code at a time."""
    records = Records.of(spec)
    chunks, size = records.chunks, spec.group_size
    units = packed["records"].reshape(-1, records.size)
    dense = np.zeros((spec.n, spec.k + size))
    for row in range(spec.n):
        if records.full:
            begin = row * records.row_units(spec)
            end = begin + records.row_units(spec)
        else:
            begin, end = packed["row_starts"][row : row + 2]
        factor = 1.0 if records.half_scales else float(packed["factors"][row])
        column = 0
        for unit in units[begin:end]:
            for g in range(chunks.groups):
                if records.full:
                    here = min(column, spec.k // size)  # what fills up lies beyond the row
                    column += 1
                else:
                    step = unit[records.steps_at + g]
                    column += int(step) >> 4 if records.zeros_in_steps else int(step)
                    here = column
                scale = scale_of(records, unit, g) * factor
                zero = zero_of(records, spec, unit, g)
                for element in range(size):
                    place = g * size + element
                    chunk, inside = divmod(place, chunks.fields * chunks.lanes)
                    field, lane = divmod(inside, chunks.lanes)
                    byte = int(unit[chunk * chunks.lanes + lane])
                    code = byte >> (chunks.bits * field) & ((1 << chunks.bits) - 1)
                    dense[row, here * size + element] += (code - zero) * scale
    assert not dense[:, spec.k :].any()
    return dense[:, : spec.k]


def scale_of(records: Records, unit: np.ndarray, group: int) -> float:
    scales = unit[records.scales_at : records.steps_at]
    if records.half_scales:
        return float(scales.view(np.float16)[group])
    root = float(scales.view(np.int8 if records.symmetric else np.uint8)[group])
    return root * abs(root)


def zero_of(records: Records, spec: LinearSpec, unit: np.ndarray, group: int) -> int:
    if records.symmetric:
        return 1 << (spec.bits - 1)
    if records.zeros_in_steps:
        return int(unit[records.steps_at + group]) & 15
    if records.zero_bytes == records.chunks.groups and records.chunks.bits == 8:
        return int(unit[records.zeros_at + group])
    half = records.zero_bytes
    byte = int(unit[records.zeros_at + group % half])
    return byte >> 4 if group >= half else byte & 15


def shuffled(layer: BSRLayer, rng: np.random.Generator) -> BSRLayer:
    """Turn the sign of some scales: what other quantisers write."""
    scales = layer.scales * rng.choice([-1, 1], layer.nnz).astype(np.float16)
    return BSRLayer(**{**layer.__dict__, "scales": scales})


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    size=st.sampled_from(GROUP_SIZES),
    groups=st.integers(1, 40),
    density=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    symmetric=st.booleans(),
    gated=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_records_hold_what_they_should(
    bits: int, size: int, groups: int, density: float, symmetric: bool, gated: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    keep = random_keep((6, groups), rng, density)
    if density == 1.0:
        keep[:] = True
    layer = shuffled(random_layer(keep, size, rng, bits=bits, symmetric=symmetric), rng)
    spec = spec_of(layer, activation_dtype="int16", epilogue=GATED if gated else Epilogue())
    packed = pack(spec, CONFIG, [layer])
    for param in Records.of(spec).params(spec, CONFIG):
        array = packed[param.name]
        assert (param.shape in (array.shape, (None,)), str(array.dtype)) == (True, param.dtype)
    want = stored(spec, layer)[row_order(spec)]
    np.testing.assert_allclose(unpacked(spec, packed), want, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(("symmetric", "limit"), [(False, 255), (True, 127)])
def test_scales_are_rounded_to_the_nearest_square(symmetric: bool, limit: int) -> None:
    rng = np.random.default_rng(1)
    keep = np.ones((40, 16), bool)
    layer = random_layer(keep, 16, rng, symmetric=symmetric, scales=(1e-4, 1e-1))
    spec = spec_of(layer)
    error = np.abs(stored(spec, layer) - decode(layer)).reshape(40, 16, 16)
    scales = layer.scales.astype(np.float64).reshape(40, 16, 1)
    largest = scales.max(1, keepdims=True)
    # Between c^2 and (c + 1)^2 the middle is c + 1/2 from both, in units of the largest / limit^2.
    step = largest / limit**2
    codes = np.abs(layer.codes().astype(float) - layer.zeros()[:, None]).reshape(40, 16, 16)
    assert np.all(error <= codes * step * (np.sqrt(scales / step) + 1.0) * (1 + 1e-6))
    # And next to nothing where it counts.
    assert error.max() < 15 * largest.max() / limit


def test_8_bit_codes_keep_their_scales() -> None:
    rng = np.random.default_rng(2)
    layer = random_layer(random_keep((7, 5), rng, 0.5), 64, rng, bits=8, symmetric=True)
    np.testing.assert_array_equal(stored(spec_of(layer), layer), decode(layer))


@pytest.mark.parametrize(
    ("bits", "size", "density", "symmetric", "expected"),
    [
        (4, 16, 0.5, False, 80),
        (4, 16, 0.5, True, 80),
        (2, 16, 0.5, False, 48),
        (4, 16, 1.0, False, 76),
        (4, 32, 1.0, False, 140),
        (4, 32, 1.0, True, 136),
        (8, 64, 1.0, True, 528),
        (8, 16, 0.5, False, 160),
    ],
)
def test_bits_of_a_group(
    bits: int, size: int, density: float, symmetric: bool, expected: int
) -> None:
    rng = np.random.default_rng(3)
    keep = np.ones((8, 16), bool) if density == 1.0 else random_keep((8, 16), rng, density)
    layer = random_layer(keep, size, rng, bits=bits, symmetric=symmetric)
    records = Records.of(spec_of(layer))
    assert records.size * 8 / records.chunks.groups == expected


def test_a_layer_of_no_groups_has_one_record() -> None:
    rng = np.random.default_rng(4)
    layer = random_layer(np.zeros((3, 4), bool), 16, rng)
    packed = pack(spec_of(layer), CONFIG, [layer])
    assert packed["records"].size == Records.of(spec_of(layer)).size
    assert not packed["row_starts"].any()


@pytest.mark.parametrize(("outputs", "block"), [(1, 1), (5, 4), (8, 8), (100, 8)])
def test_tasks_begin_at_whole_blocks(outputs: int, block: int) -> None:
    rng = np.random.default_rng(5)
    layer = random_layer(random_keep((outputs, 9), rng, 0.6), 16, rng)
    spec = spec_of(layer)
    assert output_block(spec) == block
    cuts = pack(spec, CONFIG, [layer])["task_units"]
    assert (cuts[0], cuts[-1]) == (0, outputs)
    assert not (cuts[:-1][cuts[:-1] < outputs] % block).any()


def test_other_groups_than_the_kernel_was_built_for_are_refused() -> None:
    rng = np.random.default_rng(6)
    layer = random_layer(random_keep((4, 9), rng, 0.6), 16, rng)
    other = random_layer(random_keep((4, 9), rng, 0.3), 16, rng)
    with pytest.raises(CompileError, match="kernel was built for"):
        pack(spec_of(layer), CONFIG, [other])
