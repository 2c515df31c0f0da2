"""Sparse rows times bytes: a dot product, a multiplication and two loads for a group of 16."""

from __future__ import annotations

from dataclasses import dataclass

from gqsa_compiler._tvm import B
from gqsa_compiler.schedules.arm import address
from gqsa_compiler.schedules.arm.dot import COLUMNS, LANES, dot_bytes, zero_counts
from gqsa_compiler.schedules.arm.narrow_inputs import Rounded, SparseInputs
from gqsa_compiler.schedules.arm.narrow_rows import place
from gqsa_compiler.schedules.arm.narrow_sparse_pack import (
    TOGETHER,
    SparseRecords,
    zero_lanes,
    zero_words,
)
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
    store,
)
from gqsa_compiler.schedules.generic.epilogue import Outputs
from gqsa_compiler.schedules.records.layout import output_block
from gqsa_compiler.schedules.spec import LinearSpec


@dataclass(frozen=True)
class SparseWeights:
    """A layer's packed tensors inside a kernel."""

    spec: LinearSpec
    records: SparseRecords
    bytes: Buffer
    row_starts: Buffer
    factors: Buffer
    zeros: Buffer
    zero_factors: Buffer


def emit_block(
    weights: SparseWeights,
    inputs: SparseInputs,
    outputs: Outputs,
    start: Expr,
    number: Expr,
    token: Expr,
    tile: int,
) -> None:
    """Emit a block of outputs for `tile` tokens, one or four.

    Parameters
    ----------
    start, number
        As `narrow_rows.place` takes them.
    token : Expr
        int64, the first one.
    """
    spec = weights.spec
    block, rows = output_block(spec), 2 if spec.epilogue.gated else 1
    unit, index = place(spec, start, number)
    first = B.bind(unit * int64(rows))
    offsets = _offsets(weights, inputs.sums, index, token, tile)
    width = tile * LANES
    sums = local(rows * block * width, "int32")
    bases = inputs.values.bases(token, tile)
    with B.serial(int64(0), int64(rows * block)) as r:
        totals = _row(weights, bases, B.bind(first + r))
        # Gate and up rows take turns; their sums are put apart.
        at = B.floordiv(r, int64(rows)) + B.floormod(r, int64(rows)) * int64(block)
        at = B.bind(at * int64(width))
        for i, total in enumerate(totals):
            store(sums, total, at + int64(i * LANES), lanes=LANES)
    values: list[list[Expr]] = []
    for part in range(rows):
        factors = _every(weights.factors, first, part, rows, block)
        steps = _every(weights.zero_factors, first, part, rows, block)
        values.append([])
        for t in range(tile):
            total = _reduced(sums, part * block, block, t * LANES, width)
            scale = broadcast(load(inputs.scales, token + int64(t)), block)
            worth = broadcast(load(inputs.sum_scales, token + int64(t)), block)
            value = total * factors * scale - offsets[part][t] * steps * worth
            values[-1].append(B.bind(value))
    if tile == 1:
        outputs.finish_one_token([part[0] for part in values], unit, block)
    else:
        finish(outputs, values, unit, token, tile, block)


def finish(
    outputs: Outputs, values: list[list[Expr]], unit: Expr, token: Expr, tile: int, block: int
) -> None:
    """Emit the epilogue of a block: `values` are float32 vectors of outputs, [part][token]."""
    rows = len(values)
    sums = local(rows * block * tile)
    for part, tokens in enumerate(values):
        for u in range(block):
            lanes = [u + t * block for t in range(tile)]
            found = [tokens[t] if block > 1 else broadcast(tokens[t], 2) for t in range(tile)]
            lanes = lanes if block > 1 else [2 * t for t in range(tile)]
            store(sums, pick(found, lanes), (u * rows + part) * tile, lanes=tile)
    outputs.finish_block(sums, unit, token, tile, block)


def _every(buffer: Buffer, first: Expr, part: int, rows: int, block: int) -> Expr:
    """Load the values of the gate rows, or of the up rows, of an output block."""
    values = B.bind(load(buffer, first, lanes=rows * block))
    if rows == 1:
        return values
    lanes = list(range(part, rows * block, rows))
    return B.bind(pick([values], lanes))


def _reduced(sums: Buffer, first: int, count: int, at: int, width: int) -> Expr:
    """Emit the sums of the lanes of `count` rows' int32x4, as float32."""
    vectors = []
    for j in range(first, first + count):
        vectors.append(B.bind(cast("float32", load(sums, j * width + at, lanes=LANES), LANES)))
    parts = [v for v, _ in horizontal_sums(vectors, LANES)]
    return parts[0] if len(parts) == 1 else B.bind(pick(parts, range(count)))


def _offsets(
    weights: SparseWeights, sums: Rounded, index: Expr, token: Expr, tile: int
) -> list[list[Expr]]:
    """Emit what the zero points take off a block's outputs, float32 vectors: [part][token]."""
    spec = weights.spec
    block, rows = output_block(spec), 2 if spec.epilogue.gated else 1
    lanes, words = zero_lanes(spec), zero_words(spec)
    vectors = lanes // LANES
    count = rows * tile * vectors
    totals = local(count * LANES, "int32")
    for i in range(count):
        store(totals, zero_counts(), i * LANES, lanes=LANES)
    bases = sums.bases(token, tile)
    four = LANES * lanes
    with B.serial(int64(0), int64(words // LANES)) as i:
        near = [address.load_16(base + i * int64(COLUMNS)) for base in bases]
        for part in range(rows):
            begin = index * int64(rows * words * four) + int64(part * words * four)
            begin = B.bind(begin + i * int64(LANES * four))
            for word in range(LANES):
                for v in range(vectors):
                    at = begin + int64(word * four + v * COLUMNS)
                    codes = B.bind(load(weights.zeros, at, lanes=COLUMNS))
                    for t in range(tile):
                        slot = ((part * tile + t) * vectors + v) * LANES
                        old = load(totals, slot, lanes=LANES)
                        total = dot_bytes(old, codes, word_of(near[t], word))
                        store(totals, total, slot, lanes=LANES)
    result: list[list[Expr]] = []
    for part in range(rows):
        result.append([])
        for t in range(tile):
            slot = (part * tile + t) * lanes
            all_ = B.bind(cast("float32", load(totals, slot, lanes=lanes), lanes))
            result[-1].append(all_ if block == lanes else B.bind(pick([all_], range(block))))
    return result


def word_of(vector: Expr, word: int) -> Expr:
    """Copy four bytes of a vector of 16 to all fours: the element of an `sdot` by element."""
    words = B.bind(B.reinterpret("int32x4", vector))
    return B.reinterpret("int8x16", B.bind(pick([words], [word] * LANES)))


def _row(weights: SparseWeights, bases: list[Expr], row: Expr) -> list[Expr]:
    """Emit a stored row's products with each token: int32x4, lanes to be summed."""
    records = weights.records
    count = len(bases)
    running, totals = local(count * LANES, "int32"), local(count * LANES, "int32")
    for i in range(count):
        store(running, zero_counts(), i * LANES, lanes=LANES)
        store(totals, zero_counts(), i * LANES, lanes=LANES)
    begin = B.bind(int64(load(weights.row_starts, row)))
    units = B.bind(int64(load(weights.row_starts, row + int64(1))) - begin)
    first = B.bind(address.address(weights.bytes) + begin * int64(records.size))
    full = B.bind(B.floordiv(units, int64(TOGETHER)))

    def some(at: Expr, number: int) -> None:
        _groups(weights, bases, at, number, running, totals)

    with B.serial(int64(0), full) as i:
        some(B.bind(first + i * int64(TOGETHER * records.size)), TOGETHER)
    done = B.bind(full * int64(TOGETHER))
    rest = B.bind(first + done * int64(records.size))
    with B.serial(int64(0), B.bind(units - done)) as i:
        some(B.bind(rest + i * int64(records.size)), 1)
    return [B.bind(load(totals, i * LANES, lanes=LANES)) for i in range(count)]


def _groups(
    weights: SparseWeights,
    bases: list[Expr],
    at: Expr,
    units: int,
    running: Buffer,
    totals: Buffer,
) -> None:
    """Emit the groups of a record of so many units at an address."""
    records, size = weights.records, weights.spec.group_size
    count = units * records.groups
    steps = address.widened(at + int64(records.steps_at(units)), count)
    columns = records.columns_at(units)
    codes = _codes(weights, at, units)
    inside = size // COLUMNS
    for group in range(count):
        where = at + int64(columns + group * records.index_bytes)
        column = address.index(where, records.index_bytes)
        offset = B.bind(B.shift_left(column, int64(size.bit_length() - 1)))
        step = pick([steps], [group] * LANES)
        for i, base in enumerate(bases):
            total = load(running, i * LANES, lanes=LANES)
            here = base + offset
            for part in range(inside):
                x = address.load_16(here + int64(part * COLUMNS))
                total = dot_bytes(total, codes[group * inside + part], x)
            store(running, total, i * LANES, lanes=LANES)
            added = load(totals, i * LANES, lanes=LANES) + total * step
            store(totals, added, i * LANES, lanes=LANES)


def _codes(weights: SparseWeights, at: Expr, units: int) -> list[Expr]:
    """Emit the codes of a record's groups, 16 times what they are: int8x16, in order."""
    records = weights.records
    result = []
    count = records.steps_at(units) // COLUMNS
    vectors = []
    for vector in range(0, count, LANES):
        here = at + int64(vector * COLUMNS)
        if count - vector >= LANES:
            vectors += address.load_64(here)
        else:
            vectors += [address.load_16(here + int64(i * COLUMNS)) for i in range(count - vector)]
    for vector in vectors:
        raw = B.bind(B.reinterpret("uint8x16", vector))
        four = broadcast(const(4, "uint8"), COLUMNS)
        high = broadcast(const(0xF0, "uint8"), COLUMNS)
        for part in (B.shift_left(raw, four), B.bitwise_and(raw, high)):
            result.append(B.bind(B.reinterpret("int8x16", B.bind(part))))
    return result
