"""The pages of the KV cache, as kernels see them: [pages, 2 (K, V), Hkv, page_size, D].

TVM's runtime knows one dtype for pages, q, k, v and attention's output, and ours but for the pages
are float32. So a float16 cache is float32 to the runtime too, and the kernels, the only ones that
look into it, keep float16 numbers there without gaps: page p lies where a float16 tensor would have
it, in the first half of the memory. The second half is never touched, so it costs address space
and no memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gqsa_compiler._tvm import B
from gqsa_compiler.schedules.generic.attention_common import AttentionShape
from gqsa_compiler.schedules.generic.emit import (
    Buffer,
    Expr,
    argument,
    copy,
    extent,
    float_to_half,
    half_to_float,
    load,
    prefetch,
    store,
)


def pages_argument(shape: AttentionShape) -> Buffer:
    """Declare the pages as the function's next argument, as the runtime sees them."""
    kv_heads, page, dim = shape.num_kv_heads, shape.page_size, shape.head_dim
    return argument("pages", (extent("num_pages"), 2, kv_heads, page, dim))


@dataclass(frozen=True)
class Pages:
    """What the pages hold; all that is loaded from them or stored is float32."""

    shape: AttentionShape
    buffer: Buffer

    @classmethod
    def of(cls, shape: AttentionShape, stored: Buffer) -> Pages:
        """Look into the pages, after the last argument is declared."""
        if not shape.half:
            return cls(shape, stored)
        return cls(shape, B.decl_buffer(stored.shape, "float16", data=stored.data))

    def load(self, *indices: Expr, lanes: int = 1) -> Expr:
        """Load `lanes` consecutive features."""
        value = load(self.buffer, *indices, lanes=lanes)
        if not self.shape.half:
            return value
        return half_to_float(B.bind(value), lanes, native=self.shape.native_half)

    def fetch(self, page: Expr, head: Expr) -> None:
        """Ask for a head's keys and values of a page: they come while others are computed with."""
        line = 64 // (2 if self.shape.half else 4)
        keys, dim = self.shape.page_size, self.shape.head_dim
        with B.grid(2, keys * dim // line) as (part, i):
            at = B.bind(i * line)
            prefetch(self.buffer, page, part, head, B.floordiv(at, dim), B.floormod(at, dim))

    def store(self, value: Expr, *indices: Expr, lanes: int = 1) -> None:
        """Store `lanes` consecutive features."""
        if self.shape.half:
            value = float_to_half(B.bind(value), lanes, native=self.shape.native_half)
        store(self.buffer, value, *indices, lanes=lanes)

    def move(self, to: Sequence[Expr], origin: Sequence[Expr]) -> None:
        """Copy the features of a key or value to another place, as they are."""
        copy(self.buffer, to, self.buffer, origin, self.shape.head_dim, self.shape.feature_lanes)
