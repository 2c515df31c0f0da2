"""What the GPU's attention kernels share: who sees what, and where keys lie."""

from __future__ import annotations

from dataclasses import dataclass

from gqsa_compiler._tvm import B
from gqsa_compiler.schedules.generic.attention_common import AttentionShape
from gqsa_compiler.schedules.generic.emit import Buffer, Expr, const, int64, load
from gqsa_compiler.schedules.generic.math import LOG2_E


def magnitude(sm_scale: Expr) -> Expr:
    """Emit the factor of scores, for powers of two; its sign says which layers slide."""
    zero = const(0.0, "float32")
    return B.bind(B.max(sm_scale, zero - sm_scale) * const(LOG2_E, "float32"))


def first_unseen(shape: AttentionShape, sm_scale: Expr, place: Expr) -> Expr:
    """Emit the last key before those that a query at `place` (int32) sees; -1: it sees all."""
    if not shape.window:
        return const(-1, "int32")
    slides = sm_scale < const(0.0, "float32")
    start = B.max(place - const(shape.window, "int32"), const(-1, "int32"))
    return B.bind(B.Select(slides, start, const(-1, "int32")))


@dataclass(frozen=True)
class PagedKeys:
    """Keys and values of a sequence in the cache's pages.

    Parameters
    ----------
    pages, values : Buffer
        The pages, and int32 [used_pages]: the pages' numbers of all sequences.
    begin : Expr
        int32, the sequence's first one among those.
    head : Expr
        int32, the key/value head.
    """

    shape: AttentionShape
    pages: Buffer
    values: Buffer
    begin: Expr
    head: Expr

    def load(self, kind: int, key: Expr, feature: Expr, lanes: int) -> Expr:
        """Emit the load of a key's (0) or value's (1) features, float16; `key` is int32."""
        size = const(self.shape.page_size, "int32")
        number = B.bind(int64(load(self.values, self.begin + B.floordiv(key, size))))
        slot = B.bind(B.floormod(key, size))
        at = (number, int64(kind), int64(self.head), int64(slot), int64(feature))
        return load(self.pages, *at, lanes=lanes)


@dataclass(frozen=True)
class NewKeys:
    """Keys and values of a sequence that are not in the cache yet, float16 [n, Hkv, D] each."""

    keys: Buffer
    values: Buffer
    begin: Expr
    head: Expr

    def load(self, kind: int, key: Expr, feature: Expr, lanes: int) -> Expr:
        """Emit the load of a key's (0) or value's (1) features, float16; `key` is int32."""
        buffer = self.values if kind else self.keys
        return load(buffer, self.begin + key, self.head, feature, lanes=lanes)
