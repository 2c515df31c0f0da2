"""Decoding packed weights: a unit of one or more chunks at a time."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from gqsa_compiler._tvm import B
from gqsa_compiler.checkpoint import symmetric_zero
from gqsa_compiler.schedules.generic.emit import (
    Buffer,
    Expr,
    broadcast,
    cast,
    const,
    half_to_float,
    int64,
    load,
    pick,
    store,
    vector,
)
from gqsa_compiler.schedules.records.weights import RecordWeights
from gqsa_compiler.schedules.x86 import splat


@dataclass(frozen=True)
class Weights(RecordWeights):
    """A layer's packed tensors inside a kernel.

    Parameters
    ----------
    lanes : int
        16-bit lanes of the target's vector registers.
    native_half : bool
        The target converts float16 itself.
    ahead : int
        Bytes between a record that is multiplied and one that is asked for; 0: none.
    """

    lanes: int
    native_half: bool
    ahead: int = 0

    def unit_scales(self, record: Expr) -> Expr:
        """Emit the scales of a unit's groups without their row's factor, float32."""
        count = self.chunks.groups
        at = record + int64(self.records.scales_at)
        if self.records.half_scales:
            raw = load(self.bytes, at, lanes=2 * count)
            half = B.reinterpret(vector("float16", count), raw)
            return B.bind(half_to_float(half, count, native=self.native_half))
        raw = load(self.bytes, at, lanes=count)
        if not self.records.symmetric:
            root = B.bind(cast("float32", cast("int32", raw, count), count))
            return B.bind(root * root)
        signed = cast("int32", B.reinterpret(vector("int8", count), raw), count)
        root = B.bind(cast("float32", signed, count))
        return B.bind(root * B.abs(root))

    def _unit_zeros(self, record: Expr) -> Expr:
        """Emit the zero points of a unit's groups, int16."""
        records, count = self.records, self.chunks.groups
        if records.symmetric:
            return broadcast(const(symmetric_zero(self.spec.bits), "int16"), count)
        if records.zeros_in_steps or records.zero_bytes == count:
            at = records.steps_at if records.zeros_in_steps else records.zeros_at
            zeros = load(self.bytes, record + int64(at), lanes=count)
            if self.chunks.bits < 8:
                zeros = B.bitwise_and(zeros, broadcast(const(15, "uint8"), count))
            return B.bind(cast("int16", zeros, count))
        half = records.zero_bytes
        both = B.bind(load(self.bytes, record + int64(records.zeros_at), lanes=half))
        low = B.bind(B.bitwise_and(both, broadcast(const(15, "uint8"), half)))
        high = B.bind(B.shift_right(both, broadcast(const(4, "uint8"), half)))
        return B.bind(cast("int16", pick([low, high], range(count)), count))

    def unit_columns(self, record: Expr, place: Expr, column: Buffer) -> list[Expr]:
        """Emit the columns that a unit's groups begin with, in pairs of columns, int64.

        Parameters
        ----------
        place : Expr
            The unit's number in its row.
        column : Buffer
            int64 [1], the last of them of the unit before, at first 0; moved on.
        """
        records, size = self.records, self.spec.group_size
        count = self.chunks.groups
        if records.full:
            start = B.bind(place * int64(count * size // 2))
            return [start + int64(g * size // 2) for g in range(count)]
        here, columns = load(column, 0), []
        at = record + int64(records.steps_at)
        # In scalar registers: LLVM would compute them as a vector and extract each.
        for first in range(0, count, 8):
            lanes = min(8, count - first)
            raw = load(self.bytes, at + int64(first), lanes=lanes)
            word = B.bind(B.Cast("uint64", B.reinterpret(f"uint{8 * lanes}", raw)))
            for g in range(lanes):
                here = B.bind(here + int64(self._step(word, g)))
                columns.append(here)
        store(column, here, 0)
        return columns

    def _step(self, word: Expr, group: int) -> Expr:
        """Emit the pairs of columns that byte `group` of a word of 64 bits steps over."""
        # (byte, or its high half) * G / 2 in one shift and one mask.
        bit, most = (8 * group, 255) if not self.records.zeros_in_steps else (8 * group + 4, 15)
        power = self.spec.group_size.bit_length() - 2
        by = const(abs(bit - power), "uint64")
        if bit != power:
            word = B.shift_right(word, by) if bit > power else B.shift_left(word, by)
        return B.bitwise_and(word, const(most << power, "uint64"))

    @property
    def splats(self) -> bool:
        """Whether zero points are copied to all lanes and picked there."""
        return self.records.zeros_in_steps and self.chunks.groups in splat.SIZES

    def helpers(self) -> AbstractContextManager[None]:
        """Make what the other methods call known to the code that the block emits."""
        return splat.helpers(self.chunks.groups, self.lanes) if self.splats else nullcontext()

    def unit_codes(self, record: Expr) -> list[Expr]:
        """Emit a unit's codes less their zero points: vectors of int16, in the groups' order."""
        chunks = self.chunks
        if self.splats:
            at = record + int64(self.records.steps_at)
            copies = splat.splat(self.bytes, at, chunks.groups, self.lanes)
            mask = broadcast(const(15, "int8"), 2 * self.lanes)
            zeros = B.bind(B.bitwise_and(copies, mask))
        else:
            zeros = self._unit_zeros(record)
        vectors = []
        for chunk in range(chunks.chunks):
            raw = load(self.bytes, record + int64(chunk * chunks.lanes), lanes=chunks.lanes)
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
                if self.splats:
                    zero = splat.spread(zeros, groups, chunks.lanes, self.lanes)
                else:
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
