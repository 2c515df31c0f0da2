"""The packed layout of the x86 BSR kernels (docs/kernels.md specifies it)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from gqsa_compiler.checkpoint import BSRLayer
from gqsa_compiler.schedules.generic.config import GenericConfig
from gqsa_compiler.schedules.generic.layout import BLOCK, Array, BsrLayout, pack_parts
from gqsa_compiler.schedules.spec import LinearSpec


@dataclass(frozen=True)
class Chunks:
    """How codes lie in the stream of all kept groups.

    The stream is cut into chunks of `lanes` bytes. Field f of a byte, of `bits` bits and the lowest
    first, belongs to vector f of the chunk: one load, shifts and masks give `fields` vectors of
    codes in the order of the groups' elements. A chunk knows no rows: a row may begin and end
    inside one.

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

    @classmethod
    def of(cls, spec: LinearSpec, config: GenericConfig) -> Chunks:
        """Derive the chunks of a layer."""
        return cls(BsrLayout.of(spec, config).code_bits, spec.group_size)

    @property
    def fields(self) -> int:
        """Vectors of codes in a chunk."""
        return 8 // self.bits

    @property
    def groups(self) -> int:
        """Groups that are decoded together: those of a chunk, or one that has several."""
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
        """Put codes, uint8 [groups, G] in the stream's order, into bytes; `BLOCK` spare groups."""
        size = self.group_size
        stream = np.zeros(((len(codes) + BLOCK) * size,), np.uint8)
        stream[: codes.size] = codes.reshape(-1)
        packed = np.zeros(stream.size * self.bits // 8, np.uint8)
        whole = stream.size // (self.fields * self.lanes)
        chunks = stream[: whole * self.fields * self.lanes].reshape(whole, self.fields, self.lanes)
        joined = packed[: whole * self.lanes].reshape(whole, self.lanes)
        for field in range(self.fields):
            joined |= chunks[:, field] << np.uint8(self.bits * field)
        return packed


def pack(spec: LinearSpec, config: GenericConfig, parts: Sequence[BSRLayer]) -> dict[str, Array]:
    """Pack folded layers; the tensors are those of `BsrLayout.params`.

    Raises
    ------
    CompileError
        The layers do not have the shape, bits, group size or number of groups `spec` says.
    """
    chunks = Chunks.of(spec, config)

    def encode(source: npt.NDArray[np.int64]) -> Array:
        return chunks.encode(np.concatenate([p.codes() for p in parts])[source])

    return pack_parts(spec, config, parts, encode)
