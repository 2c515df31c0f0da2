"""Where a task keeps decoded weights for the tokens of a tile."""

from __future__ import annotations

from dataclasses import dataclass

from gqsa_compiler._tvm import B
from gqsa_compiler.schedules.arm.weights import Weights
from gqsa_compiler.schedules.generic.emit import Buffer, Expr, int64, store

BLOCK_CODES = 1024
"""Codes of a block of a row's groups, which stays in the first-level cache."""
_LEAST_GROUP = 8


@dataclass(frozen=True)
class Scratch:
    """A block of decoded groups.

    Parameters
    ----------
    codes : Buffer
        Codes less their zero points: int32, four bytes in each, or int16.
    scales : Buffer
        float32, one a group, without the row's factor.
    columns : Buffer
        int32, the column that each group begins with, in pairs of columns.
    """

    codes: Buffer
    scales: Buffer
    columns: Buffer

    @classmethod
    def allocate(cls, weights: Weights) -> Scratch:
        """Emit the allocation, which is a task's."""
        if weights.as_bytes:
            codes = B.alloc_buffer((BLOCK_CODES // 4,), "int32")
        else:
            codes = B.alloc_buffer((BLOCK_CODES,), "int16")
        # More than 1 kB, or TVM puts them on the stack.
        groups = 2 * BLOCK_CODES // _LEAST_GROUP + 8
        return cls(codes, B.alloc_buffer((groups,), "float32"), B.alloc_buffer((groups,), "int32"))

    def decode(
        self, weights: Weights, record: Expr, unit: Expr, place: Expr, column: Buffer
    ) -> None:
        """Emit the decoding of a record to the block's unit number `unit`.

        Parameters
        ----------
        place, column
            As `Weights.unit_columns` takes them.
        """
        chunks = weights.chunks
        group = B.bind(unit * int64(chunks.groups))
        store(self.scales, weights.unit_scales(record), group, lanes=chunks.groups)
        last = int64((weights.spec.k - weights.spec.group_size) // 2)
        for g, first in enumerate(weights.unit_columns(record, place, column)):
            # What fills up a row of all groups has no columns of its own; its scale is 0.
            inside = B.min(first, last) if weights.overhang else first
            store(self.columns, B.Cast("int32", inside), group + int64(g))
        vectors = weights.unit_codes(record)
        start = B.bind(unit * int64(len(vectors)))
        for v, code in enumerate(vectors):
            at = start + int64(v)
            if weights.as_bytes:
                store(self.codes, B.reinterpret("int32x4", code), at * int64(4), lanes=4)
            else:
                store(self.codes, code, at * int64(16), lanes=16)
