"""Activations as 16-bit integers, one scale a token, in the order that the dot products read."""

from __future__ import annotations

from dataclasses import dataclass

from gqsa_compiler._tvm import B
from gqsa_compiler.schedules.generic.config import GenericConfig
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
    store,
)
from gqsa_compiler.schedules.generic.prologue import scale_of, token_values
from gqsa_compiler.schedules.generic.tiles import TilePlan
from gqsa_compiler.schedules.spec import LinearSpec
from gqsa_compiler.schedules.x86.scratch import Scratch

QUANT_MAX = 32767.0


@dataclass(frozen=True)
class Inputs:
    """Quantised activations.

    A tile's values begin at its first token times K. In a tile of fewer tokens than a vector has
    float lanes, tokens follow each other. In a larger one two columns of a token lie together, and
    the tokens of a tile side by side: column c of token t is at
    ``2 * (c // 2 * tile + t) + c % 2``.

    Parameters
    ----------
    values : Buffer
        int32, one-dimensional: two 16-bit values in each, the lower column in the low half.
    scales : Buffer
        float32, one a token.
    scratch : Scratch or None
        Where the task decodes weights to; None for one token.
    """

    values: Buffer
    scales: Buffer
    scratch: Scratch | None = None

    def load(self, offset: Expr, lanes: int) -> Expr:
        """Load `lanes` 16-bit values from an offset on, which counts pairs of them."""
        return B.reinterpret(f"int16x{lanes}", load(self.values, offset, lanes=lanes // 2))


def prepare(
    spec: LinearSpec,
    config: GenericConfig,
    x: Buffer,
    norm: Buffer | None,
    tokens: Expr,
    plan: TilePlan | None,
    slack: int,
) -> Inputs:
    """Emit the norm and the quantisation of all tokens; what pads the last tile is zero.

    Parameters
    ----------
    plan : TilePlan or None
        None: there is one token.
    slack : int
        Values that may be read after the last one.
    """
    capacity = int64(1) if plan is None else B.bind(plan.capacity())
    extent = capacity * int64(spec.k // 2) + int64(slack // 2)
    values = B.alloc_buffer((extent,), "int32")
    scales = B.alloc_buffer((capacity,), "float32")
    inputs = Inputs(values, scales)
    if plan is None:
        _write(spec, config, x, norm, inputs, int64(0), int64(0), None)
        return inputs
    with B.parallel(int64(0), capacity) as token:
        first, size, within = plan.place(token)
        begin = B.bind(B.floordiv(first * int64(spec.k), int64(2)))
        wide = size >= int64(config.lanes)
        stride = B.bind(B.Select(wide, size, int64(1)))
        at = B.bind(begin + within * B.Select(wide, int64(1), int64(spec.k // 2)))
        with B.If(token < tokens):
            with B.Then():
                _write(spec, config, x, norm, inputs, token, at, stride)
            with B.Else():
                store(scales, const(0.0, "float32"), token)
                with B.serial(int64(0), int64(spec.k // 2)) as pair:
                    store(values, const(0, "int32"), at + pair * stride)
    return inputs


def _write(
    spec: LinearSpec,
    config: GenericConfig,
    x: Buffer,
    norm: Buffer | None,
    inputs: Inputs,
    token: Expr,
    at: Expr,
    stride: Expr | None,
) -> None:
    """Emit one token's values from index `at` on, each `stride` after the other (None: 1)."""
    lanes = min(config.lanes, spec.group_size)
    vectors = spec.k // lanes
    value = token_values(spec, x, norm, token, lanes)
    zeros = broadcast(const(0.0, "float32"), lanes)
    peaks, broken = local(lanes), local(lanes)
    store(peaks, zeros, 0, lanes=lanes)
    store(broken, zeros, 0, lanes=lanes)
    with B.serial(int64(0), int64(vectors)) as i:
        here = B.bind(value(i * int64(lanes)))
        store(peaks, B.max(load(peaks, 0, lanes=lanes), B.abs(here)), 0, lanes=lanes)
        store(broken, load(broken, 0, lanes=lanes) + here * zeros, 0, lanes=lanes)
    peak = B.bind(horizontal_max(B.bind(load(peaks, 0, lanes=lanes)), lanes))
    scale, inverse = scale_of(peak, QUANT_MAX)
    # A maximum loses NaN and the integers have none: 0, or NaN if any value is not finite.
    nan = horizontal_sum(B.bind(load(broken, 0, lanes=lanes)), lanes)
    store(inputs.scales, scale + nan, token)
    with B.serial(int64(0), int64(vectors)) as i:
        scaled = value(i * int64(lanes)) * broadcast(inverse, lanes)
        codes = cast("int16", cast("int32", B.nearbyint(scaled), lanes), lanes)
        pairs = B.bind(B.reinterpret(f"int32x{lanes // 2}", codes))
        start = B.bind(i * int64(lanes // 2))
        if stride is None:
            store(inputs.values, pairs, at + start, lanes=lanes // 2)
        else:
            index = B.ramp(at + start * stride, stride, lanes // 2)
            B.buffer_store(inputs.values, pairs, [index])
