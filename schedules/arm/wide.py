"""Many tokens: rows are decoded to bfloat16, absent groups and all, and multiplied by tiles.

`bfmmla` multiplies two rows with two tokens at once, which rows of different groups cannot share.
Decoding some rows to dense ones, once for all tokens, lets them: twice the products, at a fraction
of the instructions. `smmla` would do the same with bytes, but then every group's sums have to be
converted and scaled before they are added up.
"""

from __future__ import annotations

from dataclasses import dataclass

from gqsa_compiler._tvm import B
from gqsa_compiler.schedules.arm import bfloat16
from gqsa_compiler.schedules.arm.dot import COLUMNS, LANES
from gqsa_compiler.schedules.arm.weights import Weights
from gqsa_compiler.schedules.generic.emit import (
    Buffer,
    Expr,
    broadcast,
    cast,
    const,
    int64,
    load,
    local,
    pick,
    store,
)
from gqsa_compiler.schedules.generic.epilogue import Outputs
from gqsa_compiler.schedules.generic.prologue import token_values
from gqsa_compiler.schedules.spec import LinearSpec

TILE = 8
"""Tokens of a tile."""
ROWS = 8
"""Rows decoded together: with a tile's tokens, 16 of the 32 registers are sums."""
LEAST = 32
"""Tokens from which this is quicker than the kernels that skip absent groups."""
_FOUR = 2 * ROWS
"""int32 that four columns of eight rows, or of eight tokens, take."""


@dataclass(frozen=True)
class WideInputs:
    """Activations as bfloat16 in tiles.

    Columns 4q to 4q + 3 of token t of tile i are at ``((i * K / 4 + q) * TILE + t) * 2``.

    Parameters
    ----------
    fours : Buffer
        int32, two bfloat16 in each.
    tiles : Expr
        int64.
    """

    fours: Buffer
    tiles: Expr


def prepare_wide(spec: LinearSpec, x: Buffer, norm: Buffer | None, tokens: Expr) -> WideInputs:
    """Emit the norm and the rounding of all tokens; what pads the last tile is zero."""
    tiles = B.bind(B.floordiv(tokens + int64(TILE - 1), int64(TILE)))
    size = spec.k // LANES * _FOUR
    fours = B.alloc_buffer((tiles * int64(size),), "int32")
    with B.parallel(int64(0), tiles * int64(TILE)) as token:
        tile = B.floordiv(token, int64(TILE))
        at = B.bind(tile * int64(size) + B.floormod(token, int64(TILE)) * int64(2))
        with B.If(token < tokens):
            with B.Then():
                value = token_values(spec, x, norm, token, LANES)
                with B.serial(int64(0), int64(spec.k // LANES)) as i:
                    words = bfloat16.rounded(B.bind(value(i * int64(LANES))))
                    store(fours, words, at + i * int64(_FOUR), lanes=2)
            with B.Else(), B.serial(int64(0), int64(spec.k // LANES)) as i:
                store(fours, broadcast(const(0, "int32"), 2), at + i * int64(_FOUR), lanes=2)
    return WideInputs(fours, tiles)


def wide(weights: Weights, inputs: WideInputs, outputs: Outputs, start: Expr, end: Expr) -> None:
    """Emit the output features from `start` to `end` for all tokens; at least `ROWS` rows."""
    spec = weights.spec
    rows = 2 if spec.epilogue.gated else 1
    units = ROWS // rows
    columns = spec.k + weights.overhang
    decoded = B.alloc_buffer((columns // LANES * _FOUR,), "int32")
    blocks = B.bind(B.floordiv(end - start + int64(units - 1), int64(units)))
    with B.serial(int64(0), blocks) as i:
        # The last block of a layer may take outputs in again that the one before it has.
        unit = B.bind(B.min(start + i * int64(units), int64(spec.n_out - units)))
        first = B.bind(unit * int64(rows))
        if not weights.records.full:
            with B.serial(int64(0), int64(columns // LANES * _FOUR // LANES)) as j:
                none = broadcast(const(0, "int32"), LANES)
                store(decoded, none, j * int64(LANES), lanes=LANES)
        with B.serial(int64(0), int64(ROWS)) as r:
            _decode(weights, B.bind(first + r), decoded, B.bind(r * int64(2)))
        with B.serial(int64(0), inputs.tiles) as tile:
            sums = _multiply(spec, inputs, decoded, tile)
            outputs.finish_block(sums, unit, tile * int64(TILE), TILE, units)


def _decode(weights: Weights, row: Expr, decoded: Buffer, base: Expr) -> None:
    """Emit the decoding of a stored row to where the first of its columns is `base`."""
    column = local(1, "int64")
    store(column, int64(0), 0)
    factor = B.bind(broadcast(weights.factor(row), weights.chunks.groups))
    begin, end = weights.row(row)
    with B.serial(int64(0), end - begin) as i:
        record = weights.start(begin + i)
        scales = B.bind(weights.unit_scales(record) * factor)
        columns = weights.unit_columns(record, i, column)
        for v, codes in enumerate(weights.unit_codes(record)):
            _place(weights, codes, v, columns, scales, decoded, base)


def _place(
    weights: Weights,
    codes: Expr,
    v: int,
    columns: list[Expr],
    scales: Expr,
    decoded: Buffer,
    base: Expr,
) -> None:
    """Emit the stores of a vector's 16 codes times their scales."""
    chunks = weights.chunks
    groups = chunks.groups_of(v, COLUMNS)
    inside = COLUMNS // len(groups)
    for four in range(0, COLUMNS, LANES):
        group = groups[four // inside]
        whole = cast("int32", pick([codes], range(four, four + LANES)), LANES)
        scale = weights.spread(scales, [group], LANES)
        words = bfloat16.rounded(B.bind(cast("float32", whole, LANES) * scale))
        first = chunks.column_of(v, COLUMNS) + four % inside
        # Eight int32 for each pair of columns.
        at = base + columns[group] * int64(_FOUR // 2) + int64(first // LANES * _FOUR)
        store(decoded, words, at, lanes=2)


def _multiply(spec: LinearSpec, inputs: WideInputs, decoded: Buffer, tile: Expr) -> Buffer:
    """Emit the dot products with a tile's tokens: local float32 [ROWS * TILE]."""
    pairs = ROWS // 2
    blocks = local(ROWS * TILE)
    for i in range(0, ROWS * TILE, LANES):
        store(blocks, broadcast(const(0.0, "float32"), LANES), i, lanes=LANES)
    origin = B.bind(tile * int64(spec.k // LANES * _FOUR))
    with B.serial(int64(0), int64(spec.k // LANES)) as i:
        at = B.bind(i * int64(_FOUR))
        rows = [B.bind(load(decoded, at + int64(p * LANES), lanes=LANES)) for p in range(pairs)]
        tokens = [
            B.bind(load(inputs.fours, origin + at + int64(p * LANES), lanes=LANES))
            for p in range(pairs)
        ]
        for r, row in enumerate(rows):
            for t, token in enumerate(tokens):
                slot = (r * pairs + t) * LANES
                total = bfloat16.multiply(load(blocks, slot, lanes=LANES), row, token)
                store(blocks, total, slot, lanes=LANES)
    sums = local(ROWS * TILE)
    for r in range(ROWS):
        parts = [
            B.bind(load(blocks, (r // 2 * pairs + t) * LANES + r % 2 * 2, lanes=2))
            for t in range(pairs)
        ]
        store(sums, pick(parts, range(TILE)), r * TILE, lanes=TILE)
    return sums
