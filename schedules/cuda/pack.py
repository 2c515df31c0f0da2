"""Packs checkpoint layers into the tensors of the sparse rules (`layout` says how they lie).

=========== ======================= ==========================================================
tensor      dtype, extent
=========== ======================= ==========================================================
codes       uint32 [units * 4]      16 bytes a unit
index       uint16 or uint32        16 bits a piece (or a group, if that is larger): column << 4 |
                                    zero point; codes of 8 bits: the column, or, in 32 bits,
                                    column << 8 | zero point
scales      uint8, 16 or 32         8 or 16 bits a piece (a group)
starts      uint32 [tiles]          bit l: unit l of the tile is the first one of a row
tile_rows   int32 [tiles]           the stored row of the tile's first unit
row_units   int32 [N + 1]           first unit of each stored row
slabs       uint32 [N * slabs]      units from the row's first on that have all its groups in each
                                    256 columns: the first, and past the last << 16
blocks      int32 [blocks * 8]      `partition.INFO`
row_scales  float32 [N]             what a stored row's scales are multiplied by
arrivals    uint32 [blocks]         zeros; a running kernel counts in it and leaves zeros
partials    float32 [blocks * ...]  zeros; a running kernel's
=========== ======================= ==========================================================

Gated: rows are stored gate 0, up 0, gate 1 ...
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gqsa_compiler.checkpoint import BSRLayer
from gqsa_compiler.errors import CompileError
from gqsa_compiler.schedules.cuda.arch import WARP
from gqsa_compiler.schedules.cuda.config import BLOCK_ROWS, CudaConfig, blocks_of
from gqsa_compiler.schedules.cuda.layout import (
    SLAB,
    StreamLayout,
    large_scales,
    pack_words,
    place_groups,
    small_scales,
)
from gqsa_compiler.schedules.cuda.partition import cut_stream
from gqsa_compiler.schedules.cuda.rows import partial_floats, rows_of_output
from gqsa_compiler.schedules.cuda.weights import Field
from gqsa_compiler.schedules.generic.layout import check_parts, stored_order
from gqsa_compiler.schedules.spec import LinearSpec, ParamSpec

_GROUPS = 1 << 20  # packed at a time: unpacked codes take a byte each

Array = npt.NDArray[Any]


def params(spec: LinearSpec, config: CudaConfig) -> tuple[ParamSpec, ...]:
    """Describe the packed tensors in the kernel's order; most lengths follow from the rows."""
    layout = StreamLayout.of(spec)
    return (
        ParamSpec("codes", (None,), "uint32"),
        ParamSpec("index", (None,), Field(layout.index_bits, layout.pieces).dtype),
        ParamSpec("scales", (None,), Field(config.scale_bits, layout.pieces).dtype),
        ParamSpec("starts", (None,), "uint32"),
        ParamSpec("tile_rows", (None,), "int32"),
        ParamSpec("row_units", (spec.n + 1,), "int32"),
        ParamSpec("slabs", (spec.n * -(-spec.k // SLAB),), "uint32"),
        ParamSpec("blocks", (None,), "int32"),
        ParamSpec("arrivals", (None,), "uint32"),
        ParamSpec("row_scales", (spec.n,), "float32"),
        ParamSpec("partials", (None,), "float32"),
    )


def pack(
    spec: LinearSpec, config: CudaConfig, parts: Sequence[BSRLayer]
) -> dict[str, npt.NDArray[np.generic]]:
    """Pack folded layers into the tensors of `params`.

    Raises
    ------
    CompileError
        The layers do not have the shape, bits, group size or number of groups `spec` says; or
        scales of 8 bits are asked for and some are negative.
    """
    check_parts(spec, parts)
    layout = StreamLayout.of(spec)
    row_starts, source = stored_order(spec, parts)
    counts = np.diff(row_starts)
    columns = np.concatenate([p.indices for p in parts])[source].astype(np.int64)
    scales = np.concatenate([p.scales for p in parts])[source]
    units = layout.units_of(counts)
    begins = np.concatenate([[0], np.cumsum(units)])
    blocks = blocks_of(spec, config, int(begins[-1]))
    partition = cut_stream(units, rows_of_output(spec), blocks, BLOCK_ROWS, layout.span)
    tiles = int(partition.tiles[-1])
    rows = np.repeat(np.arange(spec.n), counts)
    unit, piece = place_groups(layout, row_starts, columns)
    first = partition.place(begins[rows] + unit)
    items = tiles * WARP // layout.span * layout.pieces
    item = first // layout.span * layout.pieces + piece

    index = np.zeros(items, np.uint16 if layout.index_bits == 16 else np.uint32)
    index[item] = columns.astype(index.dtype) << layout.zero_bits
    if layout.zero_bits:
        index[item] |= np.concatenate([p.zeros() for p in parts])[source].astype(index.dtype)
    packed: dict[str, Array] = {
        "codes": _codes(layout, tiles, first, piece, parts, source),
        "index": index.view(Field(layout.index_bits, layout.pieces).dtype),
        "blocks": partition.info.reshape(-1),
        "arrivals": np.zeros(blocks, np.uint32),
        "partials": np.zeros(blocks * partial_floats(spec), np.float32),
    }
    codes, packed["row_scales"] = _scale_codes(config, parts, scales, rows, spec.n)
    stored = np.zeros(items, codes.dtype)
    stored[item] = codes
    packed["scales"] = stored.view(Field(config.scale_bits, layout.pieces).dtype)

    starts = partition.place(begins[:-1])
    packed["slabs"] = _slabs(spec, rows, columns, first - starts[rows], layout.span)
    packed["row_units"] = np.concatenate([starts, [tiles * WARP]]).astype(np.int32)
    marks = np.zeros(tiles, np.uint32)
    np.bitwise_or.at(marks, starts // WARP, np.uint32(1) << (starts % WARP).astype(np.uint32))
    packed["starts"] = marks
    at_tile = np.searchsorted(starts, np.arange(tiles) * WARP, side="right") - 1
    packed["tile_rows"] = at_tile.astype(np.int32)
    return packed


def stored_scales(config: CudaConfig, part: BSRLayer) -> Array:
    """Return a layer's scales as they are packed, float64 [nnz]."""
    rows = np.repeat(np.arange(part.shape[0]), np.diff(part.indptr))
    codes, factors = _scale_codes(config, [part], part.scales, rows, part.shape[0])
    bits = codes if config.scale_bits == 16 else codes.astype(np.uint16) << 5
    return bits.view(np.float16).astype(np.float64) * factors[rows]


def _scale_codes(
    config: CudaConfig, parts: Sequence[BSRLayer], scales: Array, rows: Array, count: int
) -> tuple[Array, Array]:
    """Return the packed scales, uint16 or uint8 [nnz], and the rows' factors, float32."""
    if config.scale_bits == 16:
        halves, factors = large_scales(scales, rows, count)
        return halves.view(np.uint16), factors
    if np.any(scales < 0):
        names = ", ".join(p.name for p in parts)
        raise CompileError(
            f"Cannot pack {names} with scales of 8 bits: some are negative; "
            "choose a configuration with 16."
        )
    return small_scales(scales, rows, count)


def _codes(
    layout: StreamLayout,
    tiles: int,
    first: Array,
    piece: Array,
    parts: Sequence[BSRLayer],
    source: Array,
) -> Array:
    """Pack the codes of all groups, whose first units are `first`; uint32 [units * 4]."""
    words = np.zeros((tiles * WARP, layout.pieces, layout.words), np.uint32)
    codes = np.concatenate([p.codes() for p in parts])
    for start in range(0, len(first), _GROUPS):
        some = slice(start, start + _GROUPS)
        place = (first[some, None] + np.arange(layout.span)).reshape(-1)
        pieces = np.repeat(piece[some], layout.span)
        cut = codes[source[some]].reshape(-1, layout.piece)
        words[place, pieces] = pack_words(layout, cut, place % WARP)
    return words.reshape(-1)


def _slabs(spec: LinearSpec, rows: Array, columns: Array, units: Array, span: int) -> Array:
    """Find the stretch of a row's units that has all its groups in each slab of columns."""
    slabs = -(-spec.k // SLAB)
    place = rows * slabs + columns * spec.group_size // SLAB
    first = np.full(spec.n * slabs, 0xFFFF)
    end = np.zeros(spec.n * slabs, np.int64)
    np.minimum.at(first, place, units)
    np.maximum.at(end, place, units + span)
    if end.max(initial=0) > 0xFFFF:
        raise CompileError(f"A row of {spec.k} inputs has more groups than CUDA kernels take.")
    return (np.minimum(first, end) | end << 16).astype(np.uint32)
