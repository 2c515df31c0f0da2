"""The packed layout of the sparse layers: one stream of units, cut into blocks of equal work.

A *unit* is what one lane takes at a time: 16 bytes of codes, 32 weights of one row where codes have
4 bits (64 of 2, 16 of 8). With G = 16 it then holds two groups, with G = 128 a quarter of one; a
*piece* is the smaller of group and unit. A
*tile* is 32 consecutive units, one a lane of a warp, so that a warp reads 512 bytes of codes in
one instruction. Every row is a whole number of units, at least one (groups of scale 0 fill it up),
and every block of the launch a whole number of tiles; a row may begin and end anywhere in a tile.

Within a row the order of the groups is free. It is chosen so that lanes that read their activations
from shared memory at the same time, eight with 16 bytes each, find them in different banks as far
as the row's columns allow: consecutive units take columns of different residue, and each lane
begins with another part of its piece (`StreamLayout.rotation`; its codes are stored in that order).

Bytes a kept group of 16 codes of 4 bits: 8 of codes, 2 of column and zero point, 2 of scale (or 1,
and 4 a row): 96 or 88 bits, and 1 for the marks of the rows' first units. (Codes of 2 bits: 64; of
8: 160, or 176 where they are not symmetric, as a zero point of 8 bits leaves a column too few.) At
50 % kept that is 3.03 or 2.78 bits a weight:

=============  ============  ===========
N x K, W4S50   16-bit scale  8-bit scale
=============  ============  ===========
4096 x 4096    6.4 MB        5.8 MB
4096 x 11008   17.1 MB       15.7 MB
4096 x 14336   22.2 MB       20.4 MB
=============  ============  ===========

A row bitmap instead of columns would save 10 of the 96 bits, but finding a lane's column in it
takes several instructions, and the order within a row would no longer be free. Not built.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gqsa_compiler.schedules.cuda.arch import WARP
from gqsa_compiler.schedules.spec import LinearSpec

UNIT_BITS = 128
"""Bits of a unit's codes: one load."""
CODE_BITS = (2, 4, 8)
"""Bits that a packed code may take; those of 3 bits take 4."""
CHUNK = 8
"""Activations of a 16-byte load, and the weights that meet them."""
SLAB = 256
"""Columns that the kernel for many tokens unpacks at a time, and the largest group."""
COLUMN_BITS = 12
"""Bits that a column may have; it is stored above its zero point."""

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class StreamLayout:
    """How groups of one size lie in units.

    Parameters
    ----------
    group_size : int
        G, 8 to 256, a power of two.
    code_bits : int
        Bits that a code takes: 2 (G at least 16), 4 or 8.
    symmetric : bool
        No zero points are stored.
    """

    group_size: int
    code_bits: int = 4
    symmetric: bool = False

    @classmethod
    def of(cls, spec: LinearSpec) -> StreamLayout:
        """Return the layout of a layer."""
        bits = min(bits for bits in CODE_BITS if bits >= spec.bits)
        if bits == 2 and spec.group_size < 2 * CHUNK:
            bits = 4  # a word has two chunks of 2-bit codes, both of one group
        return cls(spec.group_size, bits, spec.symmetric)

    @property
    def unit(self) -> int:
        """Weights of a unit."""
        return UNIT_BITS // self.code_bits

    @property
    def piece(self) -> int:
        """Weights of a piece: those of a unit that share a scale."""
        return min(self.group_size, self.unit)

    @property
    def pieces(self) -> int:
        """Pieces of a unit."""
        return self.unit // self.piece

    @property
    def span(self) -> int:
        """Units of a group: 1 as long as it fits one."""
        return max(1, self.group_size // self.unit)

    @property
    def chunks(self) -> int:
        """Chunks of a piece."""
        return self.piece // CHUNK

    @property
    def words(self) -> int:
        """Words of 32 bits that a piece's codes take."""
        return self.piece * self.code_bits // 32

    @property
    def residues(self) -> int:
        """Pieces that lie side by side in all 32 banks of shared memory (128 bytes)."""
        return 64 // self.piece

    @property
    def zero_bits(self) -> int:
        """Bits of the index below the column, of the zero point: none for symmetric bytes."""
        if self.code_bits == 8:
            return 0 if self.symmetric else 8
        return 4

    @property
    def index_bits(self) -> int:
        """Bits of a piece's index: column and zero point."""
        return 16 if self.zero_bits + COLUMN_BITS <= 16 else 32

    def place_of(self, chunk: int, element: int) -> tuple[int, int]:
        """Return which of a piece's words, from which bit on, holds a chunk's element.

        A pair of elements 2 p, 2 p + 1 lies 16 bits apart, so that one mask makes two halves of
        it. The same bits of a word's four bytes are elements 0 4 1 5, or 2 6 3 7: one mask makes
        the four bytes that ``dp2a`` multiplies (`activations.Prologue` pairs int16 so). Codes of 2
        bits: odd chunks lie in the high halves of the even ones' bytes.
        """
        pair, right = divmod(element, 2)
        bit = 16 * right + 8 * (pair // 2)
        if self.code_bits == 8:
            return 2 * chunk + pair % 2, bit
        if self.code_bits == 4:
            return chunk, bit + 4 * (pair % 2)
        return chunk // 2, bit + 4 * (chunk % 2) + 2 * (pair % 2)

    def rotation(self, lane: Array) -> Array:
        """Return which chunk r of its pieces a lane reads first; its c-th is chunk ``r ^ c``."""
        return lane // self.residues % self.chunks

    def units_of(self, groups: Array) -> Array:
        """Return the units of rows of so many groups."""
        return np.maximum(1, -(-groups // self.pieces)) * self.span


def place_groups(layout: StreamLayout, row_starts: Array, columns: Array) -> tuple[Array, Array]:
    """Choose the place of every group within its row.

    Parameters
    ----------
    row_starts : int64 [N + 1]
        First group of each row.
    columns : int64 [nnz]
        Column groups, ascending in a row.

    Returns
    -------
    unit, piece : int64 [nnz]
        Unit within the row (with G > 32: the group's first), and piece within the unit.
    """
    counts = np.diff(row_starts)
    rows = np.repeat(np.arange(len(counts)), counts)
    if layout.span > 1:
        return (np.arange(len(columns)) - row_starts[rows]) * layout.span, np.zeros_like(columns)
    residue = columns % layout.residues
    # Turn and turn about: the first column of each residue, then the second of each ...
    by_residue = np.lexsort((columns, residue, rows))
    bucket = rows[by_residue] * layout.residues + residue[by_residue]
    starts = np.flatnonzero(np.concatenate([[True], bucket[1:] != bucket[:-1]]))
    sizes = np.diff(np.concatenate([starts, [len(columns)]]))
    turn = np.empty(len(columns), np.int64)
    turn[by_residue] = np.arange(len(columns)) - np.repeat(starts, sizes)
    order = np.lexsort((residue, turn, rows))
    place = np.empty(len(columns), np.int64)
    place[order] = np.arange(len(columns)) - row_starts[rows[order]]
    # Units of `residues` lanes take their first pieces, then their second ones.
    block = layout.residues * layout.pieces
    rest = counts[rows] - place // block * block
    width = np.minimum(layout.residues, -(-rest // layout.pieces))
    inside = place % block
    return place // block * layout.residues + inside % width, inside // width


def pack_words(layout: StreamLayout, codes: Array, lanes: Array) -> Array:
    """Pack the codes of pieces.

    Parameters
    ----------
    codes : uint8 [pieces, piece]
        One code a byte.
    lanes : int64 [pieces]
        Place of each piece's unit in its tile.

    Returns
    -------
    uint32 [pieces, words]
        `StreamLayout.place_of` says where a chunk is: the c-th is the one that its lane reads as
        its c-th.
    """
    chunks = codes.reshape(len(codes), layout.chunks, CHUNK)
    read = np.arange(layout.chunks) ^ layout.rotation(lanes)[:, None]
    chunks = np.take_along_axis(chunks, read[:, :, None], axis=1)
    words = np.zeros((len(codes), layout.words), np.uint32)
    for chunk in range(layout.chunks):
        for element in range(CHUNK):
            word, bit = layout.place_of(chunk, element)
            words[:, word] |= chunks[:, chunk, element].astype(np.uint32) << np.uint32(bit)
    return words


def large_scales(scales: Array, rows: Array, count: int) -> tuple[Array, Array]:
    """Scale rows by powers of two, so that a code times its scale is a half for certain.

    Parameters
    ----------
    scales : float16 [nnz]
    rows : int64 [nnz]
    count : int
        Rows.

    Returns
    -------
    scales : float16 [nnz]
        The row's largest is 1 or more, below 2; exact but for those below 2^-14 of it.
    factors : float32 [count]
    """
    _, exponents = np.frexp(_largest(scales, rows, count))
    factors = np.exp2(exponents - 1.0)
    return (scales.astype(np.float64) / factors[rows]).astype(np.float16), factors.astype(
        np.float32
    )


def _largest(scales: Array, rows: Array, count: int) -> Array:
    largest = np.zeros(count)
    np.maximum.at(largest, rows, np.abs(scales.astype(np.float64)))
    return largest


def small_scales(scales: Array, rows: Array, count: int) -> tuple[Array, Array]:
    """Round scales of one sign to 3 bits of exponent and 5 of mantissa.

    Parameters
    ----------
    scales : float16 [nnz], not negative
    rows : int64 [nnz]
    count : int
        Rows.

    Returns
    -------
    codes : uint8 [nnz]
        A code's value is the float16 whose bits are ``code << 5``, times its row's factor.
    factors : float32 [count]
    """
    values = (np.arange(256, dtype=np.uint16) << 5).view(np.float16).astype(np.float64)
    factors = (_largest(scales, rows, count) / values[-1]).astype(np.float32)
    safe = np.where(factors > 0, factors, 1).astype(np.float64)
    wanted = scales.astype(np.float64) / safe[rows]
    return np.searchsorted((values[1:] + values[:-1]) / 2, wanted).astype(np.uint8), factors


assert WARP == 32  # a tile's marks are the bits of one word
