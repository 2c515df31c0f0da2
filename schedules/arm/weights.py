"""Decoding packed weights: vectors of 16 codes less their zero points."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gqsa_compiler._tvm import B
from gqsa_compiler.checkpoint import symmetric_zero
from gqsa_compiler.schedules.arm import address
from gqsa_compiler.schedules.arm.dot import COLUMNS
from gqsa_compiler.schedules.arm.pack import signed_codes
from gqsa_compiler.schedules.generic.emit import (
    Buffer,
    Expr,
    broadcast,
    cast,
    const,
    int64,
    lanes_of,
    load,
    pick,
    store,
    vector,
)
from gqsa_compiler.schedules.records.weights import RecordWeights

_ROWS, _FEW = 4, 2
_WORD = 8
"""Bytes of a 64-bit word, and of the smallest vector that needs no widening."""


@dataclass(frozen=True)
class Weights(RecordWeights):
    """A layer's packed tensors inside a kernel.

    Parameters
    ----------
    as_bytes : bool
        Codes less their zero points are multiplied as bytes, else as 16-bit halves.
    constants : Buffer
        float32 [N]: what bytes add to a row for each token, before the token's scale.
    """

    as_bytes: bool
    constants: Buffer

    @property
    def count(self) -> int:
        """Vectors of 16 codes that are decoded together."""
        return self.chunks.vectors * self.chunks.lanes // COLUMNS

    @property
    def rows_together(self) -> int:
        """Rows of one token that share loads of activations: where all have the same groups.

        Records of many groups need the registers for themselves.
        """
        return _ROWS if self.records.full and self.chunks.groups <= _FEW else 1

    def unit_codes(self, record: Expr) -> list[Expr]:
        """Emit a unit's codes less their zero points, in the groups' order.

        Returns
        -------
        list of Expr
            int8x16, or int16x16.
        """
        chunks = self.chunks
        codes = []
        for chunk in range(chunks.chunks):
            starts = range(chunk * chunks.lanes, (chunk + 1) * chunks.lanes, COLUMNS)
            raw = [B.bind(load(self.bytes, record + int64(at), lanes=COLUMNS)) for at in starts]
            codes += [self._field(half, f) for f in range(chunks.fields) for half in raw]
        if signed_codes(self.records):
            codes = [B.reinterpret("int8x16", code) for code in codes]
        else:
            kind = "int8" if self.as_bytes else "int16"
            zeros = [cast(kind, zero, COLUMNS) for zero in self._zeros(record)]
            codes = [cast(kind, c, COLUMNS) - z for c, z in zip(codes, zeros, strict=True)]
        return [B.bind(c if self.as_bytes else cast("int16", B.bind(c), COLUMNS)) for c in codes]

    def _field(self, raw: Expr, field: int) -> Expr:
        """Emit 16 codes of a field of 16 bytes, uint8."""
        bits = self.chunks.bits
        if field > 0:
            raw = B.shift_right(raw, broadcast(const(bits * field, "uint8"), COLUMNS))
        if field < self.chunks.fields - 1:
            raw = B.bitwise_and(raw, broadcast(const((1 << bits) - 1, "uint8"), COLUMNS))
        return raw

    def _zeros(self, record: Expr) -> list[Expr]:
        """Emit the zero points of each vector's codes, uint8x16."""
        if self.records.symmetric:
            zero = const(symmetric_zero(self.spec.bits), "uint8")
            return [broadcast(zero, COLUMNS)] * self.count
        zeros, places = self._unit_zeros(record)
        result = []
        for v in range(self.count):
            groups = self.chunks.groups_of(v, COLUMNS)
            lanes = [places[groups[i * len(groups) // COLUMNS]] for i in range(COLUMNS)]
            result.append(B.bind(_spread(zeros, lanes)))
        return result

    def _unit_zeros(self, record: Expr) -> tuple[list[Expr], list[int]]:
        """Emit vectors that have the zero points of all groups, and say in which lanes."""
        records, count = self.records, self.chunks.groups
        if records.zeros_in_steps or records.zero_bytes == count:
            at = records.steps_at if records.zeros_in_steps else records.zeros_at
            both, first, lanes = self._tail(record, at, count)
            if self.chunks.bits < 8:
                both = B.bind(B.bitwise_and(both, broadcast(const(15, "uint8"), lanes)))
            return [both], [first + g for g in range(count)]
        half = records.zero_bytes
        both, first, lanes = self._tail(record, records.zeros_at, half)
        low = B.bind(B.bitwise_and(both, broadcast(const(15, "uint8"), lanes)))
        high = B.bind(B.shift_right(both, broadcast(const(4, "uint8"), lanes)))
        return [low, high], [first + g % half + g // half * lanes for g in range(count)]

    def _tail(self, record: Expr, at: int, count: int) -> tuple[Expr, int, int]:
        """Load `count` bytes of a record from `at` on: uint8, their first lane, and all lanes.

        What follows the codes shares one register where it fits: a narrow vector is widened first.
        """
        size = self.records.size
        for lanes in (_WORD, 2 * _WORD):
            if size - self.records.scales_at <= lanes:
                start = record + int64(size - lanes)
                return B.bind(load(self.bytes, start, lanes=lanes)), at - (size - lanes), lanes
        value = load(self.bytes, record + int64(at), lanes=count)
        return B.bind(value if count > 1 else broadcast(value, 2)), 0, max(count, 2)

    def unit_scales(self, record: Expr) -> Expr:
        """Emit the scales of a unit's groups without their row's factor, float32."""
        records, count = self.records, self.chunks.groups
        if records.half_scales:
            raw = load(self.bytes, record + int64(records.scales_at), lanes=2 * count)
            half = B.reinterpret(vector("float16", count), raw)
            return B.bind(cast("float32", half, count))
        raw, first, lanes = self._tail(record, records.scales_at, count)
        if records.symmetric:
            root = B.bind(cast("int16", B.reinterpret(f"int8x{lanes}", raw), lanes))
            square = root * B.abs(root)
        else:
            root = B.bind(cast("uint16", raw, lanes))
            square = root * root
        return B.bind(cast("float32", pick([B.bind(square)], range(first, first + count)), count))

    def unit_columns(self, record: Expr, place: Expr, column: Buffer) -> list[Expr]:
        """Emit the columns that a unit's groups begin with, in pairs of columns, int64.

        Parameters
        ----------
        place : Expr
            The unit's number in its row.
        column : Buffer
            int64 [1], the last of them of the unit before, at first 0; moved on.
        """
        half = self.spec.group_size // 2
        if self.records.full:
            return self._consecutive(B.bind(place * int64(self.chunks.groups * half)), half)

        def step(word: Expr, group: int) -> Expr:
            shift, most = self._step(group, half)
            by = const(abs(shift), "int64")
            if shift:
                word = B.shift_right(word, by) if shift > 0 else B.shift_left(word, by)
            return B.bitwise_and(word, int64(most))

        return self._stepped(record, column, step)

    def unit_addresses(self, record: Expr, place: Expr, last: Buffer) -> list[Expr]:
        """Emit the addresses of the only token's bytes for a unit's groups, int64.

        Parameters
        ----------
        place : Expr
            The unit's number in its row.
        last : Buffer
            int64 [1], that of the group before the unit's first, at first of column 0; moved on.
        """
        size = 2 * self.spec.group_size
        if self.records.full:
            first = load(last, 0) + place * int64(self.chunks.groups * size)
            return self._consecutive(B.bind(first), size)

        def step(word: Expr, group: int) -> Expr:
            return address.step(word, *self._step(group, size))

        return self._stepped(record, last, step)

    def step_shifts(self) -> list[int]:
        """List the shifts of `unit_addresses`."""
        if self.records.full:
            return []
        size = 2 * self.spec.group_size
        return [self._step(group, size)[0] for group in range(self.chunks.groups)]

    def _consecutive(self, first: Expr, size: int) -> list[Expr]:
        return [first + int64(g * size) for g in range(self.chunks.groups)]

    def _stepped(self, record: Expr, last: Buffer, step: Callable[[Expr, int], Expr]) -> list[Expr]:
        """Emit the sums of the steps up to each of a unit's groups, and of what `last` holds.

        Parameters
        ----------
        step : callable
            ``step(word, group)`` emits a group's step, from an int64 of eight groups' bytes.
        """
        count = self.chunks.groups
        here, result = load(last, 0), []
        at = record + int64(self.records.steps_at)
        # In scalar registers: LLVM would compute them as a vector and extract each.
        for first in range(0, count, _WORD):
            lanes = min(_WORD, count - first)
            raw = load(self.bytes, at + int64(first), lanes=lanes)
            word = B.Cast("uint64", B.reinterpret(f"uint{8 * lanes}", raw))
            word = B.bind(B.Cast("int64", word))
            for g in range(lanes):
                here = B.bind(here + step(word, g))
                result.append(here)
        store(last, here, 0)
        return result

    def _step(self, group: int, size: int) -> tuple[int, int]:
        """Return the shift and the mask by which a word gives a group's step times `size`."""
        bit, most = 8 * (group % _WORD), 255
        if self.records.zeros_in_steps:
            bit, most = bit + 4, 15
        power = size.bit_length() - 1
        return bit - power, most << power

    def spread(self, values: Expr, groups: Sequence[int], lanes: int) -> Expr:
        """Give every lane of a vector its group's value.

        Parameters
        ----------
        values : Expr
            One a group of the unit.
        groups : sequence of int
            Those that the lanes belong to, which share them evenly.
        lanes : int
            Of the result.
        """
        if self.chunks.groups == 1:
            return broadcast(values, lanes)
        return _spread([values], [groups[i * len(groups) // lanes] for i in range(lanes)])


def _spread(vectors: list[Expr], lanes: list[int]) -> Expr:
    """Pick lanes, also more of them than there are: a shuffle may not have more than its input."""
    have = sum(lanes_of(v) for v in vectors)
    return pick(vectors * max(1, -(-len(lanes) // have)), lanes)
