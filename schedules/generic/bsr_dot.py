"""The dot products of one sparse row with a tile of tokens: decode a group once, use it for all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gqsa_compiler._tvm import B
from gqsa_compiler.checkpoint import symmetric_zero
from gqsa_compiler.schedules.generic.emit import (
    Buffer,
    Expr,
    broadcast,
    cast,
    const,
    constants,
    half_to_float,
    horizontal_sums,
    int64,
    load,
    local,
    pick,
    repeat,
    store,
    vector,
)
from gqsa_compiler.schedules.generic.layout import BLOCK, BsrLayout
from gqsa_compiler.schedules.generic.math import fma
from gqsa_compiler.schedules.generic.prologue import Inputs
from gqsa_compiler.schedules.spec import ACTIVATION_BLOCK, LinearSpec

CHAINS = 4
"""Independent sums kept for a single token, to hide the latency of the fused multiply-add."""
MOST_UNROLLED = 32
"""Multiply-adds of a large group (vectors times tokens) that are unrolled; beyond, a loop."""


@dataclass(frozen=True)
class Weights:
    """A layer's packed tensors inside a kernel."""

    spec: LinearSpec
    layout: BsrLayout
    native_half: bool
    codes: Buffer
    scales: Buffer
    meta: Buffer | None
    row_starts: Buffer | None

    def row(self, row: Expr) -> tuple[Expr, Expr]:
        """Emit the first and the past-the-last group of a stored row, int64."""
        return stored_row(self.spec, self.row_starts, row)

    def block_columns(self, group: Expr, first: Expr) -> Expr:
        """Emit the column groups of `BLOCK` stored groups, int32; `first` is their row's first."""
        if self.layout.full or self.meta is None:
            # Beyond the row's end, where the scale is zero, any column will do.
            groups = self.spec.k // self.spec.group_size
            columns = B.ramp(B.Cast("int32", group - first), 1, BLOCK)
            return B.min(columns, broadcast(const(groups - 1, "int32"), BLOCK))
        meta = load(self.meta, group, lanes=BLOCK)
        shift = broadcast(const(self.layout.meta_shift, self.layout.meta or ""), BLOCK)
        return cast("int32", B.shift_right(meta, shift), BLOCK)

    def block_scales(self, group: Expr) -> Expr:
        """Emit the scales of `BLOCK` groups as float32."""
        half = load(self.scales, group, lanes=BLOCK)
        return B.bind(half_to_float(half, BLOCK, native=self.native_half))

    def block_zeros(self, group: Expr) -> Expr:
        """Emit the zero points of `BLOCK` groups as float32."""
        if self.spec.symmetric or self.meta is None:
            return broadcast(const(symmetric_zero(self.spec.bits), "float32"), BLOCK)
        meta = cast("int32", load(self.meta, group, lanes=BLOCK), BLOCK)
        low = B.bitwise_and(meta, broadcast(const(self.top_code, "int32"), BLOCK))
        return cast("float32", low, BLOCK)

    def zero(self, group: Expr) -> Expr:
        """Emit the zero point of one group as int16."""
        if self.spec.symmetric or self.meta is None:
            return const(symmetric_zero(self.spec.bits), "int16")
        meta = cast("int32", load(self.meta, group))
        return cast("int16", B.bitwise_and(meta, const(self.top_code, "int32")))

    @property
    def top_code(self) -> int:
        """The largest code that a packed one can be, which is also the mask of a zero point."""
        return (1 << self.layout.code_bits) - 1


def stored_row(spec: LinearSpec, row_starts: Buffer | None, row: Expr) -> tuple[Expr, Expr]:
    """Emit the first and the past-the-last group of a stored row, int64.

    Parameters
    ----------
    row_starts : Buffer or None
        None where every group is kept.
    """
    if row_starts is None:
        groups = spec.k // spec.group_size
        first = B.bind(row * int64(groups))
        return first, B.bind(first + int64(groups))
    return (
        B.bind(int64(load(row_starts, row))),
        B.bind(int64(load(row_starts, row + int64(1)))),
    )


def row_sums(
    weights: Weights, inputs: Inputs, row: Expr, token: Expr, tile: int, sums: Buffer, at: Expr
) -> None:
    """Emit the dot products of a stored row with `tile` tokens, into ``sums[at:at + tile]``.

    Parameters
    ----------
    token : Expr
        int64, first token of the tile.
    """
    width = weights.layout.lanes
    group_body = _int8_group if weights.spec.activation_dtype == "int8" else _float_group
    chains = CHAINS if tile == 1 else 1
    totals = local(chains * tile * width)
    for i in range(chains * tile):
        store(totals, broadcast(const(0.0, "float32"), width), i * width, lanes=width)
    tile_base = B.bind(token * int64(weights.spec.k))
    first, last = weights.row(row)
    scales, shifts, columns = local(BLOCK), local(BLOCK), local(BLOCK, "int32")

    # A single token leaves no other work to hide latencies, so several groups are in flight. What
    # that reads beyond the row's end, the next row's groups, counts with a scale of zero.
    unroll = max(1, CHAINS * width // weights.spec.group_size) if tile == 1 else 1

    def decode_block(start: Expr, count: Expr) -> None:
        factor = weights.block_scales(start)
        if unroll > 1:
            inside = B.ramp(const(0, "int32"), 1, BLOCK) < broadcast(B.Cast("int32", count), BLOCK)
            factor = B.bind(B.Select(inside, factor, broadcast(const(0.0, "float32"), BLOCK)))
        store(scales, factor, 0, lanes=BLOCK)
        if weights.spec.activation_dtype == "float32":
            shift = (broadcast(const(0.0, "float32"), BLOCK) - factor) * weights.block_zeros(start)
            store(shifts, shift, 0, lanes=BLOCK)
        # Ready-made offsets: left to itself, LLVM computes them as vectors and takes those apart.
        stride = broadcast(const(tile * weights.spec.group_size, "int32"), BLOCK)
        store(columns, weights.block_columns(start, first) * stride, 0, lanes=BLOCK)

    def one(start: Expr, i: Expr, chain: int) -> None:
        group = B.bind(start + i)
        base = B.bind(tile_base + int64(load(columns, i)))
        factors = (load(scales, i), load(shifts, i))
        group_body(weights, inputs, group, base, factors, tile, totals, chain)

    blocks = B.bind(B.floordiv(last - first + int64(BLOCK - 1), int64(BLOCK)))
    with B.serial(int64(0), blocks) as block:
        start = B.bind(first + block * int64(BLOCK))
        count = B.bind(B.min(int64(BLOCK), last - start))
        decode_block(start, count)
        with B.serial(int64(0), B.floordiv(count + int64(unroll - 1), int64(unroll))) as i:
            for u in range(unroll):
                one(start, i * int64(unroll) + int64(u), u)
    _reduce(totals, chains, tile, width, sums, at)


def _reduce(totals: Buffer, chains: int, tile: int, width: int, sums: Buffer, at: Expr) -> None:
    vectors = []
    for t in range(tile):
        value = load(totals, t * chains * width, lanes=width)
        for c in range(1, chains):
            value = value + load(totals, (t * chains + c) * width, lanes=width)
        vectors.append(B.bind(value))
    done = 0
    for value, count in horizontal_sums(vectors, width):
        store(sums, value, at + done, lanes=count)
        done += count


def _accumulate(totals: Buffer, slot: int, width: int, a: Expr, b: Expr) -> None:
    at = slot * width
    store(totals, fma(a, b, load(totals, at, lanes=width)), at, lanes=width)


def _chunks(count: int, tile: int, body: Callable[[Expr, int], None]) -> None:
    """Run ``body(base, i)`` for chunk ``base + i`` of `count`: unrolled, in a loop if many."""
    inner = min(count, 8, max(1, MOST_UNROLLED // tile))
    if inner == count:
        for i in range(count):
            body(int64(0), i)
        return
    with B.serial(int64(0), int64(count // inner)) as outer:
        base = B.bind(outer * int64(inner))
        for i in range(inner):
            body(base, i)


def _float_group(
    weights: Weights,
    inputs: Inputs,
    group: Expr,
    base: Expr,
    factors: tuple[Expr, Expr],
    tile: int,
    totals: Buffer,
    chain: int,
) -> None:
    size, width = weights.spec.group_size, weights.layout.lanes
    chains = CHAINS if tile == 1 else 1
    scale = B.bind(broadcast(factors[0], width))
    shift = B.bind(broadcast(factors[1], width))
    byte = B.bind(group * int64(weights.layout.group_bytes(weights.spec)))
    chunk_bytes = width * weights.layout.code_bits // 8

    def chunk(loop: Expr, i: int) -> None:
        place = loop + int64(i)
        codes = _decode(weights, byte + place * int64(chunk_bytes), width)
        weight = B.bind(fma(codes, scale, shift))
        for t in range(tile):
            x = inputs.load(base + place * int64(width) + int64(t * size), width)
            slot = t * chains + (chain + i) % chains
            _accumulate(totals, slot, width, weight, x)

    _chunks(size // width, tile, chunk)


def _decode(weights: Weights, byte: Expr, width: int) -> Expr:
    """Emit `width` codes as float32.

    8-bit ones are widened; of smaller ones all lanes get the bits of all, and each lane is shifted
    its own way.
    """
    bits = weights.layout.code_bits
    raw = load(weights.codes, byte, lanes=width * bits // 8)
    if bits == 8:
        return cast("float32", cast("int32", raw, width), width)
    if width * bits == 64:
        spread = B.reinterpret("uint32x16", B.Broadcast(B.reinterpret("uint64", raw), 8))
        counts = constants([4 * (i // 2) for i in range(16)], "uint32")
    else:
        word = B.reinterpret(f"uint{width * bits}", raw)
        spread = B.Broadcast(cast("uint32", word), width)
        counts = constants([bits * i for i in range(width)], "uint32")
    mask = broadcast(const(weights.top_code, "uint32"), width)
    low = B.bitwise_and(B.shift_right(spread, counts), mask)
    return cast("float32", B.reinterpret(vector("int32", width), low), width)


def _int8_group(
    weights: Weights,
    inputs: Inputs,
    group: Expr,
    base: Expr,
    factors: tuple[Expr, Expr],
    tile: int,
    totals: Buffer,
    chain: int,
) -> None:
    """Dot products of one group, in integers within a block of `ACTIVATION_BLOCK` columns.

    A lane adds two neighbouring products of 16-bit numbers, which belong to one block
    (`int8_order`). x86 has an instruction for just that, which LLVM recognises. A code less
    its zero may need 9 bits, so instructions that multiply bytes will not do; these sums are exact.
    """
    size, width = weights.spec.group_size, weights.layout.lanes
    chains = CHAINS if tile == 1 else 1
    blocks = 2 * width // ACTIVATION_BLOCK
    byte = B.bind(group * int64(weights.layout.group_bytes(weights.spec)))
    chunk_bytes = 2 * width * weights.layout.code_bits // 8
    first_scale = B.bind(B.floordiv(base, int64(ACTIVATION_BLOCK)))
    factor = B.bind(broadcast(factors[0], width))
    zero = B.bind(weights.zero(group))
    even, odd = range(0, 2 * width, 2), range(1, 2 * width, 2)

    def chunk(loop: Expr, i: int) -> None:
        assert inputs.scales is not None
        number = loop + int64(i)
        place = B.bind(number * int64(2 * width))
        scale = B.bind(first_scale + number * int64(blocks))
        codes = _decode_pairs(weights, byte + number * int64(chunk_bytes), zero, width)
        w = B.bind(cast("int32", codes, 2 * width))
        for t in range(tile):
            x = inputs.load(base + place + int64(t * size), 2 * width)
            products = B.bind(w * cast("int32", x, 2 * width))
            summed = pick([products], even) + pick([products], odd)
            scales = load(inputs.scales, scale + int64(t * size // ACTIVATION_BLOCK), lanes=blocks)
            spread = broadcast(scales, width) if blocks == 1 else repeat(scales, width // blocks)
            slot = t * chains + (chain + i) % chains
            _accumulate(totals, slot, width, cast("float32", summed, width), factor * spread)

    _chunks(size // 2 // width, tile, chunk)


def _decode_pairs(weights: Weights, byte: Expr, zero: Expr, width: int) -> Expr:
    """Emit `width` pairs of codes less their zero point, int16."""
    bits = weights.layout.code_bits
    fields = 8 // bits  # codes of a byte
    lanes = 2 * width // fields
    raw = B.bind(cast("int16", load(weights.codes, byte, lanes=lanes), lanes))
    zeros = broadcast(zero, lanes)
    parts = []
    for i in range(fields):
        code = raw
        if i > 0:
            code = B.shift_right(code, broadcast(const(bits * i, "int16"), lanes))
        if i < fields - 1:
            code = B.bitwise_and(code, broadcast(const(weights.top_code, "int16"), lanes))
        parts.append(B.bind(code - zeros))
    order = [i % fields * lanes + i // fields for i in range(2 * width)]
    return parts[0] if fields == 1 else pick(parts, order)
