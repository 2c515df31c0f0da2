"""Cuts a layer's stream of units into blocks of equal work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gqsa_compiler.schedules.cuda.arch import WARP

SLACK = 1.1
"""How much more than the mean a block may have before outputs are cut between blocks.

A cut output costs its blocks a fence, an atomic operation and a read of the others' sums, one to
two microseconds of a launch of two to ten; with 30 rows a block whole outputs come within 3 %.
"""
INFO = 8
"""Integers of a block's record: first tile, past-the-last tile, first stored row, last one, the
block in which the first row's output begins, the last block of that output, the last block of the
block's last output, 0."""

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Partition:
    """A stream cut into blocks.

    Parameters
    ----------
    cuts : int64 [blocks + 1]
        First unit of each block, in the stream without padding.
    tiles : int64 [blocks + 1]
        First tile of each block.
    info : int32 [blocks, INFO]
    """

    cuts: Array
    tiles: Array
    info: Array

    def place(self, unit: Array) -> Array:
        """Return where a unit of the stream lies when every block is padded to whole tiles."""
        blocks = np.searchsorted(self.cuts[1:-1], unit, side="right")
        return self.tiles[blocks] * WARP + unit - self.cuts[blocks]


def cut_stream(
    units: Array, rows_a_output: int, blocks: int, most_rows: int, span: int
) -> Partition:
    """Cut a layer.

    Parameters
    ----------
    units : int64 [N]
        Units of each stored row, at least one.
    rows_a_output : int
        2 in a gated layer, whose gate and up rows are neighbours.
    blocks : int
    most_rows : int
        Rows that a block may touch; at least twice the mean.
    span : int
        Units that may not be parted.
    """
    starts = np.concatenate([[0], np.cumsum(units)])
    outputs = starts[::rows_a_output]
    mean = max(1.0, starts[-1] / blocks)
    row_cost = 0
    while True:
        # Rows of few units: a row's own cost keeps their number in a block down.
        costs = outputs + row_cost * rows_a_output * np.arange(len(outputs))
        cuts = _nearest(outputs, costs, blocks)
        if row_cost == 0 and np.diff(cuts).max() > SLACK * mean:
            goals = np.arange(blocks + 1) * (starts[-1] // span) // blocks * span
            goals[-1] = starts[-1]
            if _rows(starts, goals).max() <= most_rows:
                cuts = goals
                break
        if _rows(starts, cuts).max() <= most_rows:
            break
        row_cost = max(1, 2 * row_cost)
    return _describe(starts, cuts, rows_a_output)


def _nearest(outputs: Array, costs: Array, blocks: int) -> Array:
    """Cut at the outputs whose running cost is nearest to equal shares."""
    goals = np.arange(1, blocks) * costs[-1] / blocks
    after = np.clip(np.searchsorted(costs, goals), 1, len(costs) - 1)
    before = goals - costs[after - 1] < costs[after] - goals
    chosen = np.where(before, after - 1, after)
    return np.concatenate([[0], outputs[chosen], [outputs[-1]]])


def _rows(starts: Array, cuts: Array) -> Array:
    """Count the rows that each block touches."""
    first = np.searchsorted(starts, cuts[:-1], side="right") - 1
    last = np.searchsorted(starts, cuts[1:], side="left") - 1
    return last - first + 1


def _describe(starts: Array, cuts: Array, rows_a_output: int) -> Partition:
    blocks = len(cuts) - 1
    tiles = np.concatenate([[0], np.cumsum(-(-np.diff(cuts) // WARP))])
    info = np.zeros((blocks, INFO), np.int32)
    info[:, 0], info[:, 1] = tiles[:-1], tiles[1:]
    own = np.arange(blocks)
    info[:, 4:7] = own[:, None]
    used = cuts[1:] > cuts[:-1]
    first = np.searchsorted(starts, cuts[:-1], side="right") - 1
    last = np.searchsorted(starts, cuts[1:], side="left") - 1
    info[used, 2], info[used, 3] = first[used], last[used]
    numbers = np.flatnonzero(used)
    begin = starts[first[used] // rows_a_output * rows_a_output]
    # Among the blocks that have work: where an output begins and ends.
    inner = cuts[1:][used]
    info[used, 4] = numbers[np.searchsorted(inner, begin, side="right")]
    for column, row in ((5, first), (6, last)):
        end = starts[(row[used] // rows_a_output + 1) * rows_a_output]
        info[used, column] = numbers[np.searchsorted(inner, end - 1, side="right")]
    # An output that goes through the whole block is its first one only.
    through = (info[:, 4] < own) & (first // rows_a_output == last // rows_a_output)
    info[through, 6] = own[through]
    return Partition(cuts, tiles, info)
