"""Where a task keeps decoded weights for the tokens of a tile."""

from __future__ import annotations

from dataclasses import dataclass

from gqsa_compiler._tvm import B
from gqsa_compiler.schedules.generic.emit import Buffer, Expr, int64, store
from gqsa_compiler.schedules.x86.weights import Weights

BLOCK_BYTES = 2048
"""Bytes of decoded codes: a block of a row's groups, which stays in the first-level cache."""
_LEAST_GROUP = 8


@dataclass(frozen=True)
class Scratch:
    """A block of decoded groups.

    It comes from the runtime's workspace, not from the stack, which is not aligned to a vector:
    a store across two cache lines cannot be forwarded to the loads that follow (7 times slower).

    Parameters
    ----------
    pairs : Buffer
        int32 [BLOCK_BYTES / 4]: codes less their zero points, two in each.
    scales : Buffer
        float32, one a group, without the row's factor.
    columns : Buffer
        int32, the column that each group begins with, in pairs of columns.
    """

    pairs: Buffer
    scales: Buffer
    columns: Buffer

    @classmethod
    def allocate(cls) -> Scratch:
        """Emit the allocation, which is a task's."""
        pairs = B.alloc_buffer((BLOCK_BYTES // 4,), "int32")
        # More than 1 kB, or TVM puts them on the stack.
        groups = 2 * BLOCK_BYTES // _LEAST_GROUP
        return cls(pairs, B.alloc_buffer((groups,), "float32"), B.alloc_buffer((groups,), "int32"))

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
        half = chunks.lanes // 2
        group = B.bind(unit * int64(chunks.groups))
        store(self.scales, weights.unit_scales(record), group, lanes=chunks.groups)
        last = int64((weights.spec.k - weights.spec.group_size) // 2)
        for g, first in enumerate(weights.unit_columns(record, place, column)):
            # What fills up a row of all groups has no columns of its own; its scale is 0.
            inside = B.min(first, last) if weights.overhang else first
            store(self.columns, B.Cast("int32", inside), group + int64(g))
        start = B.bind(unit * int64(chunks.vectors * half))
        for v, code in enumerate(weights.unit_codes(record)):
            words = B.reinterpret(f"int32x{half}", code)
            store(self.pairs, words, start + int64(v * half), lanes=half)
