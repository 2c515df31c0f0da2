"""The outputs of one token, and the dot products of a sparse row with a tile of tokens."""

from __future__ import annotations

from gqsa_compiler._tvm import B
from gqsa_compiler.schedules.arm.activations import Inputs
from gqsa_compiler.schedules.arm.dot import (
    COLUMNS,
    LANES,
    dot_bytes,
    dot_halves,
    high_part,
    sum_neighbours,
    zero_counts,
)
from gqsa_compiler.schedules.arm.scratch import BLOCK_CODES
from gqsa_compiler.schedules.arm.weights import Weights
from gqsa_compiler.schedules.generic.emit import (
    Buffer,
    Expr,
    broadcast,
    cast,
    const,
    horizontal_sums,
    int64,
    load,
    local,
    pick,
    prefetch,
    store,
)
from gqsa_compiler.schedules.generic.epilogue import Outputs
from gqsa_compiler.schedules.generic.math import fma
from gqsa_compiler.schedules.records.layout import output_block

AHEAD = 1024
"""Bytes between a record that is multiplied and one that is asked for."""


def one_token(weights: Weights, inputs: Inputs, outputs: Outputs, start: Expr, end: Expr) -> None:
    """Emit the output features from `start` (a multiple of `output_block`) to `end`.

    Lanes are columns within a group and groups within a unit.
    """
    spec = weights.spec
    block = output_block(spec)
    rows = 2 if spec.epilogue.gated else 1
    blocks = B.bind(B.floordiv(end - start + int64(block - 1), int64(block)))
    scale = B.bind(load(inputs.scales, int64(0)))
    with B.serial(int64(0), blocks) as i:
        # The last block of a layer may take outputs in again that the one before it has.
        unit = B.bind(B.min(start + i * int64(block), int64(spec.n_out - block)))
        first = B.bind(unit * int64(rows))
        partial = local(rows * block * LANES)
        together = min(weights.rows_together, rows * block)
        with B.serial(int64(0), int64(rows * block // together)) as turn:
            r = B.bind(turn * int64(together))
            for j, total in enumerate(_rows(weights, inputs, B.bind(first + r), together)):
                # Gate and up rows take turns; their sums are put apart.
                row = B.bind(r + int64(j))
                place = B.floordiv(row, int64(rows)) + B.floormod(row, int64(rows)) * int64(block)
                store(partial, total, place * int64(LANES), lanes=LANES)
        values = []
        for part in range(rows):
            total = _reduced(partial, part * block, block)
            shared = load(weights.constants, first, lanes=rows * block)
            if weights.factors is not None:
                factor = load(weights.factors, first, lanes=rows * block)
                total = B.bind(total * _every(factor, part, rows, block))
            if weights.as_bytes:
                total = total + _every(shared, part, rows, block)
            values.append(B.bind(total * broadcast(scale, block)))
        outputs.finish_one_token(values, unit, block)


def _every(values: Expr, part: int, rows: int, block: int) -> Expr:
    """Take the values of the gate rows, or of the up rows, of an output block."""
    return values if rows == 1 else pick([B.bind(values)], range(part, rows * block, rows))


def _reduced(partial: Buffer, first: int, count: int) -> Expr:
    """Emit the sums of the lanes of `count` vectors: float32 of as many lanes."""
    vectors = [B.bind(load(partial, (first + j) * LANES, lanes=LANES)) for j in range(count)]
    if count <= LANES:
        return horizontal_sums(vectors, LANES)[0][0]
    parts = [v for v, _ in horizontal_sums(vectors, LANES)]
    return B.bind(pick(parts, range(count)))


def _rows(weights: Weights, inputs: Inputs, first: Expr, count: int) -> list[Expr]:
    """Emit the products of stored rows with the only token: float32x4 each, still to be summed.

    Several rows share what they load of the activations, so they must have all groups.
    """
    totals = [local(LANES) for _ in range(count)]
    for total in totals:
        store(total, broadcast(const(0.0, "float32"), LANES), 0, lanes=LANES)
    place = local(1, "int64")
    store(place, inputs.address() if inputs.as_bytes else int64(0), 0)
    bounds = [weights.row(B.bind(first + int64(j))) for j in range(count)]
    with B.serial(int64(0), bounds[0][1] - bounds[0][0]) as i:
        records = [weights.start(begin + i) for begin, _ in bounds]
        if inputs.as_bytes:
            places = weights.unit_addresses(records[0], i, place)
        else:
            places = weights.unit_columns(records[0], i, place)
        near = _near(weights, inputs, places)
        for record, total in zip(records, totals, strict=True):
            prefetch(weights.bytes, record + int64(AHEAD))
            scales = weights.unit_scales(record)
            _unit(weights, inputs, weights.unit_codes(record), near, scales, total)
    return [B.bind(load(total, 0, lanes=LANES)) for total in totals]


def _near(weights: Weights, inputs: Inputs, places: list[Expr]) -> list[tuple[Expr, ...]]:
    """Emit the loads of the activations of each of a unit's vectors of codes."""
    chunks, full = weights.chunks, weights.records.full
    then_step = not full and chunks.group_size == COLUMNS
    result = []
    for v in range(weights.count):
        groups = [places[g] for g in chunks.groups_of(v, COLUMNS)]
        result.append(inputs.near(groups, chunks.column_of(v, COLUMNS), then_step=then_step))
    return result


def _unit(
    weights: Weights,
    inputs: Inputs,
    codes: list[Expr],
    near: list[tuple[Expr, ...]],
    scales: Expr,
    totals: Buffer,
) -> None:
    """Emit the products of a unit's groups, added to `totals`."""
    chunks = weights.chunks
    run = max(1, chunks.group_size // COLUMNS)
    sums, groups = [], []
    for start in range(0, len(codes), run):
        parts = zip(codes[start : start + run], near[start : start + run], strict=True)
        sums.append(_products(inputs, list(parts)))
        of = chunks.groups_of(start, COLUMNS)
        groups += [of[i * len(of) // LANES] for i in range(LANES)]
    for value, lanes in sum_neighbours(sums, groups):
        factors = weights.spread(scales, lanes, LANES)
        total = fma(cast("float32", value, LANES), factors, load(totals, 0, lanes=LANES))
        store(totals, total, 0, lanes=LANES)


def _products(inputs: Inputs, parts: list[tuple[Expr, tuple[Expr, ...]]]) -> Expr:
    """Emit the products of vectors of codes with their columns: int32x4."""
    sums = zero_counts()
    if not inputs.as_bytes:
        for codes, (halves,) in parts:
            sums = dot_halves(sums, codes, halves, COLUMNS)
        return sums
    for codes, (high, _) in parts:
        sums = dot_bytes(sums, codes, high)
    sums = high_part(sums)
    for codes, (_, low) in parts:
        sums = dot_bytes(sums, codes, low)
    return sums


def row_sums(
    weights: Weights, inputs: Inputs, row: Expr, token: Expr, tile: int, sums: Buffer, at: Expr
) -> None:
    """Emit the dot products of a stored row with `tile` tokens, into ``sums[at:at + tile]``.

    Lanes are tokens: codes are copied to all lanes and meet the same columns of all tokens.

    Parameters
    ----------
    token : Expr
        int64, first token of the tile.
    """
    chunks = weights.chunks
    totals = local(tile)
    for v in range(0, tile, LANES):
        store(totals, broadcast(const(0.0, "float32"), LANES), v, lanes=LANES)
    column = local(1, "int64")
    store(column, int64(0), 0)
    begin, end = weights.row(row)
    origin = B.bind(token * int64(weights.spec.k // 2))
    units = BLOCK_CODES // (chunks.groups * chunks.group_size)
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
            _group(weights, inputs, B.bind(origin + first * int64(tile)), group, tile, totals)
    factor = B.bind(broadcast(weights.factor(row), LANES))
    shared = B.bind(broadcast(load(weights.constants, row), LANES))
    for v in range(0, tile, LANES):
        value = load(totals, v, lanes=LANES) * factor
        if weights.as_bytes:
            value = value + shared
        store(sums, value * load(inputs.scales, token + int64(v), lanes=LANES), at + v, lanes=LANES)


def _group(
    weights: Weights, inputs: Inputs, origin: Expr, group: Expr, tile: int, totals: Buffer
) -> None:
    """Emit a decoded group's products with a tile of tokens, added to `totals`."""
    scratch, size = inputs.scratch, weights.chunks.group_size
    assert scratch is not None
    counts = local(tile, "int32")
    for v in range(0, tile, LANES):
        store(counts, zero_counts(), v, lanes=LANES)
    if inputs.as_bytes:
        _group_bytes(inputs, origin, group, tile, size, counts)
    else:
        _group_halves(inputs, origin, group, tile, size, counts)
    factor = B.bind(broadcast(load(scratch.scales, group), LANES))
    for v in range(0, tile, LANES):
        value = cast("float32", load(counts, v, lanes=LANES), LANES)
        store(totals, fma(value, factor, load(totals, v, lanes=LANES)), v, lanes=LANES)


def _group_bytes(
    inputs: Inputs, origin: Expr, group: Expr, tile: int, size: int, counts: Buffer
) -> None:
    scratch = inputs.scratch
    assert scratch is not None
    fours = min(LANES, size // 4)

    def some(part: int, run: Expr) -> None:
        """Multiply the codes of a run of up to 16 columns with their high or low bytes."""
        word = load(scratch.codes, group * int64(size // 4) + run * int64(fours), lanes=fours)
        words = B.bind(word)
        for four in range(fours):
            lanes = B.bind(pick([words] * (LANES // fours), [four] * LANES))
            codes = B.reinterpret("int8x16", lanes)
            for v in range(0, tile, LANES):
                place = origin + (run * int64(fours) + int64(four)) * int64(2 * tile)
                x = load(inputs.values, place + int64(part * tile + v), lanes=LANES)
                bytes_ = B.bind(B.reinterpret("int8x16", x))
                total = dot_bytes(load(counts, v, lanes=LANES), bytes_, codes)
                store(counts, total, v, lanes=LANES)

    for part in range(2):
        if size <= COLUMNS:
            some(part, int64(0))
        else:
            with B.serial(int64(0), int64(size // COLUMNS)) as run:
                some(part, run)
        if part == 0:
            for v in range(0, tile, LANES):
                store(counts, high_part(load(counts, v, lanes=LANES)), v, lanes=LANES)


def _group_halves(
    inputs: Inputs, origin: Expr, group: Expr, tile: int, size: int, counts: Buffer
) -> None:
    scratch = inputs.scratch
    assert scratch is not None
    step = min(8, size)
    with B.serial(int64(0), int64(size // step)) as run:
        codes = B.bind(load(scratch.codes, group * int64(size) + run * int64(step), lanes=step))
        for c in range(step):
            one = B.bind(pick([codes], [c] * LANES))
            for v in range(0, tile, LANES):
                place = origin * int64(2) + (run * int64(step) + int64(c)) * int64(tile)
                x = B.bind(load(inputs.values, place + int64(v), lanes=LANES))
                total = dot_halves(load(counts, v, lanes=LANES), x, one, LANES)
                store(counts, total, v, lanes=LANES)
