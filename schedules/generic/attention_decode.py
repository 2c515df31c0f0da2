"""Decode attention: one query a sequence against the paged cache.

Reading K and V from memory is what it costs, so a task takes one key/value head, all the query
heads that share it, and a share of one sequence's pages ("flash decoding"); the shares' partial
results are merged at the end. Vectors run along the features of a head.
"""

from typing import Any

from gqsa_compiler._tvm import T
from gqsa_compiler.schedules.generic.attention_common import (
    ATTRS,
    LOG2_E,
    MASKED,
    AttentionShape,
    exp2,
    horizontal_max,
    horizontal_sum,
    largest_divisor,
    splat,
    tile_buffers,
    vec,
)

_SHARE = 128  # keys of a share: few enough to split some hundred keys between cores
_KEYS = 4  # keys of a score tile, at most
_HEADS = 8  # query heads of a register tile, at most


class _State:
    """The buffers of one task; made where its TVMScript stands."""

    def __init__(self, shape: AttentionShape) -> None:
        self.queries = T.alloc_buffer((shape.group, shape.head_dim), "float32")
        self.scores = T.alloc_buffer((shape.group, shape.page_size), "float32")
        # What the last page rescales the earlier ones by.
        self.factor = T.alloc_buffer((shape.group,), "float32")


class _Partial:
    """What every share has found: unscaled outputs, maxima, sums of exponentials."""

    def __init__(self, shape: AttentionShape, shares: Any) -> None:
        self.out = T.alloc_buffer((shares, shape.num_heads, shape.head_dim), "float32")
        self.top = T.alloc_buffer((shares, shape.num_heads), "float32")
        self.total = T.alloc_buffer((shares, shape.num_heads), "float32")


class _Tiles:
    """The vector code of a page; every method emits statements."""

    def __init__(self, shape: AttentionShape) -> None:
        self.shape = shape
        self.lanes = shape.feature_lanes
        self.steps = shape.head_dim // self.lanes
        self.heads = largest_divisor(shape.group, _HEADS)
        vectors = max(1, shape.accumulators // self.heads)
        self.keys = min(_KEYS, vectors)
        self.width = largest_divisor(self.steps, vectors)

    def _at(self, i: Any) -> Any:
        return vec(i * self.lanes, self.lanes)

    def scores(self, state: _State, pages: Any, page: Any, h: Any, j: Any, count: int) -> None:
        """Scores of keys j : j + count of a page."""
        with T.serial(self.shape.group // self.heads) as t:
            acc = tile_buffers(self.heads, count, self.lanes)
            for buffer in acc:
                for i in range(count):
                    T.buffer_store(buffer, splat(T.float32(0), self.lanes), [self._at(i)])
            with T.serial(self.steps) as s:
                lines = [T.Bind(pages[page, 0, h, j + i, self._at(s)]) for i in range(count)]
                for g, buffer in enumerate(acc):
                    query = T.Bind(state.queries[t * self.heads + g, self._at(s)])
                    for i, line in enumerate(lines):
                        T.buffer_store(buffer, buffer[self._at(i)] + query * line, [self._at(i)])
            for g, buffer in enumerate(acc):
                for i in range(count):
                    total = horizontal_sum(T.Bind(buffer[self._at(i)]), self.lanes)
                    T.buffer_store(state.scores, total, [t * self.heads + g, j + i])

    def weights(self, state: _State, partial: _Partial, s: Any, g: Any, head: Any) -> None:
        """A head's new maximum, the page's weights, the sum and the rescaling."""
        lanes = self.shape.page_lanes
        spots = [vec(i * lanes, lanes) for i in range(self.shape.page_size // lanes)]
        biggest = T.Bind(state.scores[g, spots[0]])
        for spot in spots[1:]:
            biggest = T.Bind(T.max(biggest, state.scores[g, spot]))
        top = T.Bind(T.max(partial.top[s, head], horizontal_max(biggest, lanes)))
        factor = exp2(partial.top[s, head] - top, 1)
        total: Any = None
        for spot in spots:
            weight = exp2(state.scores[g, spot] - splat(top, lanes), lanes)
            T.buffer_store(state.scores, weight, [g, spot])
            total = weight if total is None else T.Bind(total + weight)
        total = partial.total[s, head] * factor + horizontal_sum(total, lanes)
        T.buffer_store(partial.total, total, [s, head])
        T.buffer_store(partial.top, top, [s, head])
        T.buffer_store(state.factor, factor, [g])

    def outputs(
        self, state: _State, partial: _Partial, pages: Any, page: Any, s: Any, h: Any, keys: Any
    ) -> None:
        """Emit out = out * factor + the sum over keys of weight * V, for the whole group."""
        begin, end = keys
        with T.serial(self.shape.group // self.heads) as t, T.serial(self.steps // self.width) as f:
            columns = [self._at(f * self.width + w) for w in range(self.width)]
            first = h * self.shape.group + t * self.heads
            acc = tile_buffers(self.heads, self.width, self.lanes)
            for g, buffer in enumerate(acc):
                factor = T.Bind(splat(state.factor[t * self.heads + g], self.lanes))
                for w, column in enumerate(columns):
                    old = partial.out[s, first + g, column]
                    T.buffer_store(buffer, old * factor, [self._at(w)])
            with T.serial(end - begin) as i:
                lines = [T.Bind(pages[page, 1, h, begin + i, column]) for column in columns]
                for g, buffer in enumerate(acc):
                    weight = splat(state.scores[t * self.heads + g, begin + i], self.lanes)
                    weight = T.Bind(weight)
                    for w, line in enumerate(lines):
                        T.buffer_store(buffer, buffer[self._at(w)] + weight * line, [self._at(w)])
            for g, buffer in enumerate(acc):
                for w, column in enumerate(columns):
                    T.buffer_store(partial.out, buffer[self._at(w)], [s, first + g, column])


def _share(shape: AttentionShape) -> Any:
    """Return the macro of one task: a share of a sequence's pages, for one key/value head."""
    group, page, page_lanes = shape.group, shape.page_size, shape.page_lanes
    tiles = _Tiles(shape)
    lanes, steps, keys = tiles.lanes, tiles.steps, tiles.keys

    @T.macro
    def one_page(
        state: Any, partial: Any, pages: Any, number: Any, begin: Any, end: Any, s: Any, h: Any
    ) -> None:
        # Keys begin:end of the page; the other scores weigh nothing.
        for g, i in T.grid(group, page // page_lanes):
            for x in T.vectorized(page_lanes):
                state.scores[g, i * page_lanes + x] = T.float32(MASKED)
        for i in T.serial((end - begin) // keys):
            tiles.scores(state, pages, number, h, begin + i * keys, keys)
        for i in T.serial((end - begin) % keys):
            tiles.scores(state, pages, number, h, end - 1 - i, 1)
        for g in T.serial(group):
            tiles.weights(state, partial, s, g, h * group + g)
        tiles.outputs(state, partial, pages, number, s, h, [begin, end])

    @T.macro
    def share(
        q: Any,
        sm_scale: Any,
        pages: Any,
        page_values: Any,
        page_begin: Any,
        span: Any,
        low: Any,
        kv_len: Any,
        partial: Any,
        b: Any,
        s: Any,
        h: Any,
    ) -> None:
        # Pages span[0]:span[1] and in them the keys low + 1 : kv_len; the result is number s.
        state = T.meta_var(_State(shape))
        scale: T.let[T.float32] = T.max(sm_scale, -sm_scale) * T.float32(LOG2_E)
        for g, i in T.grid(group, steps):
            for x in T.vectorized(lanes):
                state.queries[g, i * lanes + x] = q[b, h * group + g, i * lanes + x] * scale
                partial.out[s, h * group + g, i * lanes + x] = T.float32(0)
        for g in T.serial(group):
            partial.top[s, h * group + g] = T.float32(MASKED)
            partial.total[s, h * group + g] = T.float32(0)
        for i in T.serial(span[1] - span[0]):
            first: T.let[T.int32] = (span[0] + i) * page
            number: T.let[T.int64] = T.Cast("int64", page_values[page_begin + span[0] + i])
            begin: T.let[T.int32] = T.max(low + 1 - first, 0)
            end: T.let[T.int32] = T.min(kv_len - first, page)
            one_page(state, partial, pages, number, begin, end, s, h)

    return share


def _merge(shape: AttentionShape) -> Any:
    """Return the macro that merges the shares begin:end of a head."""
    lanes = shape.feature_lanes
    steps = shape.head_dim // lanes

    @T.macro
    def merge(partial: Any, begin: Any, end: Any, output: Any, lse: Any, b: Any, head: Any) -> None:
        top = T.alloc_buffer((1,), "float32")
        total = T.alloc_buffer((1,), "float32")
        top[0] = T.float32(MASKED)
        total[0] = T.float32(0)
        for s in T.serial(begin, end):
            top[0] = T.max(top[0], partial.top[s, head])
        for i in T.serial(steps):
            for x in T.vectorized(lanes):
                output[b, head, i * lanes + x] = T.float32(0)
        for s in T.serial(begin, end):
            weight = T.meta_var(exp2(partial.top[s, head] - top[0], 1))
            total[0] = total[0] + weight * partial.total[s, head]
            for i in T.serial(steps):
                for x in T.vectorized(lanes):
                    output[b, head, i * lanes + x] = (
                        output[b, head, i * lanes + x]
                        + weight * partial.out[s, head, i * lanes + x]
                    )
        inverse: T.let[T.float32] = T.if_then_else(
            total[0] > T.float32(0), T.float32(1) / total[0], T.float32(0)
        )
        for i in T.serial(steps):
            for x in T.vectorized(lanes):
                output[b, head, i * lanes + x] = output[b, head, i * lanes + x] * inverse
        lse[b, head] = T.if_then_else(
            total[0] > T.float32(0), top[0] + T.log2(total[0]), T.float32(MASKED)
        )

    return merge


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
    share = _share(shape)
    merge = _merge(shape)

    @T.prim_func(s_tir=True)
    def attention_decode_paged(
        q_h: T.handle,
        pages_h: T.handle,
        page_indptr_h: T.handle,
        page_values_h: T.handle,
        length_h: T.handle,
        offset_h: T.handle,
        position_h: T.handle,
        output_h: T.handle,
        lse_h: T.handle,
        rotary_mode: T.int32,
        rope_scale: T.float32,
        rope_theta: T.float32,
        sm_scale: T.float32,
    ) -> None:
        T.func_attr(ATTRS)
        batch = T.int32()
        num_pages = T.int64()
        used_pages = T.int32()
        page_indptr_at = T.int32()
        page_values_at = T.int32()
        length_at = T.int32()
        position_at = T.int32()
        offset_at = T.int32()
        q = T.match_buffer(q_h, (batch, heads, dim), "float32")
        pages = T.match_buffer(pages_h, (num_pages, 2, kv_heads, page, dim), "float32")
        page_indptr = T.match_buffer(
            page_indptr_h, (batch + 1,), "int32", elem_offset=page_indptr_at
        )
        page_values = T.match_buffer(
            page_values_h, (used_pages,), "int32", elem_offset=page_values_at
        )
        length = T.match_buffer(length_h, (batch,), "int32", elem_offset=length_at)
        offset = T.match_buffer(offset_h, (batch,), "int32", elem_offset=offset_at)
        position = T.match_buffer(position_h, (batch,), "int32", elem_offset=position_at)
        output = T.match_buffer(output_h, (batch, heads, dim), "float32")
        lse = T.match_buffer(lse_h, (batch, heads), "float32")
        # The keys a sequence sees, low + 1 : kv_len of its pages, and its first share.
        low = T.alloc_buffer((batch,), "int32")
        kv_len = T.alloc_buffer((batch,), "int32")
        shares = T.alloc_buffer((batch + 1,), "int32")
        partial = T.meta_var(_Partial(shape, used_pages * page // _SHARE + batch))
        shares[0] = 0
        for b in T.serial(batch):
            count: T.let[T.int32] = page_indptr[b + 1] - page_indptr[b]
            kv_len[b] = T.if_then_else(count > 0, (count - 1) * page + length[b], 0)
            low[b] = -1
            if window > 0:
                if sm_scale < T.float32(0):
                    low[b] = T.max(position[b] - offset[b] - window, -1)
            shares[b + 1] = shares[b] + (T.max(kv_len[b] - low[b] - 1, 0) + _SHARE - 1) // _SHARE
        tasks: T.let[T.int32] = shares[batch] * kv_heads
        for task in T.parallel(tasks):
            sequence = T.alloc_buffer((1,), "int32")
            span = T.alloc_buffer((2,), "int32")
            s: T.let[T.int32] = task // kv_heads
            sequence[0] = 0
            while shares[sequence[0] + 1] <= s:
                sequence[0] = sequence[0] + 1
            own: T.let[T.int32] = sequence[0]
            begin: T.let[T.int32] = (low[own] + 1) // page
            many: T.let[T.int32] = (kv_len[own] + page - 1) // page - begin
            number: T.let[T.int32] = s - shares[own]
            of: T.let[T.int32] = shares[own + 1] - shares[own]
            span[0] = begin + many * number // of
            span[1] = begin + many * (number + 1) // of
            share(
                q,
                sm_scale,
                pages,
                page_values,
                page_indptr[own],
                span,
                low[own],
                kv_len[own],
                partial,
                own,
                s,
                task % kv_heads,
            )
        for b, head in T.grid(batch, heads):
            merge(partial, shares[b], shares[b + 1], output, lse, b, head)

    return attention_decode_paged
