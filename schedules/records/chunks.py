"""How the codes of records lie in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from gqsa_compiler.schedules.generic.layout import Array


@dataclass(frozen=True)
class Chunks:
    """How the codes of a unit lie in memory: one or more chunks of `lanes` bytes.

    Field f of a byte, of `bits` bits and the lowest first, belongs to vector f of the chunk: one
    load, shifts and masks give `fields` vectors of codes in the order of the groups' elements.

    Parameters
    ----------
    bits : int
        Of a packed code.
    group_size : int

    Attributes
    ----------
    lanes : int
        16-bit lanes of a vector: one register of AVX-512, two of AVX2. The same for every target,
        so that code for either reads the same bytes.
    """

    lanes: ClassVar[int] = 32

    bits: int
    group_size: int

    @property
    def fields(self) -> int:
        """Vectors of codes in a chunk."""
        return 8 // self.bits

    @property
    def groups(self) -> int:
        """Groups of a unit, decoded together: those of a chunk, or one that has several."""
        return max(1, self.fields * self.lanes // self.group_size)

    @property
    def chunks(self) -> int:
        """Chunks that are decoded together: one, or all of a group."""
        return max(1, self.group_size // (self.fields * self.lanes))

    @property
    def vectors(self) -> int:
        """Vectors of codes that are decoded together."""
        return self.chunks * self.fields

    @property
    def bytes(self) -> int:
        """Bytes that are decoded together."""
        return self.chunks * self.lanes

    def groups_of(self, vector: int, lanes: int) -> list[int]:
        """List the groups that a vector's codes belong to, in order.

        Groups are counted in the unit, and so are vectors, of so many lanes each.
        """
        if self.group_size >= lanes:
            return [vector * lanes // self.group_size]
        inside = lanes // self.group_size
        return list(range(vector * inside, (vector + 1) * inside))

    def column_of(self, vector: int, lanes: int) -> int:
        """Return which element of its group a vector of so many lanes begins with."""
        return vector * lanes % self.group_size

    def encode(self, codes: Array) -> Array:
        """Put the codes of whole units, uint8 [groups, G], into bytes."""
        chunks = codes.reshape(-1, self.fields, self.lanes)
        joined = np.zeros((len(chunks), self.lanes), np.uint8)
        for field in range(self.fields):
            joined |= chunks[:, field] << np.uint8(self.bits * field)
        return joined.reshape(-1)
