"""What happens to the activations before the dot products: RMS norm, quantisation, interleaving."""

from __future__ import annotations

from dataclasses import dataclass

from gqsa_compiler._tvm import B
from gqsa_compiler.schedules.generic.emit import (
    Buffer,
    Expr,
    broadcast,
    cast,
    const,
    each_token,
    horizontal_max,
    int64,
    load,
    local,
    store,
)
from gqsa_compiler.schedules.generic.rows import rms_factor
from gqsa_compiler.schedules.generic.tiles import TilePlan
from gqsa_compiler.schedules.spec import LinearSpec

QUANT_MAX = 127.0
QUANT_TINY = 1e-30
"""A group whose largest magnitude is below this is quantised to zeros."""


@dataclass(frozen=True)
class Inputs:
    """Activations as the dot products read them, in the order of `TilePlan`.

    Parameters
    ----------
    values : Buffer
        float32 or int8; one-dimensional, or x itself (its first row is read).
    scales : Buffer or None
        float32, int8's scale a group of a token, interleaved likewise with one for G values.
    """

    values: Buffer
    scales: Buffer | None

    def load(self, offset: Expr, lanes: int) -> Expr:
        """Load consecutive values."""
        if len(self.values.shape) == 2:
            return load(self.values, int64(0), offset, lanes=lanes)
        return load(self.values, offset, lanes=lanes)


def _token_factor(spec: LinearSpec, x: Buffer, token: Expr, lanes: int) -> Expr:
    assert spec.norm_eps is not None
    return rms_factor(spec.k, lanes, spec.norm_eps, lambda at, n: load(x, token, at, lanes=n))


def prepare_one(spec: LinearSpec, x: Buffer, norm: Buffer | None, lanes: int) -> Inputs:
    """Prepare the only token of a call; reads `x` in place where nothing has to change."""
    if norm is None and spec.activation_dtype == "float32":
        return Inputs(x, None)
    quantised = spec.activation_dtype == "int8"
    values = B.alloc_buffer((spec.k,), spec.activation_dtype)
    scales = B.alloc_buffer((spec.k // spec.group_size,), "float32") if quantised else None
    inputs = Inputs(values, scales)
    _write_token(spec, x, norm, inputs, int64(0), (int64(0), int64(1), int64(0)), lanes)
    return inputs


def prepare_tiles(
    spec: LinearSpec, x: Buffer, norm: Buffer | None, plan: TilePlan, tokens: Expr, lanes: int
) -> Inputs:
    """Prepare all tokens of a call, in parallel; what pads the last tile is zero."""
    groups = spec.k // spec.group_size
    capacity = B.bind(plan.capacity())
    values = B.alloc_buffer((capacity * int64(spec.k),), spec.activation_dtype)
    scales = None
    if spec.activation_dtype == "int8":
        scales = B.alloc_buffer((capacity * int64(groups),), "float32")
    inputs = Inputs(values, scales)
    with B.parallel(int64(0), capacity) as token:
        place = plan.place(token)
        with B.If(token < tokens):
            with B.Then():
                _write_token(spec, x, norm, inputs, token, place, lanes)
            with B.Else():
                _write_zeros(spec, inputs, place, lanes)
    return inputs


def _write_token(
    spec: LinearSpec,
    x: Buffer,
    norm: Buffer | None,
    inputs: Inputs,
    token: Expr,
    place: tuple[Expr, Expr, Expr],
    lanes: int,
) -> None:
    size = spec.group_size
    width = min(lanes, size)
    factor = None
    if norm is not None:
        factor = _token_factor(spec, x, token, width)

    def value(column: Expr) -> Expr:
        v = load(x, token, column, lanes=width)
        if factor is None or norm is None:
            return v
        return v * broadcast(factor, width) * load(norm, column, lanes=width)

    with B.serial(int64(0), int64(spec.k // size)) as group:
        column = B.bind(group * int64(size))
        at = _group_offset(spec, place, group)
        if inputs.scales is None:
            for i in range(0, size, width):
                store(inputs.values, value(column + int64(i)), at + int64(i), lanes=width)
        else:
            staged = local(size)
            for i in range(0, size, width):
                store(staged, value(column + int64(i)), i, lanes=width)
            _quantise(spec, inputs, staged, at, width)


def _group_offset(spec: LinearSpec, place: tuple[Expr, Expr, Expr], group: Expr) -> Expr:
    first, tile, within = place
    return B.bind(first * int64(spec.k) + (group * tile + within) * int64(spec.group_size))


def _quantise(spec: LinearSpec, inputs: Inputs, staged: Buffer, at: Expr, width: int) -> None:
    size = spec.group_size
    peak = B.bind(B.abs(load(staged, 0, lanes=width)))
    for i in range(width, size, width):
        peak = B.bind(B.max(peak, B.abs(load(staged, i, lanes=width))))
    peak = horizontal_max(peak, width)
    zero = const(0.0, "float32")
    usable = peak >= const(QUANT_TINY, "float32")
    limit = const(QUANT_MAX, "float32")
    inverse = B.bind(B.Select(usable, limit / B.max(peak, const(QUANT_TINY, "float32")), zero))
    assert inputs.scales is not None
    store(
        inputs.scales,
        B.Select(usable, peak / limit, zero),
        B.floordiv(at, int64(size)),
    )
    for i in range(0, size, width):
        scaled = load(staged, i, lanes=width) * broadcast(inverse, width)
        whole = cast("int32", B.nearbyint(scaled), width)
        store(inputs.values, cast("int8", whole, width), at + int64(i), lanes=width)


def _write_zeros(
    spec: LinearSpec, inputs: Inputs, place: tuple[Expr, Expr, Expr], lanes: int
) -> None:
    size = spec.group_size
    width = min(lanes, size)
    zero = broadcast(const(0, spec.activation_dtype), width)
    with B.serial(int64(0), int64(spec.k // size)) as group:
        at = _group_offset(spec, place, group)
        for i in range(0, size, width):
            store(inputs.values, zero, at + int64(i), lanes=width)
        if inputs.scales is not None:
            store(inputs.scales, const(0.0, "float32"), B.floordiv(at, int64(size)))


def normalise_rows(spec: LinearSpec, x: Buffer, norm: Buffer, tokens: Expr, lanes: int) -> Buffer:
    """Emit the RMS norm of all tokens into a scratch buffer [tokens, K]."""
    result = B.alloc_buffer((tokens, spec.k), "float32")
    vectors, tail = divmod(spec.k, lanes)

    def token_body(token: Expr) -> None:
        factor = _token_factor(spec, x, token, lanes)

        def columns(at: Expr, width: int) -> None:
            value = load(x, token, at, lanes=width) * broadcast(factor, width)
            store(result, value * load(norm, at, lanes=width), token, at, lanes=width)

        with B.serial(int64(0), int64(vectors)) as i:
            columns(i * int64(lanes), lanes)
        with B.serial(int64(0), int64(tail)) as i:
            columns(int64(vectors * lanes) + i, 1)

    each_token(tokens, spec.k, token_body)
    return result
