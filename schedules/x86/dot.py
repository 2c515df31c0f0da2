"""The dot products of one sparse row with a tile of tokens."""

from __future__ import annotations

from gqsa_compiler._tvm import B
from gqsa_compiler.schedules.generic.emit import (
    Buffer,
    Expr,
    broadcast,
    cast,
    const,
    horizontal_sums,
    int64,
    lanes_of,
    load,
    local,
    pick,
    prefetch,
    store,
)
from gqsa_compiler.schedules.generic.math import fma
from gqsa_compiler.schedules.x86.activations import Inputs
from gqsa_compiler.schedules.x86.scratch import BLOCK_BYTES
from gqsa_compiler.schedules.x86.weights import Weights

MOST_UNROLLED = 64
"""Multiplications of a group with a tile of tokens that are unrolled; beyond, a loop."""


def row_sums(
    weights: Weights, inputs: Inputs, row: Expr, token: Expr, tile: int, sums: Buffer, at: Expr
) -> None:
    """Emit the dot products of a stored row with `tile` tokens, into ``sums[at:at + tile]``.

    Parameters
    ----------
    token : Expr
        int64, first token of the tile.
    """
    if tile < weights.lanes // 2:
        few_tokens(weights, inputs, row, token, tile, sums, at)
    else:
        many_tokens(weights, inputs, row, token, tile, sums, at)


def multiply_pairs(a: Expr, b: Expr, lanes: int) -> Expr:
    """Multiply int16 vectors and add neighbouring products: int32, half as many lanes.

    LLVM makes one instruction of this: pmaddwd.
    """
    products = B.bind(cast("int32", a, lanes) * cast("int32", b, lanes))
    return pick([products], range(0, lanes, 2)) + pick([products], range(1, lanes, 2))


def few_tokens(
    weights: Weights, inputs: Inputs, row: Expr, token: Expr, tile: int, sums: Buffer, at: Expr
) -> None:
    """Lanes are columns: a unit of codes meets its activations of each token in turn."""
    reduced = lane_sums(weights, inputs, row, token, tile)
    factor = B.bind(weights.factor(row))
    done = 0
    for value, count in horizontal_sums(reduced, weights.lanes // 2):
        scale = load(inputs.scales, token + int64(done), lanes=count) * broadcast(factor, count)
        store(sums, value * scale, at + done, lanes=count)
        done += count


def lane_sums(weights: Weights, inputs: Inputs, row: Expr, token: Expr, tile: int) -> list[Expr]:
    """Emit a stored row's products with each of `tile` tokens, a vector of sums each.

    They are float32, without the scales of the row and of the token.
    """
    chunks = weights.chunks
    lanes, half = weights.lanes, weights.lanes // 2
    vectors = chunks.vectors * chunks.lanes // lanes
    vectors_a_group = max(1, chunks.group_size // lanes)
    # Two sums hide the latency of an addition. AVX2 has registers for both of one token only, and
    # several tokens hide each other's.
    chains = min(2, vectors // vectors_a_group) if tile == 1 or lanes == chunks.lanes else 1
    totals = local(tile * chains * half)
    for i in range(tile * chains):
        store(totals, broadcast(const(0.0, "float32"), half), i * half, lanes=half)
    column = local(1, "int64")
    store(column, int64(0), 0)
    begin, end = weights.row(row)
    with B.serial(int64(0), end - begin) as i:
        record = weights.start(begin + i)
        if weights.ahead:
            prefetch(weights.bytes, record + int64(weights.ahead))
        scales = weights.unit_scales(record)
        codes = _registers(weights.unit_codes(record), lanes)
        columns = weights.unit_columns(record, i, column)
        for t in range(tile):
            base = B.bind((token + int64(t)) * int64(weights.spec.k // 2))
            for run in range(0, vectors, vectors_a_group):
                summed = None
                for vector in range(run, run + vectors_a_group):
                    x = _activations(weights, inputs, vector, columns, base)
                    products = multiply_pairs(codes[vector], x, lanes)
                    summed = B.bind(products if summed is None else summed + products)
                factor = weights.spread(scales, chunks.groups_of(run, lanes), half)
                slot = (t * chains + run // vectors_a_group % chains) * half
                value = cast("float32", summed, half)
                total = fma(value, factor, load(totals, slot, lanes=half))
                store(totals, total, slot, lanes=half)
    reduced = []
    for t in range(tile):
        value = load(totals, t * chains * half, lanes=half)
        for c in range(1, chains):
            value = value + load(totals, (t * chains + c) * half, lanes=half)
        reduced.append(B.bind(value))
    return reduced


def _registers(vectors: list[Expr], lanes: int) -> list[Expr]:
    """Cut the layout's vectors into those of a register."""
    starts = range(0, lanes_of(vectors[0]), lanes)
    if len(starts) == 1:
        return vectors
    return [B.bind(pick([v], range(start, start + lanes))) for v in vectors for start in starts]


def _activations(
    weights: Weights, inputs: Inputs, vector: int, columns: list[Expr], base: Expr
) -> Expr:
    """Emit the activations of a register of codes, int16."""
    chunks, lanes = weights.chunks, weights.lanes
    groups = chunks.groups_of(vector, lanes)
    if len(groups) == 1 or weights.records.full:
        start = columns[groups[0]] + int64(chunks.column_of(vector, lanes) // 2)
        return B.bind(inputs.load(base + start, lanes))
    size = chunks.group_size
    pieces = [inputs.load(base + columns[g], size) for g in groups]
    return B.bind(pick(pieces, range(lanes)))


def many_tokens(
    weights: Weights, inputs: Inputs, row: Expr, token: Expr, tile: int, sums: Buffer, at: Expr
) -> None:
    """Lanes are tokens: a pair of codes is copied to all lanes and meets two columns of each."""
    chunks = weights.chunks
    half = weights.lanes // 2
    vectors = tile // half
    totals = local(tile)
    for v in range(vectors):
        store(totals, broadcast(const(0.0, "float32"), half), v * half, lanes=half)
    column = local(1, "int64")
    store(column, int64(0), 0)
    begin, end = weights.row(row)
    base = B.bind(token * int64(weights.spec.k // 2))
    units = BLOCK_BYTES // (2 * chunks.groups * chunks.group_size)
    scratch = inputs.scratch
    assert scratch is not None
    blocks = B.bind(B.floordiv(end - begin + int64(units - 1), int64(units)))
    with B.serial(int64(0), blocks) as block:
        start = B.bind(block * int64(units))
        count = B.bind(B.min(int64(units), end - begin - start))
        with B.serial(int64(0), count) as i:
            place = B.bind(start + i)
            scratch.decode(weights, weights.start(begin + place), i, place, column)
        with B.serial(int64(0), count * int64(chunks.groups)) as group:
            first = int64(load(scratch.columns, group))
            origin = B.bind(base + first * int64(tile))
            _group(weights, inputs, origin, group, tile, totals)
    shared = B.bind(broadcast(weights.factor(row), half))
    for v in range(vectors):
        scale = load(inputs.scales, token + int64(v * half), lanes=half) * shared
        store(sums, load(totals, v * half, lanes=half) * scale, at + v * half, lanes=half)


def _group(
    weights: Weights, inputs: Inputs, origin: Expr, inside: Expr, tile: int, totals: Buffer
) -> None:
    """Emit a decoded group's products with a tile of tokens, added to `totals`."""
    lanes, size = weights.lanes, weights.chunks.group_size
    half = lanes // 2
    vectors = tile // half
    scratch = inputs.scratch
    assert scratch is not None
    counts = local(tile, "int32")
    for v in range(vectors):
        store(counts, broadcast(const(0, "int32"), half), v * half, lanes=half)
    step = max(1, min(size // 2, MOST_UNROLLED // vectors))

    def some(loop: Expr) -> None:
        for p in range(step):
            pair = B.bind(loop + int64(p))
            word = load(scratch.pairs, inside * int64(size // 2) + pair)
            w = B.bind(B.reinterpret(f"int16x{lanes}", B.Broadcast(word, half)))
            for v in range(vectors):
                place = origin + pair * int64(tile) + int64(v * half)
                x = B.bind(inputs.load(place, lanes))
                count = load(counts, v * half, lanes=half) + multiply_pairs(w, x, lanes)
                store(counts, count, v * half, lanes=half)

    if step == size // 2:
        some(int64(0))
    else:
        with B.serial(int64(0), int64(size // 2 // step)) as outer:
            some(B.bind(outer * int64(step)))
    factor = B.bind(broadcast(load(scratch.scales, inside), half))
    for v in range(vectors):
        value = cast("float32", load(counts, v * half, lanes=half), half)
        total = fma(value, factor, load(totals, v * half, lanes=half))
        store(totals, total, v * half, lanes=half)
