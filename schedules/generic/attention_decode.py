"""Decode attention: one query a sequence against the paged cache.

Reading K and V from memory is what it costs, so a task takes one key/value head, all the query
heads that share it, and a share of one sequence's pages ("flash decoding"); the shares' partial
results are merged at the end. Vectors run along the features of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gqsa_compiler._tvm import B
from gqsa_compiler.schedules.generic.attention_common import (
    MASKED,
    AttentionShape,
    exp2,
    largest_divisor,
    rope_arguments,
    table_argument,
    tile_buffers,
)
from gqsa_compiler.schedules.generic.emit import (
    Buffer,
    Expr,
    argument,
    broadcast,
    const,
    extent,
    horizontal_max,
    horizontal_sum,
    int64,
    load,
    local,
    scheduled,
    span,
    store,
)
from gqsa_compiler.schedules.generic.kv_pages import Pages, pages_argument
from gqsa_compiler.schedules.generic.math import LOG2_E

_SHARE = 128  # keys of a share: few enough to split some hundred keys between cores
_KEYS = 4  # keys of a score tile, at most
_HEADS = 8  # query heads of a register tile, at most


def attention_decode(shape: AttentionShape) -> Any:
    """Build the kernel that TVM's paged cache calls for one query a sequence.

    Parameters
    ----------
    shape : AttentionShape

    Returns
    -------
    PrimFunc
        With the arguments that the runtime gives (``TIRPagedDecodeFunc``). Every key in the
        pages precedes the query or is its own; a negative ``sm_scale`` means -``sm_scale`` and
        the sliding window of `shape`. Outputs are as `attention_prefill`'s.
    """
    heads, kv_heads, dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    page, window = shape.page_size, shape.window
    batch, used_pages = extent("batch", "int32"), extent("used_pages", "int32")
    with scheduled() as builder:
        q = argument("q", (batch, heads, dim))
        stored = pages_argument(shape)
        page_indptr = table_argument("page_indptr", batch + 1)
        page_values = table_argument("page_values", used_pages)
        length = table_argument("length", batch)
        offset = table_argument("offset", batch)
        position = table_argument("position", batch)
        output = argument("output", (batch, heads, dim))
        lse = argument("lse", (batch, heads))
        sm_scale = rope_arguments()
        pages = Pages.of(shape, stored)
        # The keys a sequence sees, low + 1 : kv_len of its pages, and its first share.
        low = B.alloc_buffer((batch,), "int32")
        kv_len = B.alloc_buffer((batch,), "int32")
        shares = B.alloc_buffer((batch + 1,), "int32")
        partial = _Partial(shape, B.floordiv(used_pages * page, _SHARE) + batch)
        store(shares, const(0, "int32"), 0)
        with B.serial(batch) as b:
            count = B.bind(load(page_indptr, b + 1) - load(page_indptr, b))
            filled = (count - 1) * page + load(length, b)
            keys = B.bind(B.if_then_else(count > 0, filled, 0))
            before = const(-1, "int32")
            if window:
                slides = sm_scale < const(0.0, "float32")
                start = B.max(load(position, b) - load(offset, b) - window, -1)
                before = B.bind(B.if_then_else(slides, start, before))
            store(kv_len, keys, b)
            store(low, before, b)
            own = B.floordiv(B.max(keys - before - 1, 0) + (_SHARE - 1), _SHARE)
            store(shares, load(shares, b) + own, b + 1)
        with B.parallel(load(shares, batch) * kv_heads) as task:
            s = B.bind(B.floordiv(task, kv_heads))
            b = _sequence_of(shares, s)
            keys = (B.bind(load(low, b) + 1), B.bind(load(kv_len, b)))
            first = B.bind(B.floordiv(keys[0], page))
            many = B.bind(B.floordiv(keys[1] + (page - 1), page) - first)
            number = B.bind(s - load(shares, b))
            of = B.bind(load(shares, b + 1) - load(shares, b))
            # In a buffer: TVM's passes would put these expressions where a binding is used.
            span = local(2, "int32")
            store(span, first + B.floordiv(many * number, of), 0)
            store(span, first + B.floordiv(many * (number + 1), of), 1)
            page_begin = B.bind(load(page_indptr, b))
            share = _Share(shape, pages, partial, s, B.bind(B.floormod(task, kv_heads)))
            share.begin(q, b, sm_scale)
            with B.serial(load(span, 1) - load(span, 0)) as i:
                at = B.bind(load(span, 0) + i)
                # Pages lie anywhere: the hardware cannot guess where the next one begins.
                behind = B.bind(B.min(at + 1, load(span, 1) - 1))
                pages.fetch(B.bind(int64(load(page_values, page_begin + behind))), share.h)
                share.page(B.bind(int64(load(page_values, page_begin + at))), at * page, keys)
        with B.grid(batch, heads) as (b, head):
            partial.merge(load(shares, b), load(shares, b + 1), output, lse, b, head)
    return builder.get()


def _sequence_of(shares: Buffer, s: Expr) -> Expr:
    """Find the sequence that share `s` is of."""
    sequence = local(1, "int32")
    store(sequence, const(0, "int32"), 0)
    with B.While(load(shares, load(sequence, 0) + 1) <= s):
        store(sequence, load(sequence, 0) + 1, 0)
    return B.bind(load(sequence, 0))


class _Partial:
    """What every share has found: unscaled outputs, maxima, sums of exponentials."""

    def __init__(self, shape: AttentionShape, shares: Expr) -> None:
        self.shape = shape
        self.out = B.alloc_buffer((shares, shape.num_heads, shape.head_dim), "float32")
        self.top = B.alloc_buffer((shares, shape.num_heads), "float32")
        self.total = B.alloc_buffer((shares, shape.num_heads), "float32")

    def merge(
        self, begin: Expr, end: Expr, output: Buffer, lse: Buffer, b: Expr, head: Expr
    ) -> None:
        """Merge a head's shares begin:end."""
        lanes = self.shape.feature_lanes
        steps = self.shape.head_dim // lanes
        zero = const(0.0, "float32")
        top, total = local(1), local(1)
        store(top, const(MASKED, "float32"), 0)
        store(total, zero, 0)
        with B.serial(begin, end) as s:
            store(top, B.max(load(top, 0), load(self.top, s, head)), 0)
        with B.serial(steps) as i:
            store(output, broadcast(zero, lanes), b, head, i * lanes, lanes=lanes)
        with B.serial(begin, end) as s:
            weight = exp2(load(self.top, s, head) - load(top, 0), 1)
            store(total, load(total, 0) + weight * load(self.total, s, head), 0)
            with B.serial(steps) as i:
                old = load(output, b, head, i * lanes, lanes=lanes)
                more = broadcast(weight, lanes) * load(self.out, s, head, i * lanes, lanes=lanes)
                store(output, old + more, b, head, i * lanes, lanes=lanes)
        found = load(total, 0) > zero
        inverse = B.bind(B.if_then_else(found, const(1.0, "float32") / load(total, 0), zero))
        with B.serial(steps) as i:
            value = load(output, b, head, i * lanes, lanes=lanes) * broadcast(inverse, lanes)
            store(output, value, b, head, i * lanes, lanes=lanes)
        value = load(top, 0) + B.log2(load(total, 0))
        store(lse, B.if_then_else(found, value, const(MASKED, "float32")), b, head)


@dataclass(frozen=True)
class _Tiling:
    """How the heads of a group, a page's keys and a head's features are cut into tiles."""

    lanes: int
    steps: int
    heads: int
    keys: int
    width: int

    @classmethod
    def of(cls, shape: AttentionShape) -> _Tiling:
        """Cut so that a tile fits the registers."""
        lanes = shape.feature_lanes
        steps = shape.head_dim // lanes
        heads = largest_divisor(shape.group, _HEADS)
        vectors = max(1, shape.accumulators // heads)
        return cls(lanes, steps, heads, min(_KEYS, vectors), largest_divisor(steps, vectors))


class _Share:
    """One task: share `s` of a sequence's pages, for key/value head `h`; methods emit code."""

    def __init__(
        self, shape: AttentionShape, pages: Pages, partial: _Partial, s: Expr, h: Expr
    ) -> None:
        self.shape, self.tiling = shape, _Tiling.of(shape)
        self.pages, self.partial, self.s, self.h = pages, partial, s, h
        self.queries = B.alloc_buffer((shape.group, shape.head_dim), "float32")
        self.scores = B.alloc_buffer((shape.group, shape.page_size), "float32")
        # What the last page rescales the earlier ones by.
        self.factor = local(shape.group)

    def _at(self, i: Expr | int) -> Expr:
        return span(i * self.tiling.lanes, self.tiling.lanes)

    def begin(self, q: Buffer, b: Expr, sm_scale: Expr) -> None:
        """Scale the queries; no key has been seen."""
        tiling, partial, s = self.tiling, self.partial, self.s
        zero = const(0.0, "float32")
        scale = B.bind(B.max(sm_scale, -sm_scale) * const(LOG2_E, "float32"))
        with B.serial(self.shape.group) as g:
            head = B.bind(self.h * self.shape.group + g)
            with B.serial(tiling.steps) as i:
                query = load(q, b, head, self._at(i)) * broadcast(scale, tiling.lanes)
                store(self.queries, query, g, self._at(i))
                store(partial.out, broadcast(zero, tiling.lanes), s, head, self._at(i))
            store(partial.top, const(MASKED, "float32"), s, head)
            store(partial.total, zero, s, head)

    def page(self, number: Expr, first: Expr, keys: tuple[Expr, Expr]) -> None:
        """Take in page `number`, whose first key is `first`, as far as it is in keys[0]:keys[1]."""
        shape, tile = self.shape, self.tiling.keys
        first = B.bind(first)
        begin = B.bind(B.max(keys[0] - first, 0))
        end = B.bind(B.min(keys[1] - first, shape.page_size))
        masked = broadcast(const(MASKED, "float32"), shape.page_lanes)
        with B.grid(shape.group, shape.page_size // shape.page_lanes) as (g, i):
            at = i * shape.page_lanes
            store(self.scores, masked, g, at, lanes=shape.page_lanes)
        with B.serial(B.floordiv(end - begin, tile)) as i:
            self._scores(number, B.bind(begin + i * tile), tile)
        with B.serial(B.floormod(end - begin, tile)) as i:
            self._scores(number, B.bind(end - 1 - i), 1)
        with B.serial(shape.group) as g:
            self._weights(g, B.bind(self.h * shape.group + g))
        self._outputs(number, begin, end)

    def _scores(self, page: Expr, j: Expr, count: int) -> None:
        """Scores of keys j : j + count of a page."""
        tiling = self.tiling
        with B.serial(self.shape.group // tiling.heads) as t:
            acc = tile_buffers(tiling.heads, count, tiling.lanes)
            for buffer in acc:
                for i in range(count):
                    store(buffer, broadcast(const(0.0, "float32"), tiling.lanes), self._at(i))
            with B.serial(tiling.steps) as s:
                column = self._at(s)
                at, lanes = s * tiling.lanes, tiling.lanes
                lines = [
                    B.bind(self.pages.load(page, 0, self.h, j + i, at, lanes=lanes))
                    for i in range(count)
                ]
                for g, buffer in enumerate(acc):
                    query = B.bind(load(self.queries, t * tiling.heads + g, column))
                    for i, line in enumerate(lines):
                        store(buffer, load(buffer, self._at(i)) + query * line, self._at(i))
            for g, buffer in enumerate(acc):
                for i in range(count):
                    total = horizontal_sum(B.bind(load(buffer, self._at(i))), tiling.lanes)
                    store(self.scores, total, t * tiling.heads + g, j + i)

    def _weights(self, g: Expr, head: Expr) -> None:
        """A head's new maximum, the page's weights, the sum and the rescaling."""
        partial, s, lanes = self.partial, self.s, self.shape.page_lanes
        spots = [span(i * lanes, lanes) for i in range(self.shape.page_size // lanes)]
        biggest = B.bind(load(self.scores, g, spots[0]))
        for spot in spots[1:]:
            biggest = B.bind(B.max(biggest, load(self.scores, g, spot)))
        old = B.bind(load(partial.top, s, head))
        top = B.bind(B.max(old, horizontal_max(biggest, lanes)))
        factor = exp2(old - top, 1)
        total: Expr = None
        for spot in spots:
            weight = exp2(load(self.scores, g, spot) - broadcast(top, lanes), lanes)
            store(self.scores, weight, g, spot)
            total = weight if total is None else B.bind(total + weight)
        total = load(partial.total, s, head) * factor + horizontal_sum(total, lanes)
        store(partial.total, total, s, head)
        store(partial.top, top, s, head)
        store(self.factor, factor, g)

    def _outputs(self, page: Expr, begin: Expr, end: Expr) -> None:
        """Emit out = out * factor + the sum over keys of weight * V, for the whole group."""
        tiling, out = self.tiling, self.partial.out
        grid = (self.shape.group // tiling.heads, tiling.steps // tiling.width)
        with B.grid(*grid) as (t, f):
            starts = [(f * tiling.width + w) * tiling.lanes for w in range(tiling.width)]
            columns = [span(at, tiling.lanes) for at in starts]
            heads = [t * tiling.heads + g for g in range(tiling.heads)]
            firsts = [(self.s, self.h * self.shape.group + g) for g in heads]
            acc = tile_buffers(tiling.heads, tiling.width, tiling.lanes)
            for g, at, buffer in zip(heads, firsts, acc, strict=True):
                factor = B.bind(broadcast(load(self.factor, g), tiling.lanes))
                for w, column in enumerate(columns):
                    store(buffer, load(out, *at, column) * factor, self._at(w))
            with B.serial(end - begin) as i:
                line = (page, 1, self.h, begin + i)
                lines = [B.bind(self.pages.load(*line, at, lanes=tiling.lanes)) for at in starts]
                for g, buffer in zip(heads, acc, strict=True):
                    weight = B.bind(broadcast(load(self.scores, g, begin + i), tiling.lanes))
                    for w, value in enumerate(lines):
                        store(buffer, load(buffer, self._at(w)) + weight * value, self._at(w))
            for at, buffer in zip(firsts, acc, strict=True):
                for w, column in enumerate(columns):
                    store(out, load(buffer, self._at(w)), *at, column)
