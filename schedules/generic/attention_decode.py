"""Decode attention: one query a sequence against the paged cache.

Reading K and V from memory is what it costs, so a task takes one key/value head, all the query
heads that share it, and a share of the sequence's pages ("flash decoding"); the shares' partial
results are merged at the end. Vectors run along the features of a head.
"""

from typing import Any

from tvm.script import ir as I

from gqsa_compiler._tvm import T
from gqsa_compiler.schedules.generic.attention_common import (
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

# Keys a task takes at least: small enough to share a few hundred keys between cores.
_SHARE = 128
_KEYS = 4  # keys of a score tile


class _State:
    """The buffers of one task; made where its TVMScript stands."""

    def __init__(self, shape: AttentionShape) -> None:
        self.queries = T.alloc_buffer((shape.group, shape.head_dim), "float32")
        self.scores = T.alloc_buffer((shape.group, shape.page_size), "float32")
        # What the last page rescales the earlier ones by.
        self.factor = T.alloc_buffer((shape.group,), "float32")


class _Partial:
    """What the shares of all sequences have found: unscaled outputs, maxima, sums."""

    def __init__(self, shape: AttentionShape, shares: Any) -> None:
        self.out = T.alloc_buffer((shares, shape.num_heads, shape.head_dim), "float32")
        self.top = T.alloc_buffer((shares, shape.num_heads), "float32")
        self.total = T.alloc_buffer((shares, shape.num_heads), "float32")


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
    group, page, window = shape.group, shape.page_size, shape.window
    lanes = shape.feature_lanes
    steps = dim // lanes
    page_lanes = shape.page_lanes
    budget = shape.accumulators
    tile = largest_divisor(group, 8)  # query heads of a register tile
    keys = max(1, min(_KEYS, budget // tile))
    width = largest_divisor(steps, max(1, budget // tile))  # feature vectors of an output tile

    def score_tile(state: _State, pages: Any, number: Any, h: Any, j: Any, count: int) -> None:
        """Emit the scores of keys j : j + count of a page."""
        with T.serial(group // tile) as t:
            acc = tile_buffers(tile, count, lanes)
            for buffer in acc:
                for i in range(count):
                    T.buffer_store(buffer, splat(T.float32(0), lanes), [vec(i * lanes, lanes)])
            with T.serial(steps) as s:
                at = vec(s * lanes, lanes)
                lines = [T.Bind(pages[number, 0, h, j + i, at]) for i in range(count)]
                for g, buffer in enumerate(acc):
                    query = T.Bind(state.queries[t * tile + g, at])
                    for i, line in enumerate(lines):
                        spot = vec(i * lanes, lanes)
                        T.buffer_store(buffer, buffer[spot] + query * line, [spot])
            for g, buffer in enumerate(acc):
                for i in range(count):
                    total = horizontal_sum(T.Bind(buffer[vec(i * lanes, lanes)]), lanes)
                    T.buffer_store(state.scores, total, [t * tile + g, j + i])

    def weigh(state: _State, g: Any, top: Any, total: Any, at: list[Any]) -> None:
        """Emit a head's running maximum and sum, its page's weights and the rescaling."""
        spots = [vec(i * page_lanes, page_lanes) for i in range(page // page_lanes)]
        biggest = T.Bind(state.scores[g, spots[0]])
        for spot in spots[1:]:
            biggest = T.Bind(T.max(biggest, state.scores[g, spot]))
        new = T.Bind(T.max(top[tuple(at)], horizontal_max(biggest, page_lanes)))
        factor = exp2(top[tuple(at)] - new, 1)
        shift = T.Bind(splat(new, page_lanes))
        total_vector = None
        for spot in spots:
            weight = exp2(state.scores[g, spot] - shift, page_lanes)
            T.buffer_store(state.scores, weight, [g, spot])
            total_vector = weight if total_vector is None else T.Bind(total_vector + weight)
        total_new = total[tuple(at)] * factor + horizontal_sum(total_vector, page_lanes)
        T.buffer_store(total, total_new, at)
        T.buffer_store(top, new, at)
        T.buffer_store(state.factor, factor, [g])

    def output_tile(
        state: _State, partial: _Partial, pages: Any, number: Any, s: Any, h: Any, span: list[Any]
    ) -> None:
        """Emit out = out * factor + the sum over keys of weight * V, for all heads of the group."""
        begin, end = span
        with T.serial(group // tile) as t, T.serial(steps // width) as f:
            acc = tile_buffers(tile, width, lanes)
            for g, buffer in enumerate(acc):
                factor = T.Bind(splat(state.factor[t * tile + g], lanes))
                for w in range(width):
                    at = vec((f * width + w) * lanes, lanes)
                    old = partial.out[s, h * group + t * tile + g, at]
                    T.buffer_store(buffer, old * factor, [vec(w * lanes, lanes)])
            with T.serial(end - begin) as i:
                lines = [
                    T.Bind(pages[number, 1, h, begin + i, vec((f * width + w) * lanes, lanes)])
                    for w in range(width)
                ]
                for g, buffer in enumerate(acc):
                    weight = T.Bind(splat(state.scores[t * tile + g, begin + i], lanes))
                    for w, line in enumerate(lines):
                        spot = vec(w * lanes, lanes)
                        T.buffer_store(buffer, buffer[spot] + weight * line, [spot])
            for g, buffer in enumerate(acc):
                for w in range(width):
                    at = vec((f * width + w) * lanes, lanes)
                    T.buffer_store(
                        partial.out,
                        buffer[vec(w * lanes, lanes)],
                        [s, h * group + t * tile + g, at],
                    )

    @T.macro
    def one_page(state, partial, pages, number, begin, end, s, h):
        # Keys begin:end of the page.
        for g, i in T.grid(group, page // page_lanes):
            for v in T.vectorized(page_lanes):
                state.scores[g, i * page_lanes + v] = T.float32(MASKED)
        for i in T.serial((end - begin) // keys):
            score_tile(state, pages, number, h, begin + i * keys, keys)
        for i in T.serial((end - begin) % keys):
            score_tile(state, pages, number, h, end - 1 - i, 1)
        for g in T.serial(group):
            weigh(state, g, partial.top, partial.total, [s, h * group + g])
        output_tile(state, partial, pages, number, s, h, [begin, end])

    @T.macro
    def share(q, pages, page_values, page_begin, kv_len, low, start, stop, sm_scale, partial, b, s, h):
        # Pages start:stop, and in them the keys low + 1 : kv_len; the result is number s.
        state = I.meta_var(_State(shape))
        scale: T.let[T.float32] = T.max(sm_scale, -sm_scale) * T.float32(LOG2_E)
        for g, i in T.grid(group, steps):
            for v in T.vectorized(lanes):
                state.queries[g, i * lanes + v] = q[b, h * group + g, i * lanes + v] * scale
                partial.out[s, h * group + g, i * lanes + v] = T.float32(0)
        for g in T.serial(group):
            partial.top[s, h * group + g] = T.float32(MASKED)
            partial.total[s, h * group + g] = T.float32(0)
        for i in T.serial(T.max(stop - start, 0)):
            first: T.let[T.int32] = (start + i) * page
            number: T.let[T.int64] = T.Cast("int64", page_values[page_begin + start + i])
            one_page(
                state, partial, pages, number,
                T.max(low + 1 - first, 0), T.min(kv_len - first, page), s, h,
            )

    @T.macro
    def merge(partial, begin, end, output, lse, b, head):
        top = T.alloc_buffer((1,), "float32")
        total = T.alloc_buffer((1,), "float32")
        top[0] = T.float32(MASKED)
        total[0] = T.float32(0)
        for s in T.serial(begin, end):
            top[0] = T.max(top[0], partial.top[s, head])
        for i in T.serial(steps):
            for v in T.vectorized(lanes):
                output[b, head, i * lanes + v] = T.float32(0)
        for s in T.serial(begin, end):
            weight = I.meta_var(exp2(partial.top[s, head] - top[0], 1))
            total[0] = total[0] + weight * partial.total[s, head]
            for i in T.serial(steps):
                for v in T.vectorized(lanes):
                    output[b, head, i * lanes + v] = (
                        output[b, head, i * lanes + v]
                        + weight * partial.out[s, head, i * lanes + v]
                    )
        inverse: T.let[T.float32] = T.if_then_else(
            total[0] > T.float32(0), T.float32(1) / total[0], T.float32(0)
        )
        for i in T.serial(steps):
            for v in T.vectorized(lanes):
                output[b, head, i * lanes + v] = output[b, head, i * lanes + v] * inverse
        lse[b, head] = T.if_then_else(
            total[0] > T.float32(0), top[0] + T.log2(total[0]), T.float32(MASKED)
        )

    @T.prim_func(s_tir=True)
    def decode(
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
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
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
        partial = I.meta_var(_Partial(shape, used_pages * page // _SHARE + batch))
        shares[0] = 0
        for b in T.serial(batch):
            count: T.let[T.int32] = page_indptr[b + 1] - page_indptr[b]
            kv_len[b] = T.if_then_else(count > 0, (count - 1) * page + length[b], 0)
            low[b] = -1
            if window > 0:
                if sm_scale < T.float32(0):
                    low[b] = T.max(position[b] - offset[b] - window, -1)
            shares[b + 1] = shares[b] + T.max(kv_len[b] - low[b] - 1 + _SHARE - 1, 0) // _SHARE
        tasks: T.let[T.int32] = shares[batch] * kv_heads
        for task in T.parallel(tasks):
            sequence = T.alloc_buffer((1,), "int32")
            s: T.let[T.int32] = task // kv_heads
            sequence[0] = 0
            while shares[sequence[0] + 1] <= s:
                sequence[0] = sequence[0] + 1
            b: T.let[T.int32] = sequence[0]
            begin: T.let[T.int32] = (low[b] + 1) // page
            end: T.let[T.int32] = (kv_len[b] + page - 1) // page
            many: T.let[T.int32] = shares[b + 1] - shares[b]
            start: T.let[T.int32] = begin + (end - begin) * (s - shares[b]) // many
            stop: T.let[T.int32] = begin + (end - begin) * (s - shares[b] + 1) // many
            share(
                q, pages, page_values, page_indptr[b], kv_len[b], low[b], start, stop, sm_scale,
                partial, b, s, task % kv_heads,
            )
        for b, head in T.grid(batch, heads):
            merge(partial, shares[b], shares[b + 1], output, lse, b, head)

    return decode
