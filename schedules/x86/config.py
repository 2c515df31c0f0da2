"""What the x86 kernels can be tuned by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from gqsa_compiler.schedules.generic.config import GenericConfig, task_counts

AHEAD = 8192
"""Bytes between a record that is multiplied and one that is asked for, by default.

The hardware asks for less: with 2048 x 8192 weights from memory this makes 129 of 105 billion
weights a second (half of the groups kept, 2 threads of an AMD EPYC); 512 bytes make no difference.
"""
LEAST = 24
"""Tokens from which bfloat16 products are quicker than the kernels that skip absent groups."""
ROWS = 8
"""Rows decoded together: with two vectors of tokens, 16 of the 32 registers are sums."""

_AHEAD = (AHEAD, 0, 2048, 4096, 16384)
_LEAST = (LEAST, 8, 16, 32, 48)
_ROWS = (ROWS, 4)


@dataclass(frozen=True)
class X86Config(GenericConfig):
    """Configuration of an x86 kernel; `tasks` alone matters to its packed layout.

    Parameters
    ----------
    ahead : int
        Bytes between a record that is multiplied and one that is asked for; 0: none is asked for.
    wide_from : int
        Tokens from which products are bfloat16 ones, where the target has them.
    wide_rows : int
        Rows decoded together for those, a power of two up to 8.
    """

    ahead: int = AHEAD
    wide_from: int = LEAST
    wide_rows: int = ROWS


def space(units: int, lanes: int, *, bfloat16: bool) -> Sequence[X86Config]:
    """List the configurations for `units` independent outputs; the first is the default."""
    tasks = task_counts(units)
    # Few tokens one after the other, many side by side in the lanes of one or two vectors: four
    # read more activations at once than the second-level cache keeps, and are slower.
    if not bfloat16:
        sizes = ((4, lanes, 2 * lanes), (4, lanes), (2, 4, lanes), (4, 2 * lanes))
        return [
            X86Config(count, lanes, tiles, ahead)
            for count, tiles, ahead in product(tasks, sizes, _AHEAD)
        ]
    return [
        X86Config(count, lanes, tiles, ahead, least, rows)
        for count, tiles, ahead, least, rows in product(
            tasks, ((4,), (2, 4), (4, 8), (8,)), _AHEAD, _LEAST, _ROWS
        )
    ]
