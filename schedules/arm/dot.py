"""Integer dot products of Arm's vector instructions, and the sums of their lanes."""

from __future__ import annotations

from collections.abc import Sequence

from gqsa_compiler._tvm import B, T
from gqsa_compiler.schedules.generic.emit import Expr, broadcast, cast, const, pick

LANES = 4
"""32-bit lanes of a vector."""
COLUMNS = 16
"""Bytes of a vector: the codes that one instruction multiplies."""
BYTE_FEATURE = "dotprod"
BIAS = 128
"""What the low bytes of activations are less than their unsigned value, to be signed ones."""

_SDOT = "llvm.aarch64.neon.sdot.v4i32.v16i8"


def zero_counts() -> Expr:
    """Return an int32x4 of zeros."""
    return broadcast(const(0, "int32"), LANES)


def dot_bytes(sums: Expr, a: Expr, b: Expr) -> Expr:
    """Emit ``sums[i] + a[4i] b[4i] + ... + a[4i + 3] b[4i + 3]``: int32x4 of int8x16."""
    return B.bind(T.call_llvm_pure_intrin("int32x4", _SDOT, sums, a, b))


def dot_halves(sums: Expr, a: Expr, b: Expr, lanes: int) -> Expr:
    """Add the products of int16 vectors of `lanes` (a multiple of 4) to an int32x4."""
    for start in range(0, lanes, LANES):
        four = range(start, start + LANES)
        left, right = (cast("int32", pick([v], four), LANES) for v in (a, b))
        sums = B.bind(sums + left * right)
    return sums


def high_part(sums: Expr) -> Expr:
    """Multiply the sums of the high bytes' products with what a high byte is worth."""
    return B.bind(B.shift_left(sums, broadcast(const(8, "int32"), LANES)))


def sum_neighbours(vectors: Sequence[Expr], groups: Sequence[int]) -> list[tuple[Expr, list[int]]]:
    """Add lanes that belong to the same group, while there are several vectors (`addp`).

    Parameters
    ----------
    vectors : sequence of Expr
        int32x4, a power of two of them.
    groups : sequence of int
        The group of every lane of all vectors, ascending.

    Returns
    -------
    list of (vector, groups)
        int32x4 vectors, and the group of each of their lanes.
    """
    current, labels = list(vectors), list(groups)
    while len(current) > 1 and labels[0] == labels[1]:
        even = [pick(pair, range(0, 2 * LANES, 2)) for pair in _pairs(current)]
        odd = [pick(pair, range(1, 2 * LANES, 2)) for pair in _pairs(current)]
        current = [B.bind(a + b) for a, b in zip(even, odd, strict=True)]
        labels = labels[::2]
    return [(v, labels[i * LANES : (i + 1) * LANES]) for i, v in enumerate(current)]


def _pairs(vectors: Sequence[Expr]) -> list[list[Expr]]:
    return [list(pair) for pair in zip(vectors[::2], vectors[1::2], strict=True)]
