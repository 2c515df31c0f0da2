"""Layers whose rows are equally long: dense ones, and 8-bit ones with all their groups.

A warp takes an output of a tile of tokens and reads the output's row (two where it is gated), its
lanes side by side. Inputs come from global memory, which the first-level cache answers.
More tokens than the largest tile take several tiles, each of which reads the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gqsa_compiler._tvm import B
from gqsa_compiler.schedules.cuda.arch import WARP
from gqsa_compiler.schedules.cuda.device import registers, warp_sum
from gqsa_compiler.schedules.cuda.epilogue import Outputs
from gqsa_compiler.schedules.cuda.gemv import MIN_BLOCKS
from gqsa_compiler.schedules.cuda.launch import Thread, i32
from gqsa_compiler.schedules.cuda.rows import rows_of_output
from gqsa_compiler.schedules.generic.emit import Buffer, Expr, const, int64, load, store
from gqsa_compiler.schedules.generic.function import Arguments
from gqsa_compiler.schedules.rule import KernelConfig
from gqsa_compiler.schedules.spec import LinearSpec

TILES = (1, 4, 8)
"""Token counts that there is code for."""


@dataclass(frozen=True)
class RowConfig(KernelConfig):
    """Configuration of `cuda.dense` and `cuda.bsr_int8`.

    Parameters
    ----------
    warps : int
        Warps of a block, an output each.
    """

    warps: int = 8


SPACE = (RowConfig(8), RowConfig(4), RowConfig(16))

Step = Callable[[Expr, list[Expr], Expr], list[Expr]]
"""``step(row, tokens, unit)``: emits a lane's dot products of a unit of a row, one a token."""


def dispatch(
    spec: LinearSpec,
    config: RowConfig,
    args: Arguments,
    units: int,
    step: Step,
    factors: Buffer | None,
    tiles: Sequence[int] = TILES,
) -> None:
    """Emit the choice of the smallest tile that holds all tokens.

    Parameters
    ----------
    units : int
        Of a row.
    step : callable
    factors : Buffer or None
        float32 [m]: what a token's sums are multiplied by.
    """
    if len(tiles) == 1:
        _launch(spec, config, args, units, step, factors, tiles[0])
        return
    with B.If(args.tokens <= int64(tiles[0])):
        with B.Then():
            _launch(spec, config, args, units, step, factors, tiles[0])
        with B.Else():
            dispatch(spec, config, args, units, step, factors, tiles[1:])


def _launch(
    spec: LinearSpec,
    config: RowConfig,
    args: Arguments,
    units: int,
    step: Step,
    factors: Buffer | None,
    tile: int,
) -> None:
    rows = rows_of_output(spec)
    across = B.floordiv(args.tokens + int64(tile - 1), int64(tile))
    with (
        B.thread_binding(0, -(-spec.n_out // config.warps), thread="blockIdx.x") as block,
        B.thread_binding(0, across, thread="blockIdx.y") as column,
        B.thread_binding(0, config.warps * WARP, thread="threadIdx.x") as place,
        B.attr(0, MIN_BLOCKS, 1),
    ):
        thread = Thread.of(place)
        output = B.bind(B.Cast("int32", block) * i32(config.warps) + thread.warp)
        first = B.bind(B.Cast("int64", column) * int64(tile))
        with B.If(output < i32(spec.n_out)), B.Then():
            last = args.tokens - int64(1)
            tokens = [B.bind(B.min(first + int64(t), last)) for t in range(tile)]
            sums = [registers(tile) for _ in range(rows)]
            for row_sums in sums:
                for t in range(tile):
                    store(row_sums, const(0.0, "float32"), t)
            with B.serial(-(-units // WARP)) as i:
                unit = B.bind(i * i32(WARP) + thread.lane)
                with B.If(unit < i32(units)), B.Then():
                    for r, row_sums in enumerate(sums):
                        row = B.bind(output + i32(r * spec.n_out))
                        for t, product in enumerate(step(row, tokens, unit)):
                            store(row_sums, load(row_sums, t) + product, t)
            for row_sums in sums:
                warp_sum(row_sums, tile, thread.lane)
            lanes = WARP // tile
            with B.If(B.floormod(thread.lane, i32(lanes)) == i32(0)), B.Then():
                token = B.bind(first + int64(B.floordiv(thread.lane, i32(lanes))))
                found = registers(rows)
                for r, row_sums in enumerate(sums):
                    value = load(row_sums, 0)
                    if factors is not None:
                        value = value * load(factors, B.min(token, last))
                    store(found, value, r)
                Outputs(spec, args).finish(found, output, token)
