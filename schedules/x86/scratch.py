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
        float32, one a group; 0 for those outside the row.
    """

    pairs: Buffer
    scales: Buffer

    @classmethod
    def allocate(cls) -> Scratch:
        """Emit the allocation, which is a task's."""
        pairs = B.alloc_buffer((BLOCK_BYTES // 4,), "int32")
        # More than 1 kB, or TVM puts it on the stack.
        scales = B.alloc_buffer((2 * BLOCK_BYTES // _LEAST_GROUP,), "float32")
        return cls(pairs, scales)

    def decode(self, weights: Weights, unit: Expr, place: Expr, first: Expr, last: Expr) -> None:
        """Emit the decoding of a unit to the block's unit number `place`."""
        chunks = weights.chunks
        half = chunks.lanes // 2
        group = B.bind(unit * int64(chunks.groups))
        scales = weights.unit_scales(group, first, last)
        store(self.scales, scales, place * int64(chunks.groups), lanes=chunks.groups)
        start = B.bind(place * int64(chunks.vectors * half))
        for v, code in enumerate(weights.unit_codes(unit, weights.unit_zeros(group))):
            words = B.reinterpret(f"int32x{half}", code)
            store(self.pairs, words, start + int64(v * half), lanes=half)
