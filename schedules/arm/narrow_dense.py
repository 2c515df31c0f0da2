"""Rows that keep all groups times bytes: lanes are outputs, and nothing is summed over lanes.

A byte of codes of 4 bits is ``16 h + l`` with h of outputs 4 to 7 and l of outputs 0 to 3: its dot
product, less that of the low halves, is 16 times that of the high ones, which need no instruction
to be taken out.
"""

from __future__ import annotations

from dataclasses import dataclass

from gqsa_compiler._tvm import B
from gqsa_compiler.schedules.arm import address
from gqsa_compiler.schedules.arm.dot import COLUMNS, dot_bytes, zero_counts
from gqsa_compiler.schedules.arm.narrow_dense_pack import HALF, LANES, DenseRecords
from gqsa_compiler.schedules.arm.narrow_inputs import DenseInputs
from gqsa_compiler.schedules.arm.narrow_rows import place
from gqsa_compiler.schedules.arm.narrow_sparse import finish, word_of
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
from gqsa_compiler.schedules.generic.math import fma
from gqsa_compiler.schedules.spec import LinearSpec


@dataclass(frozen=True)
class DenseWeights:
    """A layer's packed tensors inside a kernel."""

    spec: LinearSpec
    records: DenseRecords
    bytes: Buffer
    factors: Buffer


def emit_block(
    weights: DenseWeights,
    inputs: DenseInputs,
    outputs: Outputs,
    start: Expr,
    number: Expr,
    token: Expr,
    tile: int,
) -> None:
    """Emit a block of eight outputs for `tile` tokens; see `narrow_sparse.emit_block`."""
    rows = 2 if weights.spec.epilogue.gated else 1
    unit, index = place(weights.spec, start, number)
    values = []
    for part in range(rows):
        block = B.bind(index * int64(rows) + int64(part))
        values.append(_block(weights, inputs, block, token, tile))
    if tile == 1:
        outputs.finish_one_token([part[0] for part in values], unit, LANES)
    else:
        finish(outputs, values, unit, token, tile, LANES)


def _block(
    weights: DenseWeights, inputs: DenseInputs, block: Expr, token: Expr, tile: int
) -> list[Expr]:
    """Emit eight stored rows' products with each token: float32x8."""
    size, spec = weights.records.size, weights.spec
    groups = spec.k // spec.group_size
    totals = local(tile * LANES)
    for i in range(0, tile * LANES, HALF):
        store(totals, broadcast(const(0.0, "float32"), HALF), i, lanes=HALF)
    first = B.bind(address.address(weights.bytes) + block * int64(groups * size))
    bases = inputs.values.bases(token, tile)
    with B.serial(int64(0), int64(groups)) as group:
        at = B.bind(first + group * int64(size))
        near = [B.bind(base + group * int64(spec.group_size)) for base in bases]
        sums = _products(weights, at, near)
        scales = _whole(at + int64(weights.records.code_bytes), signed=spec.symmetric)
        zeros = None
        if weights.records.narrow:
            zeros = _whole(at + int64(weights.records.code_bytes + LANES), signed=True)
        for t in range(tile):
            span = ((token + int64(t)) * int64(groups) + group) * int64(2)
            pair = B.bind(load(inputs.spans, span, lanes=2))
            columns = B.bind(pick([pair, pair], [0] * HALF))
            floats = B.bind(B.reinterpret("float32x2", pair))
            worth = B.bind(pick([floats, floats], [1] * HALF))
            for half in range(2):
                value = sums[t][half]
                if zeros is not None:
                    # Less the columns' sum, so that LLVM needs no copy for it.
                    value = B.bind(value + zeros[half] * columns)
                value = B.bind(cast("float32", B.bind(value * scales[half]), HALF))
                slot = t * LANES + half * HALF
                total = fma(value, worth, load(totals, slot, lanes=HALF))
                store(totals, total, slot, lanes=HALF)
    factors = B.bind(load(weights.factors, block * int64(LANES), lanes=LANES))
    return [B.bind(load(totals, t * LANES, lanes=LANES) * factors) for t in range(tile)]


def _whole(at: Expr, *, signed: bool) -> list[Expr]:
    """Emit the load of eight bytes from an address on, as two int32x4."""
    raw = address.load_8(at)
    kind = "int8x8" if signed else "uint8x8"
    wide = B.bind(cast("int32", B.bind(B.reinterpret(kind, raw)), LANES))
    return [B.bind(pick([wide], range(i, i + HALF))) for i in (0, HALF)]


def _products(weights: DenseWeights, at: Expr, near: list[Expr]) -> list[list[Expr]]:
    """Emit a record's dot products with each token: int32x4 of outputs 0 to 3, and 4 to 7."""
    tile, narrow = len(near), weights.records.narrow
    sums = [[zero_counts(), zero_counts()] for _ in range(tile)]
    mask = broadcast(const(15, "int8"), COLUMNS)
    for run in range(weights.spec.group_size // COLUMNS):
        xs = [address.load_16(base + int64(run * COLUMNS)) for base in near]
        stored = []
        for part in range(1 if narrow else 2):
            piece = run if narrow else 2 * run + part
            stored += address.load_64(at + int64(piece * HALF * COLUMNS))
        for word in range(HALF):
            if narrow:
                high = stored[word]
                low = B.bind(B.bitwise_and(high, mask))
            else:
                low, high = stored[2 * word : 2 * word + 2]
            for t in range(tile):
                x = word_of(xs[t], word)
                sums[t] = [
                    dot_bytes(total, codes, x)
                    for total, codes in zip(sums[t], (low, high), strict=True)
                ]
    if not narrow:
        return sums
    return [[low, B.bind(both - low)] for low, both in sums]
