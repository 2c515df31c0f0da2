"""Which stored rows the blocks of outputs have that the kernels with 8-bit activations finish."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gqsa_compiler._tvm import B
from gqsa_compiler.schedules.generic.emit import Expr, int64
from gqsa_compiler.schedules.generic.layout import units_of
from gqsa_compiler.schedules.records.layout import output_block
from gqsa_compiler.schedules.spec import LinearSpec


def blocks(spec: LinearSpec) -> int:
    """Count the blocks of outputs; the last may have outputs again of the one before it."""
    return -(-units_of(spec) // output_block(spec))


def stored_rows(spec: LinearSpec) -> npt.NDArray[np.int64]:
    """Return the stored rows of each block: [blocks, 1 or 2, outputs]; gate rows, then up rows."""
    block = output_block(spec)
    rows = 2 if spec.epilogue.gated else 1
    first = np.minimum(np.arange(blocks(spec)) * block, units_of(spec) - block)
    outputs = first[:, None] + np.arange(block)
    parts = [outputs * rows + part for part in range(rows)]
    return np.stack(parts, axis=1)


def place(spec: LinearSpec, start: Expr, number: Expr) -> tuple[Expr, Expr]:
    """Emit a task's block: its first output, and its number among all; int64.

    Parameters
    ----------
    start : Expr
        The task's first output, a multiple of a block's.
    number : Expr
        Of the task's blocks.
    """
    block = output_block(spec)
    begin = B.bind(start + number * int64(block))
    unit = B.bind(B.min(begin, int64(spec.n_out - block)))
    return unit, B.bind(B.floordiv(begin, int64(block)))
