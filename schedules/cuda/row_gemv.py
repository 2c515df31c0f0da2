"""The kernel of dense layers for few tokens, and of those in float32 for any number.

A warp takes an output of a tile of tokens and reads the output's row (two where it is gated), its
lanes side by side. Inputs come from global memory, which the first-level cache answers. As a warp
sees all of a token's inputs, it sums their squares too where they are to be normalised, and the
norm is a factor of the finished sum.
More tokens than the largest tile take several tiles, each of which reads the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gqsa_compiler._tvm import B, T
from gqsa_compiler.schedules.cuda.arch import WARP
from gqsa_compiler.schedules.cuda.device import registers, warp_sum
from gqsa_compiler.schedules.cuda.epilogue import Outputs
from gqsa_compiler.schedules.cuda.gemv import MIN_BLOCKS
from gqsa_compiler.schedules.cuda.launch import Thread, i32
from gqsa_compiler.schedules.cuda.rows import rows_of_output
from gqsa_compiler.schedules.generic.emit import Expr, const, int64, load, store
from gqsa_compiler.schedules.generic.function import Arguments
from gqsa_compiler.schedules.rule import KernelConfig
from gqsa_compiler.schedules.spec import LinearSpec

TILES = (1, 4, 8)
"""Token counts that there is code for."""


@dataclass(frozen=True)
class RowConfig(KernelConfig):
    """Configuration of `cuda.dense`.

    Parameters
    ----------
    warps : int
        Warps of a block, an output each.
    """

    warps: int = 8


SPACE = (RowConfig(8), RowConfig(4), RowConfig(16))

Step = Callable[[list[Expr], list[Expr], Expr], tuple[list[list[Expr]], list[Expr]]]
"""``step(rows, tokens, unit)``: emits a lane's dot products of a unit of rows, for each row one a
token, and a token's sum of squares, or nothing where there is no norm."""


def dispatch(
    spec: LinearSpec,
    config: RowConfig,
    args: Arguments,
    units: int,
    step: Step,
    tiles: Sequence[int] = TILES,
) -> None:
    """Emit the choice of the smallest tile that holds all tokens.

    Parameters
    ----------
    units : int
        Of a row.
    step : callable
    """
    if len(tiles) == 1:
        _launch(spec, config, args, units, step, tiles[0])
        return
    with B.If(args.tokens <= int64(tiles[0])):
        with B.Then():
            _launch(spec, config, args, units, step, tiles[0])
        with B.Else():
            dispatch(spec, config, args, units, step, tiles[1:])


def _launch(
    spec: LinearSpec,
    config: RowConfig,
    args: Arguments,
    units: int,
    step: Step,
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
            normed = spec.norm_eps is not None
            sums = [registers(tile) for _ in range(rows + normed)]
            for one in sums:
                for t in range(tile):
                    store(one, const(0.0, "float32"), t)
            with B.serial(-(-units // WARP)) as i:
                unit = B.bind(i * i32(WARP) + thread.lane)
                with B.If(unit < i32(units)), B.Then():
                    own = [B.bind(output + i32(r * spec.n_out)) for r in range(rows)]
                    products, squares = step(own, tokens, unit)
                    more = [*products, squares] if normed else products
                    for one, values in zip(sums, more, strict=True):
                        for t, value in enumerate(values):
                            store(one, load(one, t) + value, t)
            for one in sums:
                warp_sum(one, tile, thread.lane)
            lanes = WARP // tile
            with B.If(B.floormod(thread.lane, i32(lanes)) == i32(0)), B.Then():
                token = B.bind(first + int64(B.floordiv(thread.lane, i32(lanes))))
                found = registers(rows)
                for r in range(rows):
                    value = load(sums[r], 0)
                    if spec.norm_eps is not None:
                        mean = load(sums[rows], 0) * const(1.0 / spec.k, "float32")
                        value = value * T.rsqrt(mean + const(spec.norm_eps, "float32"))
                    store(found, value, r)
                Outputs(spec, args).finish(found, output, token)
