"""The outputs of a single token: several at once from the reduction of their sums on."""

from __future__ import annotations

from gqsa_compiler._tvm import B
from gqsa_compiler.schedules.generic.emit import (
    Expr,
    broadcast,
    horizontal_sums,
    int64,
    load,
    local,
    pick,
    store,
)
from gqsa_compiler.schedules.generic.epilogue import Outputs
from gqsa_compiler.schedules.records.layout import output_block
from gqsa_compiler.schedules.x86.activations import Inputs
from gqsa_compiler.schedules.x86.dot import lane_sums
from gqsa_compiler.schedules.x86.weights import Weights


def one_token(weights: Weights, inputs: Inputs, outputs: Outputs, start: Expr, end: Expr) -> None:
    """Emit the output features from `start` (a multiple of `output_block`) to `end`.

    Lanes are columns; the sums of a block of outputs are reduced by one tree of shuffles, and its
    epilogue is one of vectors.
    """
    spec = weights.spec
    block, half = output_block(spec), weights.lanes // 2
    rows = 2 if spec.epilogue.gated else 1
    blocks = B.bind(B.floordiv(end - start + int64(block - 1), int64(block)))
    scale = B.bind(load(inputs.scales, int64(0)))
    with B.serial(int64(0), blocks) as i:
        # The last block of a layer may take outputs in again that the one before it has.
        unit = B.bind(B.min(start + i * int64(block), int64(spec.n_out - block)))
        first = B.bind(unit * int64(rows))
        partial = local(rows * block * half)
        with B.serial(int64(0), int64(rows * block)) as r:
            (total,) = lane_sums(weights, inputs, B.bind(first + r), int64(0), 1)
            # Gate and up rows take turns; their sums are put apart.
            place = B.floordiv(r, int64(rows)) + B.floormod(r, int64(rows)) * int64(block)
            store(partial, total, place * int64(half), lanes=half)
        vectors = [load(partial, j * half, lanes=half) for j in range(rows * block)]
        reduced = _cut(horizontal_sums([B.bind(v) for v in vectors], half), block)
        for part, value in enumerate(reduced):
            factor = broadcast(scale, block)
            if weights.factors is not None:
                both = load(weights.factors, first, lanes=rows * block)
                factor = factor * (pick([both], range(part, rows * block, 2)) if rows > 1 else both)
            reduced[part] = B.bind(value * factor)
        outputs.finish_one_token(reduced, unit, block)


def _cut(sums: list[tuple[Expr, int]], block: int) -> list[Expr]:
    """Cut vectors of sums, each of at least `block` lanes, into those of `block`."""
    return [
        value if count == block else B.bind(pick([value], range(start, start + block)))
        for value, count in sums
        for start in range(0, count, block)
    ]
