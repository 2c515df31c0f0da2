"""Activations as 16-bit integers, one scale a token, in the order that the dot products read.

`sdot` multiplies signed bytes. A 16-bit integer is ``256 high + low + 128`` with both of them
signed bytes, so two `sdot` multiply by all 16 bits; the 128 times a row's weights is a constant of
the row (`schedules.arm.pack`).
"""

from __future__ import annotations

from dataclasses import dataclass

from gqsa_compiler._tvm import B
from gqsa_compiler.schedules.arm import address
from gqsa_compiler.schedules.arm.dot import BIAS, COLUMNS
from gqsa_compiler.schedules.arm.scratch import Scratch
from gqsa_compiler.schedules.generic.emit import (
    Buffer,
    Expr,
    broadcast,
    cast,
    const,
    horizontal_max,
    horizontal_sum,
    int64,
    load,
    local,
    pick,
    store,
    vector,
)
from gqsa_compiler.schedules.generic.prologue import scale_of, token_values
from gqsa_compiler.schedules.generic.tiles import TilePlan
from gqsa_compiler.schedules.spec import LinearSpec

QUANT_MAX = 32767.0


@dataclass(frozen=True)
class Inputs:
    """Quantised activations. Offsets count pairs of columns of a token.

    *One token*: columns follow each other. As bytes, the high ones of a run of `run` columns lie
    before their low ones. *A tile of tokens* begins at its first token times K. As bytes, four
    columns of a token lie together, the tokens of a tile side by side, high bytes before low ones;
    as halves, all tokens of a column lie together.

    Parameters
    ----------
    values : Buffer
        One-dimensional; int32, four bytes in each, or int16.
    scales : Buffer
        float32, one a token.
    as_bytes : bool
        Else as 16-bit halves.
    run : int
        Columns, 16 or a group's if that is less.
    scratch : Scratch or None
        Where the task decodes weights to; None for one token.
    """

    values: Buffer
    scales: Buffer
    as_bytes: bool
    run: int
    scratch: Scratch | None = None

    def address(self) -> Expr:
        """Emit the address of column 0 of the only token, int64."""
        return address.address(self.values)

    def near(self, places: list[Expr], column: int, *, then_step: bool = False) -> tuple[Expr, ...]:
        """Load 16 columns of the only token.

        Parameters
        ----------
        places : list of Expr
            Where the groups begin that they belong to, each with as many of them: addresses of
            bytes, or else in pairs of columns.
        column : int
            Of their group, a multiple of 16, which the first of them is.
        then_step : bool
            What is added to the address next is no constant.

        Returns
        -------
        tuple of Expr
            int8x16 of their high bytes and int8x16 of their low ones; or one int16x16.
        """
        if not self.as_bytes:
            starts = [at * int64(2) + int64(column) for at in places]
            halves = [B.bind(load(self.values, at, lanes=self.run)) for at in starts]
            return (halves[0] if len(halves) == 1 else B.bind(pick(halves, range(COLUMNS))),)
        if len(places) == 1:
            return address.load(places[0] + int64(2 * column), then_step=then_step)
        runs = [address.load_16(at) for at in places]
        firsts = [[16 * i + j for i in range(2) for j in range(k, k + 8)] for k in (0, 8)]
        return tuple(B.bind(pick(runs, lanes)) for lanes in firsts)


def prepare(
    spec: LinearSpec,
    x: Buffer,
    norm: Buffer | None,
    tokens: Expr,
    plan: TilePlan | None,
    slack: int,
    *,
    as_bytes: bool,
) -> Inputs:
    """Emit the norm and the quantisation of all tokens; what pads the last tile is zero.

    Parameters
    ----------
    plan : TilePlan or None
        None: there is one token.
    slack : int
        Columns that may be read after the last one.
    """
    capacity = int64(1) if plan is None else B.bind(plan.capacity())
    pairs = capacity * int64(spec.k // 2) + int64(slack // 2)
    if as_bytes:
        values = B.alloc_buffer((pairs,), "int32")
    else:
        values = B.alloc_buffer((pairs * int64(2),), "int16")
    scales = B.alloc_buffer((capacity,), "float32")
    inputs = Inputs(values, scales, as_bytes, min(COLUMNS, spec.group_size))
    if plan is None:
        _write(spec, x, norm, inputs, int64(0), int64(0), None)
        return inputs
    with B.parallel(int64(0), capacity) as token:
        first, tile, within = plan.place(token)
        begin = B.bind(B.floordiv(first * int64(spec.k), int64(2)))
        with B.If(token < tokens):
            with B.Then():
                _write(spec, x, norm, inputs, token, begin, (tile, within))
            with B.Else():
                store(scales, const(0.0, "float32"), token)
                none = broadcast(const(0, "int16"), inputs.run)
                with B.serial(int64(0), int64(spec.k // inputs.run)) as i:
                    _place(inputs, none, begin, i, (tile, within))
    return inputs


def _write(
    spec: LinearSpec,
    x: Buffer,
    norm: Buffer | None,
    inputs: Inputs,
    token: Expr,
    begin: Expr,
    tile: tuple[Expr, Expr] | None,
) -> None:
    """Emit one token's values, from `begin` on."""
    lanes = inputs.run
    value = token_values(spec, x, norm, token, lanes)
    zeros = broadcast(const(0.0, "float32"), lanes)
    peaks, broken = local(lanes), local(lanes)
    store(peaks, zeros, 0, lanes=lanes)
    store(broken, zeros, 0, lanes=lanes)
    with B.serial(int64(0), int64(spec.k // lanes)) as i:
        here = B.bind(value(i * int64(lanes)))
        store(peaks, B.max(load(peaks, 0, lanes=lanes), B.abs(here)), 0, lanes=lanes)
        store(broken, load(broken, 0, lanes=lanes) + here * zeros, 0, lanes=lanes)
    peak = B.bind(horizontal_max(B.bind(load(peaks, 0, lanes=lanes)), lanes))
    scale, inverse = scale_of(peak, QUANT_MAX)
    # A maximum loses NaN and the integers have none: 0, or NaN if any value is not finite.
    nan = horizontal_sum(B.bind(load(broken, 0, lanes=lanes)), lanes)
    store(inputs.scales, scale + nan, token)
    with B.serial(int64(0), int64(spec.k // lanes)) as i:
        scaled = value(i * int64(lanes)) * broadcast(inverse, lanes)
        codes = cast("int16", cast("int32", B.nearbyint(scaled), lanes), lanes)
        _place(inputs, B.bind(codes), begin, i, tile)


def _place(
    inputs: Inputs, codes: Expr, begin: Expr, number: Expr, tile: tuple[Expr, Expr] | None
) -> None:
    """Emit the stores of run `number` of a token: int16 codes."""
    run = inputs.run
    if not inputs.as_bytes:
        # In units of columns: a tile has each column's tokens side by side.
        first = begin * int64(2)
        if tile is None:
            store(inputs.values, codes, first + number * int64(run), lanes=run)
            return
        size, within = tile
        at = B.bind(first + number * int64(run) * size + within)
        B.buffer_store(inputs.values, codes, [B.ramp(at, size, run)])
        return
    words = run // 4
    high = cast("int8", B.shift_right(codes, broadcast(const(8, "int16"), run)), run)
    # The lowest byte less 128, signed: the same bits with the highest turned round.
    turned = B.bitwise_xor(codes, broadcast(const(BIAS, "int16"), run))
    for part, narrow in enumerate((high, cast("int8", turned, run))):
        fours = B.bind(B.reinterpret(vector("int32", words), B.bind(narrow)))
        if tile is None:
            at = begin + number * int64(run // 2) + int64(part * words)
            store(inputs.values, fours, at, lanes=words)
            continue
        size, within = tile
        at = B.bind(begin + (number * int64(2 * words) + int64(part)) * size + within)
        B.buffer_store(inputs.values, fours, [B.ramp(at, size * int64(2), words)])
