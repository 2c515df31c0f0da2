"""Many tokens: rows are decoded to bfloat16, absent groups and all, and multiplied by tiles.

A sparse row's products with many tokens are bound by the activations, which each group has to
fetch for itself. Decoding some rows to dense ones, once for all tokens, lets every vector of
activations meet all of these rows: twice the products, at four times the speed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gqsa_compiler._tvm import B
from gqsa_compiler.schedules.generic.config import GenericConfig
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
from gqsa_compiler.schedules.x86 import bfloat16
from gqsa_compiler.schedules.x86.config import ROWS
from gqsa_compiler.schedules.x86.weights import Weights

TILE = 32
"""Tokens of a tile: two vectors of sums for each row."""
LINE = 16
"""Tokens whose pairs of a column share a cache line."""


@dataclass(frozen=True)
class WideInputs:
    """Activations as bfloat16 in tiles.

    Columns 2p and 2p + 1 of token t of tile i, a pair, are at ``(i * K / 2 + p) * TILE + t``.

    Parameters
    ----------
    pairs : Buffer
        int32.
    tiles : Expr
        int64.
    """

    pairs: Buffer
    tiles: Expr


def row_block(spec: LinearSpec, rows: int = ROWS) -> int:
    """Return how many stored rows are decoded together: `rows`, or fewer where there are fewer."""
    return min(rows, 1 << (spec.n.bit_length() - 1))


def prepare_wide(
    spec: LinearSpec, config: GenericConfig, x: Buffer, norm: Buffer | None, tokens: Expr
) -> WideInputs:
    """Emit the norm and the rounding of all tokens; what pads the last tile is zero."""
    half = spec.k // 2
    tiles = B.bind(B.floordiv(tokens + int64(TILE - 1), int64(TILE)))
    pairs = B.alloc_buffer((tiles * int64(half * TILE),), "int32")
    lanes = min(config.lanes, spec.group_size)
    # One thread writes the tokens that share lines.
    with B.parallel(int64(0), tiles * int64(TILE // LINE)) as part:
        first = B.bind(part * int64(LINE))
        at = B.bind(
            B.floordiv(part, int64(TILE // LINE)) * int64(half * TILE)
            + B.floormod(part, int64(TILE // LINE)) * int64(LINE)
        )
        count = B.bind(B.max(int64(0), B.min(int64(LINE), tokens - first)))
        with B.If(count < int64(LINE)), B.Then(), B.serial(int64(0), int64(half)) as pair:
            zeros = broadcast(const(0, "int32"), LINE)
            store(pairs, zeros, at + pair * int64(TILE), lanes=LINE)
        with B.serial(int64(0), count) as i:
            value = token_values(spec, x, norm, B.bind(first + i), lanes)
            _write(pairs, at + i, value, spec.k, lanes)
    return WideInputs(pairs, tiles)


def _write(pairs: Buffer, at: Expr, value: Callable[[Expr], Expr], k: int, lanes: int) -> None:
    """Emit a token's pairs of columns, each `TILE` after the other."""
    with B.serial(int64(0), int64(k // lanes)) as i:
        floats = B.bind(value(i * int64(lanes)))
        if lanes < bfloat16.LANES:
            floats = B.bind(pick([floats] * (bfloat16.LANES // lanes), range(bfloat16.LANES)))
        words = pick([B.bind(bfloat16.rounded(floats, floats))], range(lanes // 2))
        start = at + i * int64(lanes // 2 * TILE)
        B.buffer_store(pairs, words, [B.ramp(start, const(TILE, "int64"), lanes // 2)])


def wide(
    weights: Weights, inputs: WideInputs, block: int, outputs: Outputs, start: Expr, end: Expr
) -> None:
    """Emit the output features from `start` to `end` for all tokens, `block` rows at a time."""
    spec = weights.spec
    rows = 2 if spec.epilogue.gated else 1
    units = block // rows
    decoded = _Decoded.allocate(weights, block)
    blocks = B.bind(B.floordiv(end - start + int64(units - 1), int64(units)))
    with B.serial(int64(0), blocks) as i:
        # The last block of a layer may take outputs in again that the one before it has.
        unit = B.bind(B.min(start + i * int64(units), int64(spec.n_out - units)))
        first = B.bind(unit * int64(rows))
        with B.serial(int64(0), int64(block)) as r:
            decoded.decode(weights, B.bind(first + r), r)
        with B.serial(int64(0), inputs.tiles) as tile:
            sums = decoded.multiply(spec, inputs, tile, block)
            outputs.finish_block(sums, unit, tile * int64(TILE), TILE, units)


@dataclass(frozen=True)
class _Decoded:
    """Some rows as dense bfloat16: int32 [rows, stride], a pair of columns in each."""

    pairs: Buffer
    stride: int

    @classmethod
    def allocate(cls, weights: Weights, rows: int) -> _Decoded:
        """Emit the allocation, which is a task's; more than 1 kB, or it is on the stack."""
        stride = (weights.spec.k + weights.overhang + 31) // 32 * 16
        return cls(B.alloc_buffer((max(rows * stride, 512),), "int32"), stride)

    def decode(self, weights: Weights, row: Expr, place: Expr) -> None:
        """Emit the decoding of a stored row to row `place`."""
        base = B.bind(place * int64(self.stride))
        if not weights.records.full:
            with B.serial(int64(0), int64(self.stride // 16)) as i:
                zeros = broadcast(const(0, "int32"), 16)
                store(self.pairs, zeros, base + i * int64(16), lanes=16)
        column = local(1, "int64")
        store(column, int64(0), 0)
        factor = B.bind(broadcast(weights.factor(row), weights.chunks.groups))
        begin, end = weights.row(row)
        with B.serial(int64(0), end - begin) as i:
            self._unit(weights, weights.start(begin + i), i, column, factor, base)

    def _unit(
        self,
        weights: Weights,
        record: Expr,
        place: Expr,
        column: Buffer,
        factor: Expr,
        base: Expr,
    ) -> None:
        chunks, half = weights.chunks, bfloat16.LANES
        scales = B.bind(weights.unit_scales(record) * factor)
        columns = weights.unit_columns(record, place, column)
        size = min(weights.spec.group_size, chunks.lanes)
        for v, codes in enumerate(weights.unit_codes(record)):
            floats = []
            for start in (0, half):
                part = cast(
                    "float32", cast("int32", pick([codes], range(start, start + half)), half), half
                )
                groups = chunks.groups_of(v * 2 + start // half, half)
                floats.append(B.bind(part * weights.spread(scales, groups, half)))
            words = B.bind(bfloat16.rounded(floats[0], floats[1]))
            inside = chunks.column_of(v, chunks.lanes) // 2
            for piece, group in enumerate(chunks.groups_of(v, chunks.lanes)):
                wide_piece = pick([words], range(piece * size // 2, (piece + 1) * size // 2))
                at = base + columns[group] + int64(inside)
                store(self.pairs, wide_piece, at, lanes=size // 2)

    def multiply(self, spec: LinearSpec, inputs: WideInputs, tile: Expr, rows: int) -> Buffer:
        """Emit the dot products with a tile's tokens: local float32 [rows * TILE]."""
        lanes, vectors = bfloat16.LANES, TILE // bfloat16.LANES
        sums = local(rows * TILE)
        for i in range(rows * vectors):
            store(sums, broadcast(const(0.0, "float32"), lanes), i * lanes, lanes=lanes)
        origin = B.bind(tile * int64(spec.k // 2 * TILE))
        with B.serial(int64(0), int64(spec.k // 2)) as pair:
            at = B.bind(origin + pair * int64(TILE))
            values = [
                B.bind(load(inputs.pairs, at + int64(v * lanes), lanes=lanes))
                for v in range(vectors)
            ]
            for r in range(rows):
                word = B.bind(broadcast(load(self.pairs, pair + int64(r * self.stride)), lanes))
                for v in range(vectors):
                    slot = (r * vectors + v) * lanes
                    total = bfloat16.dot(load(sums, slot, lanes=lanes), values[v], word)
                    store(sums, total, slot, lanes=lanes)
        return sums
