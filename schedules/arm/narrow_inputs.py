"""Activations as bytes, in order, and their sums over groups, which zero points multiply."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gqsa_compiler._tvm import B
from gqsa_compiler.schedules.arm import address
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
from gqsa_compiler.schedules.spec import LinearSpec

LARGEST = 127.0
"""The largest byte that an activation becomes."""
COLUMNS = 16
_PAGE = 64


def padded(count: int) -> int:
    """Return how many bytes a token's plane of `count` values takes."""
    return -(-count // _PAGE) * _PAGE


@dataclass(frozen=True)
class Rounded:
    """Tokens' values as bytes; those of token t begin at byte ``t * stride``.

    Parameters
    ----------
    values : Buffer
        int8, one-dimensional.
    stride : int
    """

    values: Buffer
    stride: int

    @classmethod
    def allocate(cls, tokens: Expr, count: int) -> Rounded:
        """Emit the allocation for `count` values of each token."""
        stride = padded(count)
        return cls(B.alloc_buffer((tokens * int64(stride),), "int8"), stride)

    def bases(self, token: Expr, tokens: int) -> list[Expr]:
        """Emit the addresses of the values of tokens from one on, int64."""
        origin = address.address(self.values) + token * int64(self.stride)
        return [B.bind(origin + int64(t * self.stride)) for t in range(tokens)]

    def put(self, codes: Expr, token: Expr, at: Expr, lanes: int) -> None:
        """Emit the store of int32 values of a token from column `at` on."""
        begin = token * int64(self.stride) + at
        store(self.values, cast("int8", codes, lanes), begin, lanes=lanes)


@dataclass(frozen=True)
class SparseInputs:
    """What the kernel of sparse rows reads.

    Parameters
    ----------
    values, sums : Rounded
        The activations, and their sums over groups.
    scales, sum_scales : Buffer
        float32: what each token's values and sums are worth.
    """

    values: Rounded
    sums: Rounded
    scales: Buffer
    sum_scales: Buffer


@dataclass(frozen=True)
class DenseInputs:
    """What the kernel of full rows reads.

    Parameters
    ----------
    values : Rounded
    spans : Buffer
        int32, two for each token and group: less the sum of its values, and the bits of a float32,
        what a value is worth.
    """

    values: Rounded
    spans: Buffer


def _peak(value: Callable[[Expr], Expr], first: Expr, count: int) -> tuple[Expr, Expr]:
    """Emit the largest magnitude of `count` values from `first` on, and 0 or NaN."""
    peaks, broken = local(COLUMNS), local(COLUMNS)
    zeros = broadcast(const(0.0, "float32"), COLUMNS)
    store(peaks, zeros, 0, lanes=COLUMNS)
    store(broken, zeros, 0, lanes=COLUMNS)
    with B.serial(int64(0), int64(count // COLUMNS)) as i:
        here = B.bind(value(first + i * int64(COLUMNS)))
        store(peaks, B.max(load(peaks, 0, lanes=COLUMNS), B.abs(here)), 0, lanes=COLUMNS)
        store(broken, load(broken, 0, lanes=COLUMNS) + here * zeros, 0, lanes=COLUMNS)
    peak = B.bind(horizontal_max(B.bind(load(peaks, 0, lanes=COLUMNS)), COLUMNS))
    # A maximum loses NaN and the integers have none: 0, or NaN if any value is not finite.
    return peak, horizontal_sum(B.bind(load(broken, 0, lanes=COLUMNS)), COLUMNS)


def _codes(value: Expr, inverse: Expr, lanes: int) -> Expr:
    return B.bind(cast("int32", B.nearbyint(value * broadcast(inverse, lanes)), lanes))


def _total(codes: Expr) -> Expr:
    """Emit the sum of 16 int32."""
    return horizontal_sum(codes, COLUMNS)


def prepare_sparse(
    spec: LinearSpec,
    x: Buffer,
    norm: Buffer | None,
    inverse_inputs: Buffer,
    tokens: Expr,
    capacity: Expr,
) -> SparseInputs:
    """Emit the norm and the rounding of all tokens; those beyond the last are zeros.

    Parameters
    ----------
    inverse_inputs : Buffer
        float32 [K/G]: what column groups are multiplied by before they are rounded.
    """
    groups = spec.k // spec.group_size
    result = SparseInputs(
        Rounded.allocate(capacity, spec.k),
        Rounded.allocate(capacity, groups),
        B.alloc_buffer((capacity,), "float32"),
        B.alloc_buffer((capacity,), "float32"),
    )
    with B.parallel(int64(0), capacity) as token, B.If(token < tokens):
        with B.Then():
            value = token_values(spec, x, norm, token, COLUMNS)

            def scaled(at: Expr) -> Expr:
                group = B.floordiv(at, int64(spec.group_size))
                return value(at) * broadcast(load(inverse_inputs, group), COLUMNS)

            _write_sparse(spec, scaled, token, result)
        with B.Else():
            _clear(result.values, token)
            _clear(result.sums, token)
            store(result.scales, const(0.0, "float32"), token)
            store(result.sum_scales, const(0.0, "float32"), token)
    return result


def _clear(rounded: Rounded, token: Expr) -> None:
    with B.serial(int64(0), int64(rounded.stride // COLUMNS)) as i:
        at = token * int64(rounded.stride) + i * int64(COLUMNS)
        store(rounded.values, broadcast(const(0, "int8"), COLUMNS), at, lanes=COLUMNS)


def _write_sparse(
    spec: LinearSpec, value: Callable[[Expr], Expr], token: Expr, inputs: SparseInputs
) -> None:
    size = spec.group_size
    groups = spec.k // size
    peak, nan = _peak(value, int64(0), spec.k)
    scale, inverse = scale_of(peak, LARGEST)
    store(inputs.scales, scale + nan, token)
    sums = B.alloc_buffer((padded(groups),), "float32")
    with B.serial(int64(0), int64(padded(groups) // COLUMNS)) as i:
        none = broadcast(const(0.0, "float32"), COLUMNS)
        store(sums, none, i * int64(COLUMNS), lanes=COLUMNS)
    with B.serial(int64(0), int64(groups)) as group:
        total = local(COLUMNS, "int32")
        for part in range(size // COLUMNS):
            at = B.bind(group * int64(size) + int64(part * COLUMNS))
            codes = _codes(value(at), inverse, COLUMNS)
            inputs.values.put(codes, token, at, COLUMNS)
            whole = codes if part == 0 else load(total, 0, lanes=COLUMNS) + codes
            store(total, whole, 0, lanes=COLUMNS)
        all_ = _total(B.bind(load(total, 0, lanes=COLUMNS)))
        store(sums, B.Cast("float32", all_), group)

    def sum_of(at: Expr) -> Expr:
        return load(sums, at, lanes=COLUMNS)

    most, _ = _peak(sum_of, int64(0), padded(groups))
    worth, inverse = scale_of(most, LARGEST)
    store(inputs.sum_scales, worth * (scale + nan), token)
    with B.serial(int64(0), int64(padded(groups) // COLUMNS)) as i:
        at = B.bind(i * int64(COLUMNS))
        inputs.sums.put(_codes(sum_of(at), inverse, COLUMNS), token, at, COLUMNS)


def prepare_dense(
    spec: LinearSpec, x: Buffer, norm: Buffer | None, tokens: Expr, capacity: Expr
) -> DenseInputs:
    """Emit the norm and the rounding of all tokens; those beyond the last are zeros."""
    size = spec.group_size
    groups = spec.k // size
    inputs = DenseInputs(
        Rounded.allocate(capacity, spec.k),
        B.alloc_buffer((capacity * int64(2 * groups),), "int32"),
    )
    with B.parallel(int64(0), capacity) as token, B.If(token < tokens):
        with B.Then():
            value = token_values(spec, x, norm, token, COLUMNS)
            with B.serial(int64(0), int64(groups)) as group:
                _write_group(value, size, token, group, inputs, groups)
        with B.Else():
            _clear(inputs.values, token)
            with B.serial(int64(0), int64(groups)) as group:
                at = (token * int64(groups) + group) * int64(2)
                store(inputs.spans, broadcast(const(0, "int32"), 2), at, lanes=2)
    return inputs


def _write_group(
    value: Callable[[Expr], Expr],
    size: int,
    token: Expr,
    group: Expr,
    inputs: DenseInputs,
    groups: int,
) -> None:
    first = B.bind(group * int64(size))
    peak, nan = _peak(value, first, size)
    scale, inverse = scale_of(peak, LARGEST)
    at = B.bind((token * int64(groups) + group) * int64(2))
    total = local(COLUMNS, "int32")
    store(total, broadcast(const(0, "int32"), COLUMNS), 0, lanes=COLUMNS)
    with B.serial(int64(0), int64(size // COLUMNS)) as part:
        column = B.bind(first + part * int64(COLUMNS))
        codes = _codes(value(column), inverse, COLUMNS)
        inputs.values.put(codes, token, column, COLUMNS)
        store(total, load(total, 0, lanes=COLUMNS) + codes, 0, lanes=COLUMNS)
    whole = _total(B.bind(load(total, 0, lanes=COLUMNS)))
    store(inputs.spans, const(0, "int32") - whole, at)
    store(inputs.spans, B.reinterpret("int32", scale + nan), at + int64(1))
