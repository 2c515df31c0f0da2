"""The packed stream: bytes, bank conflicts, balance, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gqsa_compiler.errors import CompileError, UsageError
from gqsa_compiler.schedules.cuda import config as configs
from gqsa_compiler.schedules.cuda.arch import ARCHES, arch_of
from gqsa_compiler.schedules.cuda.config import CudaConfig, shared_bytes
from gqsa_compiler.schedules.cuda.layout import (
    StreamLayout,
    large_scales,
    pack_words,
    place_groups,
    small_scales,
)
from gqsa_compiler.schedules.cuda.pack import pack, params, stored_scales
from gqsa_compiler.schedules.cuda.partition import INFO, SLACK, cut_stream
from gqsa_compiler.schedules.spec import Epilogue
from tests.schedules.linear_cases import random_keep, random_layer, spec_of

CONFIG = CudaConfig(blocks=132)
SIZES = (8, 16, 32, 64, 128, 256)
LAYOUTS = [StreamLayout(size, bits) for size in SIZES for bits in (2, 4, 8) if size * bits > 16]


@pytest.mark.parametrize(
    ("bits", "symmetric", "scale_bits", "expected"),
    [
        (4, False, 16, 96),
        (4, False, 8, 88),
        (2, False, 16, 64),
        (8, False, 16, 176),
        (8, True, 16, 160),
    ],
)
def test_bits_of_a_group_of_16(bits: int, symmetric: bool, scale_bits: int, expected: int) -> None:
    """And one for the marks, 64 for each row; the rows' last units add up to 4 % here."""
    rng = np.random.default_rng(0)
    keep = rng.random((512, 128)) < 0.5
    layer = random_layer(keep, 16, rng, bits=bits, symmetric=symmetric)
    config = replace(CONFIG, blocks=4, scale_bits=scale_bits)  # type: ignore[arg-type]
    packed = pack(spec_of(layer), config, [layer])
    unread = ("arrivals", "partials", "blocks", "slabs")
    read = [name for name in packed if name not in unread]
    bits = 8 * sum(packed[name].nbytes for name in read)
    assert expected * layer.nnz < bits < 1.04 * (expected + 1.5) * layer.nnz


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
def test_every_group_has_a_place_of_its_own(layout: StreamLayout, density: float) -> None:
    rng = np.random.default_rng(layout.group_size)
    keep = random_keep((23, 37), rng, density)
    starts = np.concatenate([[0], np.cumsum(keep.sum(1))])
    columns = np.nonzero(keep)[1]
    unit, piece = place_groups(layout, starts, columns)
    counts = np.diff(starts)
    units = layout.units_of(counts)
    rows = np.repeat(np.arange(23), counts)
    assert np.all(unit + layout.span <= units[rows])
    assert np.all((piece >= 0) & (piece < layout.pieces))
    assert len(set(zip(rows, unit, piece, strict=True))) == len(columns)
    assert np.all(units >= 1)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_lanes_that_read_together_find_different_banks(layout: StreamLayout) -> None:
    """Of a full row no two of eight neighbouring lanes read the same 16 of 128 bytes."""
    columns = np.arange(4096 // layout.group_size)
    unit, piece = place_groups(layout, np.array([0, len(columns)]), columns)
    column = np.zeros((4096 // layout.unit, layout.pieces), np.int64)
    for part in range(layout.span):
        column[unit + part, piece] = columns * layout.span + part
    lanes = np.arange(len(column)) % 32
    for p in range(layout.pieces):
        for chunk in range(layout.chunks):
            turn = layout.rotation(lanes) ^ chunk
            slot = (column[:, p] * layout.chunks + turn) % 8
            for start in range(0, len(slot) - 7):
                assert len(set(slot[start : start + 8])) == 8


@pytest.mark.parametrize("density", [0.3, 0.5, 0.8])
def test_pruned_rows_have_few_conflicts(density: float) -> None:
    """Random columns in their own order would make eight lanes wait 2.3 turns on average."""
    rng = np.random.default_rng(1)
    layout = StreamLayout(16)
    keep = rng.random((64, 256)) < density
    starts = np.concatenate([[0], np.cumsum(keep.sum(1))])
    columns = np.nonzero(keep)[1]
    unit, piece = place_groups(layout, starts, columns)
    begins = np.concatenate([[0], np.cumsum(layout.units_of(np.diff(starts)))])
    column = np.full((begins[-1], 2), -1)
    column[begins[np.repeat(np.arange(64), np.diff(starts))] + unit, piece] = columns
    turns = []
    for p in range(2):
        for start in range(0, len(column) - 7, 8):
            lanes = np.arange(start, start + 8) % 32
            slot = (column[start : start + 8, p] * 2 + layout.rotation(lanes)) % 8
            turns.append(np.bincount(slot[column[start : start + 8, p] >= 0], minlength=8).max())
    assert np.mean(turns) < 1.5


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_words_hold_the_chunks_in_the_lanes_order(layout: StreamLayout) -> None:
    rng = np.random.default_rng(2)
    mask = (1 << layout.code_bits) - 1
    codes = rng.integers(0, mask + 1, (64, layout.piece), dtype=np.uint8)
    lanes = np.arange(64) % 32
    words = pack_words(layout, codes, lanes)
    assert words.shape == (64, 4 // layout.pieces)
    for i in range(64):
        for chunk in range(layout.chunks):
            at = (chunk ^ layout.rotation(lanes[i : i + 1])[0]) * 8
            for element in range(8):
                word, bit = layout.place_of(chunk, element)
                assert words[i, word] >> bit & mask == codes[i, at + element]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_one_mask_takes_a_pair_of_halves_or_four_bytes(bits: int) -> None:
    layout = StreamLayout(16, bits)
    for chunk in range(2):
        for pair in range(4):
            low, high = (layout.place_of(chunk, 2 * pair + i) for i in range(2))
            assert (low[0], low[1] + 16) == high
            assert low[1] % 8 + bits <= 10, "within a half's mantissa, shifted by 8 bits or not"
        for elements in ((0, 4, 1, 5), (2, 6, 3, 7)):
            places = [layout.place_of(chunk, element) for element in elements]
            word, bit = places[0]
            assert places == [(word, bit + 8 * i) for i in range(4)]


def test_which_layout_a_layer_has() -> None:
    spec = spec_of(random_layer(np.ones((2, 4), bool), 16, np.random.default_rng(0)))
    for bits, size, expected in ((2, 16, 2), (2, 8, 4), (3, 16, 4), (4, 16, 4), (8, 16, 8)):
        layout = StreamLayout.of(replace(spec, weight_dtype=f"int{bits}", group_size=size))
        assert (layout.group_size, layout.code_bits) == (size, expected)


@settings(max_examples=60, deadline=None)
@given(
    units=st.lists(st.integers(1, 90), min_size=1, max_size=300),
    blocks=st.integers(1, 40),
    gated=st.booleans(),
    span=st.sampled_from([1, 2, 8]),
)
def test_a_stream_is_cut_evenly(units: list[int], blocks: int, gated: bool, span: int) -> None:
    rows = 2 if gated else 1
    array = np.array(units * rows) * span
    most_rows = -(-2 * len(array) // blocks) + 2
    cut = cut_stream(array, rows, blocks, most_rows, span)
    starts = np.concatenate([[0], np.cumsum(array)])
    assert (cut.cuts[0], cut.cuts[-1]) == (0, starts[-1])
    assert np.all(np.diff(cut.cuts) >= 0)
    assert np.all(cut.cuts % span == 0)
    info = cut.info
    assert info.shape == (blocks, INFO)
    for b in range(blocks):
        begin, end = cut.cuts[b : b + 2]
        assert info[b, 1] - info[b, 0] == -(-(end - begin) // 32)
        if begin == end:
            continue
        touched = np.flatnonzero((starts[:-1] < end) & (starts[1:] > begin))
        assert info[b, 2:4].tolist() == [touched[0], touched[-1]]
        assert len(touched) <= most_rows
        first, last = touched[0] // rows, touched[-1] // rows
        shared = [
            [
                c
                for c in range(blocks)
                if cut.cuts[c] < starts[(o + 1) * rows]
                and cut.cuts[c + 1] > starts[o * rows]
                and cut.cuts[c] < cut.cuts[c + 1]
            ]
            for o in (first, last)
        ]
        assert info[b, 4:6].tolist() == [shared[0][0], shared[0][-1]]
        through = first == last and shared[0][0] < b
        assert info[b, 6] == (b if through else shared[1][-1])


def test_equal_rows_are_not_cut_and_blocks_are_even() -> None:
    rng = np.random.default_rng(3)
    units = rng.integers(58, 71, 4096)
    cut = cut_stream(units, 1, 132, 512, 1)
    assert np.all(cut.info[:, 4] == np.arange(132))
    assert np.all(cut.info[:, 6] == np.arange(132))
    assert np.diff(cut.cuts).max() <= SLACK * units.sum() / 132


def test_a_block_never_has_too_many_rows() -> None:
    """Rows of one unit beside rows of many: groups alone would give one block most of the rows."""
    units = np.concatenate([np.full(3000, 1), np.full(40, 500)])
    cut = cut_stream(units, 1, 16, 512, 1)
    assert (cut.info[:, 3] - cut.info[:, 2]).max() < 512


def test_scales_of_8_bits_are_near() -> None:
    rng = np.random.default_rng(4)
    scales = np.exp(rng.uniform(-7, -3, 500)).astype(np.float16)
    rows = np.sort(rng.integers(0, 20, 500))
    scales[3] = 0
    codes, factors = small_scales(scales, rows, 21)
    values = (codes.astype(np.uint16) << 5).view(np.float16) * factors[rows].astype(np.float64)
    assert values[3] == 0
    assert factors[20] == 0
    assert np.all(np.abs(values - scales) <= scales / 63)


def test_scales_of_16_bits_are_exact() -> None:
    rng = np.random.default_rng(4)
    scales = np.exp(rng.uniform(-7, 9, 500)).astype(np.float16) * rng.choice([-1, 1], 500)
    scales = scales.astype(np.float16)
    rows = np.sort(rng.integers(0, 20, 500))
    halves, factors = large_scales(scales, rows, 21)
    assert np.abs(halves).max() < 2
    values = halves.astype(np.float64) * factors[rows]
    exact = np.abs(halves) >= 2.0**-14
    assert exact.mean() > 0.5
    np.testing.assert_array_equal(values[exact], scales[exact].astype(np.float64))
    assert np.all(np.abs(values - scales) <= 2.0**-25 * factors[rows])


def test_negative_scales_need_16_bits() -> None:
    rng = np.random.default_rng(5)
    layer = random_layer(np.ones((4, 4), bool), 16, rng, name="model.q_proj")
    layer = replace(layer, scales=-layer.scales)
    small = replace(CONFIG, scale_bits=8)
    with pytest.raises(CompileError, match=r"model\.q_proj with scales of 8 bits.*with 16"):
        pack(spec_of(layer), small, [layer])
    np.testing.assert_array_equal(stored_scales(CONFIG, layer), layer.scales.astype(np.float64))


def test_parts_that_do_not_fit_the_spec_are_refused() -> None:
    rng = np.random.default_rng(6)
    layer = random_layer(np.ones((4, 4), bool), 16, rng, name="model.q_proj")
    with pytest.raises(CompileError, match=r"model\.q_proj.*groups"):
        pack(replace(spec_of(layer), nnz=3), CONFIG, [layer])


def test_gated_rows_are_neighbours() -> None:
    """The stored rows are gate 0, up 0, gate 1 ...: their units say so."""
    keep = np.zeros((6, 8), bool)
    for row, count in enumerate((2, 4, 6, 3, 5, 7)):
        keep[row, :count] = True
    layer = random_layer(keep, 16, np.random.default_rng(7))
    spec = replace(spec_of(layer), epilogue=Epilogue(activation="silu", gated=True))
    packed = pack(spec, CONFIG, [layer])
    assert np.diff(packed["row_units"])[:5].tolist() == [1, 2, 2, 3, 3]


@pytest.mark.parametrize("name", ARCHES)
def test_configurations_fit_the_gpu(name: str) -> None:
    rng = np.random.default_rng(8)
    layer = random_layer(np.ones((4, 4), bool), 16, rng)
    spec = replace(spec_of(layer), k=14336, activation_dtype="int16")
    arch = arch_of(name)
    space = configs.space(spec, arch)
    assert len(set(space)) == len(space) > 1
    for config in space:
        assert config.threads <= 1024
        assert config.blocks % arch.processors == 0
        for tile in configs.tiles_of(spec, config, arch):
            assert shared_bytes(spec, config, tile) <= arch.shared_bytes
        dtypes = {p.name: p.dtype for p in params(spec, config)}
        assert dtypes["scales"] == {8: "uint16", 16: "uint32"}[config.scale_bits]
    with pytest.raises(UsageError, match=r"'sm_70'.*sm_80"):
        arch_of("sm_70")
