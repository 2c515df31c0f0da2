"""Decoding packed weights: a unit of one or more chunks at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gqsa_compiler._tvm import B
from gqsa_compiler.checkpoint import symmetric_zero
from gqsa_compiler.schedules.generic.bsr_dot import stored_row
from gqsa_compiler.schedules.generic.emit import (
    Buffer,
    Expr,
    broadcast,
    cast,
    const,
    constants,
    half_to_float,
    int64,
    load,
    pick,
)
from gqsa_compiler.schedules.generic.layout import BsrLayout
from gqsa_compiler.schedules.spec import LinearSpec
from gqsa_compiler.schedules.x86.layout import Chunks


@dataclass(frozen=True)
class Weights:
    """A layer's packed tensors inside a kernel.

    Parameters
    ----------
    lanes : int
        16-bit lanes of the target's vector registers.
    """

    spec: LinearSpec
    layout: BsrLayout
    chunks: Chunks
    lanes: int
    native_half: bool
    codes: Buffer
    scales: Buffer
    meta: Buffer | None
    row_starts: Buffer | None

    @property
    def row_groups(self) -> int:
        """Groups of a row where all are kept."""
        return self.spec.k // self.spec.group_size

    @property
    def aligned(self) -> bool:
        """Whether every row begins and ends with a unit."""
        return self.layout.full and self.row_groups % self.chunks.groups == 0

    def row(self, row: Expr) -> tuple[Expr, Expr]:
        """Emit the first and the past-the-last group of a stored row, int64."""
        return stored_row(self.spec, self.row_starts, row)

    def units(self, first: Expr, last: Expr) -> tuple[Expr, Expr]:
        """Emit the first and the past-the-last unit that a row's groups lie in, int64."""
        count = self.chunks.groups
        return (
            B.bind(B.floordiv(first, int64(count))),
            B.bind(B.floordiv(last + int64(count - 1), int64(count))),
        )

    def unit_scales(self, group: Expr, first: Expr, last: Expr) -> Expr:
        """Emit the scales of the unit that begins with `group`, float32; 0 outside the row."""
        count = self.chunks.groups
        scales = half_to_float(
            load(self.scales, group, lanes=count), count, native=self.native_half
        )
        if self.aligned or count == 1:
            return B.bind(scales)
        begin = broadcast(B.Cast("int32", group - first), count)
        place = B.bind(begin + constants(range(count), "int32"))
        below = place < broadcast(B.Cast("int32", last - first), count)
        inside = B.And(place >= broadcast(const(0, "int32"), count), below)
        return B.bind(B.Select(inside, scales, broadcast(const(0.0, "float32"), count)))

    def unit_zeros(self, group: Expr) -> Expr:
        """Emit the zero points of a unit's groups, int16."""
        count = self.chunks.groups
        if self.spec.symmetric or self.meta is None:
            return broadcast(const(symmetric_zero(self.spec.bits), "int16"), count)
        meta = cast("uint16", load(self.meta, group, lanes=count), count)
        mask = broadcast(const((1 << self.chunks.bits) - 1, "uint16"), count)
        return B.bind(cast("int16", B.bitwise_and(meta, mask), count))

    def unit_columns(self, group: Expr, first: Expr) -> list[Expr]:
        """Emit the columns that a unit's groups begin with, int64."""
        count, size = self.chunks.groups, self.spec.group_size
        if self.layout.full or self.meta is None:
            start = B.bind((group - first) * int64(size))
            return [start + int64(g * size) for g in range(count)]
        bits = 32 if self.layout.meta == "uint32" else 16
        if count * bits < 64:
            return [self.column(group + int64(g), first) for g in range(count)]
        # Taken apart in scalar registers: LLVM would compute them as a vector and extract each.
        columns = []
        for start in range(0, count, 64 // bits):
            word = B.bind(
                B.reinterpret("uint64", load(self.meta, group + int64(start), lanes=64 // bits))
            )
            for i in range(64 // bits):
                field = B.shift_right(word, const(bits * i, "uint64"))
                field = B.bitwise_and(field, const((1 << bits) - 1, "uint64"))
                columns.append(self._column_of(B.Cast("int64", field)))
        return columns

    def column(self, group: Expr, first: Expr) -> Expr:
        """Emit the column that a stored group begins with, int64; `first` is its row's first."""
        if self.layout.full or self.meta is None:
            return B.bind((group - first) * int64(self.spec.group_size))
        return self._column_of(int64(load(self.meta, group)))

    def _column_of(self, meta: Expr) -> Expr:
        size = self.spec.group_size
        # (meta >> shift) * G in one mask and one shift.
        shift, power = self.layout.meta_shift, size.bit_length() - 1
        if shift:
            meta = B.bitwise_and(meta, int64(-(1 << shift)))
        by = power - shift
        return B.bind(B.shift_left(meta, int64(by)) if by >= 0 else B.shift_right(meta, int64(-by)))

    def unit_codes(self, unit: Expr, zeros: Expr) -> list[Expr]:
        """Emit a unit's codes less their zero points: vectors of int16, in the groups' order."""
        chunks = self.chunks
        byte = B.bind(unit * int64(chunks.bytes))
        vectors = []
        for chunk in range(chunks.chunks):
            start = byte + int64(chunk * chunks.lanes)
            raw = load(self.codes, start, lanes=chunks.lanes)
            raw = B.bind(cast("uint16", raw, chunks.lanes))
            for field in range(chunks.fields):
                code = raw
                if field > 0:
                    count = const(chunks.bits * field, "uint16")
                    code = B.shift_right(code, broadcast(count, chunks.lanes))
                if field < chunks.fields - 1:
                    mask = const((1 << chunks.bits) - 1, "uint16")
                    code = B.bitwise_and(code, broadcast(mask, chunks.lanes))
                signed = B.reinterpret(f"int16x{chunks.lanes}", code)
                groups = chunks.groups_of(chunk * chunks.fields + field, chunks.lanes)
                zero = self.spread(zeros, groups, chunks.lanes)
                vectors.append(B.bind(signed - zero))
        return vectors

    def spread(self, values: Expr, groups: Sequence[int], lanes: int) -> Expr:
        """Give every lane of a vector of codes its group's value.

        Parameters
        ----------
        values : Expr
            One a group of the unit.
        groups : sequence of int
            Those that the vector's codes belong to.
        lanes : int
            Lanes of the result, which share the groups evenly.
        """
        if self.chunks.groups == 1:
            return broadcast(values, lanes)
        # A shuffle may not have more lanes than what it picks from.
        copies = max(1, lanes // self.chunks.groups)
        return pick([values] * copies, [groups[i * len(groups) // lanes] for i in range(lanes)])
