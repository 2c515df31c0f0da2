"""The pieces of prefill attention: a task's buffers, its vector code, how it reads K and V.

The query rows are in the vector lanes. Scores [key][row] and outputs [feature][row] are sums of a
vector of rows times one broadcast scalar of K or V, so K and V are read as they lie and the
softmax needs no sum across lanes.
"""

from collections.abc import Callable
from typing import Any

from gqsa_compiler._tvm import T, tirx
from gqsa_compiler.schedules.generic.attention_common import (
    MASKED,
    AttentionShape,
    exp2,
    splat,
    tile_buffers,
    vec,
)

# Given a block's first key: how to read K and V, each a scalar of (key in the block, feature).
Scalar = Callable[[Any, Any], Any]
Reader = Callable[[Any], tuple[Scalar, Scalar]]

FEATURES = 8  # features of an output tile; every head_dim is a multiple


class State:
    """The buffers of one task; made where its TVMScript stands."""

    def __init__(self, shape: AttentionShape, block: int) -> None:
        rows = shape.rows
        self.queries = T.alloc_buffer((shape.head_dim, rows), "float32")
        self.out = T.alloc_buffer((shape.head_dim, rows), "float32")
        self.scores = T.alloc_buffer((block, rows), "float32")
        # A row sees the keys low < key <= high.
        self.low = T.alloc_buffer((rows,), "int32")
        self.high = T.alloc_buffer((rows,), "int32")
        # Of all rows: lowest low, highest low, lowest high, highest high.
        self.bounds = T.alloc_buffer((4,), "int32")
        # Running maximum of the scores, sum of exponentials, and the last block's rescaling.
        self.top = T.alloc_buffer((rows,), "float32")
        self.total = T.alloc_buffer((rows,), "float32")
        self.factor = T.alloc_buffer((rows,), "float32")


class Tiles:
    """The vector code of a block of keys; every method emits statements."""

    def __init__(self, shape: AttentionShape) -> None:
        self.shape = shape
        self.lanes = shape.lanes
        self.columns = [vec(i * shape.lanes, shape.lanes) for i in range(shape.row_vectors)]
        self.whole = vec(0, shape.lanes)

    def _buffers(self, vectors: int) -> list[Any]:
        return tile_buffers(self.shape.row_vectors, vectors, self.lanes)

    def _at(self, i: int) -> Any:
        return vec(i * self.lanes, self.lanes)

    def _accumulate(self, acc: list[Any], left: Any, line: Any, scalars: list[Any]) -> None:
        """acc[i] += left[line] * scalars[i], for every row vector."""
        vectors = [T.Bind(left[line, column]) for column in self.columns]
        for i, scalar in enumerate(scalars):
            value = T.Bind(splat(scalar, self.lanes))
            for buffer, vector in zip(acc, vectors, strict=True):
                T.buffer_store(buffer, buffer[self._at(i)] + vector * value, [self._at(i)])

    def scores(self, state: State, j: Any, count: int, key: Scalar) -> None:
        """Scores of `count` keys from j on."""
        acc = self._buffers(count)
        for i in range(count):
            for buffer in acc:
                T.buffer_store(buffer, splat(T.float32(0), self.lanes), [self._at(i)])
        with T.serial(self.shape.head_dim) as d:
            self._accumulate(acc, state.queries, d, [key(j + i, d) for i in range(count)])
        for i in range(count):
            for buffer, column in zip(acc, self.columns, strict=True):
                T.buffer_store(state.scores, buffer[self._at(i)], [j + i, column])

    def mask(self, state: State, j: Any, key: Any) -> None:
        """Rows that do not see `key`, number j of its block, get the score MASKED."""
        keys = splat(key, self.lanes)
        for column in self.columns:
            seen = tirx.And(state.low[column] < keys, keys <= state.high[column])
            masked = splat(T.float32(MASKED), self.lanes)
            T.buffer_store(
                state.scores, T.Select(seen, state.scores[j, column], masked), [j, column]
            )

    def new_maximum(self, state: State, count: Any) -> None:
        """Raise top to the scores; the old top is left in factor."""
        running = self._buffers(1)
        for buffer, column in zip(running, self.columns, strict=True):
            T.buffer_store(state.factor, state.top[column], [column])
            T.buffer_store(buffer, state.top[column], [self.whole])
        with T.serial(count) as j:
            for buffer, column in zip(running, self.columns, strict=True):
                bigger = T.max(buffer[self.whole], state.scores[j, column])
                T.buffer_store(buffer, bigger, [self.whole])
        for buffer, column in zip(running, self.columns, strict=True):
            T.buffer_store(state.top, buffer[self.whole], [column])

    def weights(self, state: State, count: Any) -> None:
        """Emit scores = exp2(scores - top), factor = exp2(old top - top), and total."""
        sums = self._buffers(1)
        tops = [T.Bind(state.top[column]) for column in self.columns]
        for buffer, column, top in zip(sums, self.columns, tops, strict=True):
            factor = exp2(state.factor[column] - top, self.lanes)
            T.buffer_store(state.factor, factor, [column])
            T.buffer_store(buffer, state.total[column] * factor, [self.whole])
        with T.serial(count) as j:
            for buffer, column, top in zip(sums, self.columns, tops, strict=True):
                weight = exp2(state.scores[j, column] - top, self.lanes)
                T.buffer_store(state.scores, weight, [j, column])
                T.buffer_store(buffer, buffer[self.whole] + weight, [self.whole])
        for buffer, column in zip(sums, self.columns, strict=True):
            T.buffer_store(state.total, buffer[self.whole], [column])

    def outputs(self, state: State, d: Any, count: Any, value: Scalar) -> None:
        """out[d : d + 8] = out * factor + the sum over keys of weight * V."""
        acc = self._buffers(FEATURES)
        for buffer, column in zip(acc, self.columns, strict=True):
            factor = T.Bind(state.factor[column])
            for i in range(FEATURES):
                T.buffer_store(buffer, state.out[d + i, column] * factor, [self._at(i)])
        with T.serial(count) as j:
            self._accumulate(acc, state.scores, j, [value(j, d + i) for i in range(FEATURES)])
        for i in range(FEATURES):
            for buffer, column in zip(acc, self.columns, strict=True):
                T.buffer_store(state.out, buffer[self._at(i)], [d + i, column])


def paged_reader(pages: Any, page_values: Any, page_begin: Any, h: Any, block: int) -> Reader:
    """Read a key/value head of a sequence's pages, each a block."""

    def read(first: Any) -> tuple[Scalar, Scalar]:
        page = T.Bind(T.Cast("int64", page_values[page_begin + first // block]))
        return lambda j, d: pages[page, 0, h, j, d], lambda j, d: pages[page, 1, h, j, d]

    return read


def ragged_reader(k: Any, v: Any, kv_begin: Any, h: Any) -> Reader:
    """Read a key/value head of a sequence's new keys."""

    def read(first: Any) -> tuple[Scalar, Scalar]:
        begin = T.Bind(kv_begin + first)
        return lambda j, d: k[begin + j, h, d], lambda j, d: v[begin + j, h, d]

    return read
