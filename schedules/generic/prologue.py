"""What happens to the activations before the dot products: RMS norm, quantisation, interleaving."""

from __future__ import annotations

from collections.abc import Callable
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
    pick,
    store,
)
from gqsa_compiler.schedules.generic.layout import int8_order
from gqsa_compiler.schedules.generic.rows import rms_factor
from gqsa_compiler.schedules.generic.tiles import TilePlan
from gqsa_compiler.schedules.spec import ACTIVATION_BLOCK, LinearSpec

QUANT_MAX = 127.0
QUANT_TINY = 1e-30
"""Values of which none is as large as this are quantised to zeros."""


@dataclass(frozen=True)
class Inputs:
    """Activations as the dot products read them, in the order of `TilePlan`.

    Parameters
    ----------
    values : Buffer
        float32 or int8; one-dimensional, or x itself (its first row is read).
    scales : Buffer or None
        float32, int8's scales, interleaved likewise with one for `ACTIVATION_BLOCK` values. The
        values of a group are in another order, `int8_order`; its scales are not.
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
    scales = B.alloc_buffer((spec.k // ACTIVATION_BLOCK,), "float32") if quantised else None
    inputs = Inputs(values, scales)
    _write_token(spec, x, norm, inputs, int64(0), (int64(0), int64(1), int64(0)), lanes)
    return inputs


def prepare_tiles(
    spec: LinearSpec, x: Buffer, norm: Buffer | None, plan: TilePlan, tokens: Expr, lanes: int
) -> Inputs:
    """Prepare all tokens of a call, in parallel; what pads the last tile is zero."""
    capacity = B.bind(plan.capacity())
    values = B.alloc_buffer((capacity * int64(spec.k),), spec.activation_dtype)
    scales = None
    if spec.activation_dtype == "int8":
        scales = B.alloc_buffer((capacity * int64(spec.k // ACTIVATION_BLOCK),), "float32")
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
    value = token_values(spec, x, norm, token, width)
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
            _quantise(spec, inputs, staged, at, lanes)


def token_values(
    spec: LinearSpec, x: Buffer, norm: Buffer | None, token: Expr, lanes: int
) -> Callable[[Expr], Expr]:
    """Return what emits `lanes` of a token's values from a column on, normalised if asked for.

    The norm's factor is emitted here.
    """
    factor = None if norm is None else _token_factor(spec, x, token, lanes)

    def value(column: Expr) -> Expr:
        v = load(x, token, column, lanes=lanes)
        if factor is None or norm is None:
            return v
        return v * broadcast(factor, lanes) * load(norm, column, lanes=lanes)

    return value


def _group_offset(spec: LinearSpec, place: tuple[Expr, Expr, Expr], group: Expr) -> Expr:
    first, tile, within = place
    return B.bind(first * int64(spec.k) + (group * tile + within) * int64(spec.group_size))


def _quantise(spec: LinearSpec, inputs: Inputs, staged: Buffer, at: Expr, lanes: int) -> None:
    """Emit the codes of a staged group, in the dot product's order, and its blocks' scales."""
    assert inputs.scales is not None
    size = spec.group_size
    chunk = min(2 * lanes, size)
    order = [int(element) for element in int8_order(size, chunk // 2)]
    width = min(lanes, ACTIVATION_BLOCK)
    first_scale = B.bind(B.floordiv(at, int64(ACTIVATION_BLOCK)))
    for start in range(0, size, chunk):
        codes: list[Expr] = []
        for block in range(start, start + chunk, ACTIVATION_BLOCK):
            scale, rounded = _quantise_block(staged, block, width)
            store(inputs.scales, scale, first_scale + int64(block // ACTIVATION_BLOCK))
            codes += rounded
        elements = [element - start for element in order[start : start + chunk]]
        values = cast("int8", pick(codes, elements), chunk)
        store(inputs.values, values, at + int64(start), lanes=chunk)


def _quantise_block(staged: Buffer, start: int, width: int) -> tuple[Expr, list[Expr]]:
    """Emit the scale of `ACTIVATION_BLOCK` values and their codes, int32 vectors of `width`."""
    places = range(start, start + ACTIVATION_BLOCK, width)
    parts = [B.bind(load(staged, i, lanes=width)) for i in places]
    peak = B.bind(B.abs(parts[0]))
    for part in parts[1:]:
        peak = B.bind(B.max(peak, B.abs(part)))
    peak = horizontal_max(peak, width)
    scale, inverse = scale_of(peak, QUANT_MAX)
    scaled = [part * broadcast(inverse, width) for part in parts]
    codes = [B.bind(cast("int32", B.nearbyint(value), width)) for value in scaled]
    return scale, codes


def scale_of(peak: Expr, most: float) -> tuple[Expr, Expr]:
    """Emit the scale of values whose largest magnitude is `peak`, and what turns them into codes.

    Parameters
    ----------
    most : float
        The largest code.

    Returns
    -------
    (Expr, Expr)
        ``peak / most`` and ``most / peak``; both 0 for a peak below `QUANT_TINY`.
    """
    zero = const(0.0, "float32")
    usable = peak >= const(QUANT_TINY, "float32")
    limit = const(most, "float32")
    inverse = B.bind(B.Select(usable, limit / B.max(peak, const(QUANT_TINY, "float32")), zero))
    return B.Select(usable, peak / limit, zero), inverse


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
            blocks = size // ACTIVATION_BLOCK
            first_scale = B.floordiv(at, int64(ACTIVATION_BLOCK))
            no_scale = broadcast(const(0.0, "float32"), blocks)
            store(inputs.scales, no_scale, first_scale, lanes=blocks)


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
