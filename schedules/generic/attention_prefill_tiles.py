"""The pieces of prefill attention: a task's buffers, its vector code, how it reads K and V.

The query rows are in the vector lanes. Scores [key][row] and outputs [feature][row] are sums of a
vector of rows times one broadcast scalar of K or V, so K and V are read as they lie and the
softmax needs no sum across lanes.
"""

from __future__ import annotations

from collections.abc import Callable

from gqsa_compiler._tvm import B
from gqsa_compiler.schedules.generic.attention_common import (
    MASKED,
    AttentionShape,
    exp2,
    tile_buffers,
)
from gqsa_compiler.schedules.generic.emit import (
    Buffer,
    Expr,
    broadcast,
    const,
    int64,
    load,
    local,
    span,
    store,
)
from gqsa_compiler.schedules.generic.kv_pages import Pages

# Scalars of K or of V by (key in the block, feature); what emits whatever they need first, to be
# called where they are used; and both of these for a block, given its first key and their number.
Scalar = Callable[[Expr, Expr], Expr]
Fetch = Callable[[], Scalar]
Reader = Callable[[Expr, Expr], tuple[Fetch, Fetch]]

FEATURES = 8  # features of an output tile; every head_dim is a multiple


class State:
    """The buffers of one task; made where the task's code stands."""

    def __init__(self, shape: AttentionShape, block: int) -> None:
        rows = shape.rows
        self.shape = shape
        self.queries = B.alloc_buffer((shape.head_dim, rows), "float32")
        self.out = B.alloc_buffer((shape.head_dim, rows), "float32")
        self.scores = B.alloc_buffer((block, rows), "float32")
        # A row sees the keys low < key <= high.
        self.low = local(rows, "int32")
        self.high = local(rows, "int32")
        # Of all rows: lowest low, highest low, lowest high, highest high.
        self.bounds = local(4, "int32")
        # Running maximum of the scores, sum of exponentials, and the last block's rescaling.
        self.top = local(rows)
        self.total = local(rows)
        self.factor = local(rows)

    def clear(self) -> None:
        """No key has been seen."""
        lanes = self.shape.lanes
        columns = [i * lanes for i in range(self.shape.row_vectors)]
        zero = broadcast(const(0.0, "float32"), lanes)
        for column in columns:
            store(self.top, broadcast(const(MASKED, "float32"), lanes), column, lanes=lanes)
            store(self.total, zero, column, lanes=lanes)
        with B.serial(self.shape.head_dim) as d:
            for column in columns:
                store(self.out, zero, d, column, lanes=lanes)


class Tiles:
    """The vector code of a block of keys; every method emits statements."""

    def __init__(self, shape: AttentionShape) -> None:
        self.shape = shape
        self.lanes = shape.lanes
        self.columns = [span(i * shape.lanes, shape.lanes) for i in range(shape.row_vectors)]
        self.whole = span(0, shape.lanes)

    def _buffers(self, vectors: int) -> list[Buffer]:
        return tile_buffers(self.shape.row_vectors, vectors, self.lanes)

    def _at(self, i: int) -> Expr:
        return span(i * self.lanes, self.lanes)

    def _accumulate(self, acc: list[Buffer], left: Buffer, line: Expr, scalars: list[Expr]) -> None:
        """acc[i] += left[line] * scalars[i], for every row vector."""
        vectors = [B.bind(load(left, line, column)) for column in self.columns]
        for i, scalar in enumerate(scalars):
            value = B.bind(broadcast(scalar, self.lanes))
            for buffer, vector in zip(acc, vectors, strict=True):
                store(buffer, load(buffer, self._at(i)) + vector * value, self._at(i))

    def scores(self, state: State, j: Expr, count: int, key: Scalar) -> None:
        """Scores of `count` keys from j on."""
        acc = self._buffers(count)
        for i in range(count):
            for buffer in acc:
                store(buffer, broadcast(const(0.0, "float32"), self.lanes), self._at(i))
        with B.serial(self.shape.head_dim) as d:
            self._accumulate(acc, state.queries, d, [key(j + i, d) for i in range(count)])
        for i in range(count):
            for buffer, column in zip(acc, self.columns, strict=True):
                store(state.scores, load(buffer, self._at(i)), j + i, column)

    def mask(self, state: State, j: Expr, key: Expr) -> None:
        """Rows that do not see `key`, number j of its block, get the score MASKED."""
        keys = B.bind(broadcast(key, self.lanes))
        masked = broadcast(const(MASKED, "float32"), self.lanes)
        for column in self.columns:
            seen = B.And(load(state.low, column) < keys, keys <= load(state.high, column))
            store(state.scores, B.Select(seen, load(state.scores, j, column), masked), j, column)

    def new_maximum(self, state: State, count: Expr) -> None:
        """Raise top to the scores; the old top is left in factor."""
        running = self._buffers(1)
        for buffer, column in zip(running, self.columns, strict=True):
            store(state.factor, load(state.top, column), column)
            store(buffer, load(state.top, column), self.whole)
        with B.serial(count) as j:
            for buffer, column in zip(running, self.columns, strict=True):
                bigger = B.max(load(buffer, self.whole), load(state.scores, j, column))
                store(buffer, bigger, self.whole)
        for buffer, column in zip(running, self.columns, strict=True):
            store(state.top, load(buffer, self.whole), column)

    def weights(self, state: State, count: Expr) -> None:
        """Emit scores = exp2(scores - top), factor = exp2(old top - top), and total."""
        sums = self._buffers(1)
        tops = [B.bind(load(state.top, column)) for column in self.columns]
        for buffer, column, top in zip(sums, self.columns, tops, strict=True):
            factor = exp2(load(state.factor, column) - top, self.lanes)
            store(state.factor, factor, column)
            store(buffer, load(state.total, column) * factor, self.whole)
        with B.serial(count) as j:
            for buffer, column, top in zip(sums, self.columns, tops, strict=True):
                weight = exp2(load(state.scores, j, column) - top, self.lanes)
                store(state.scores, weight, j, column)
                store(buffer, load(buffer, self.whole) + weight, self.whole)
        for buffer, column in zip(sums, self.columns, strict=True):
            store(state.total, load(buffer, self.whole), column)

    def outputs(self, state: State, d: Expr, count: Expr, value: Scalar) -> None:
        """out[d : d + 8] = out * factor + the sum over keys of weight * V."""
        acc = self._buffers(FEATURES)
        for buffer, column in zip(acc, self.columns, strict=True):
            factor = B.bind(load(state.factor, column))
            for i in range(FEATURES):
                store(buffer, load(state.out, d + i, column) * factor, self._at(i))
        with B.serial(count) as j:
            self._accumulate(acc, state.scores, j, [value(j, d + i) for i in range(FEATURES)])
        for i in range(FEATURES):
            for buffer, column in zip(acc, self.columns, strict=True):
                store(state.out, load(buffer, self._at(i)), d + i, column)


def paged_reader(pages: Pages, page_values: Buffer, page_begin: Expr, h: Expr) -> Reader:
    """Read a key/value head of a sequence's pages, each a block.

    Float16 pages are converted a block at a time: a scalar of them costs as much as a vector.
    """
    shape = pages.shape
    block, dim, lanes = shape.page_size, shape.head_dim, shape.feature_lanes
    # For K, then for V: the block stays in the first-level cache.
    floats = B.alloc_buffer((block, dim), "float32") if shape.half else None

    def fetch(page: Expr, kind: int, count: Expr) -> Scalar:
        if floats is None:
            return lambda j, d: pages.load(page, kind, h, j, d)
        with B.grid(count, dim // lanes) as (j, i):
            value = pages.load(page, kind, h, j, i * lanes, lanes=lanes)
            store(floats, value, j, i * lanes, lanes=lanes)
        return lambda j, d: load(floats, j, d)

    def read(first: Expr, count: Expr) -> tuple[Fetch, Fetch]:
        page = B.bind(int64(load(page_values, page_begin + B.floordiv(first, block))))
        return lambda: fetch(page, 0, count), lambda: fetch(page, 1, count)

    return read


def ragged_reader(k: Buffer, v: Buffer, kv_begin: Expr, h: Expr) -> Reader:
    """Read a key/value head of a sequence's new keys."""

    def fetch(new: Buffer, begin: Expr) -> Scalar:
        return lambda j, d: load(new, begin + j, h, d)

    def read(first: Expr, _count: Expr) -> tuple[Fetch, Fetch]:
        begin = B.bind(kv_begin + first)
        return lambda: fetch(k, begin), lambda: fetch(v, begin)

    return read
