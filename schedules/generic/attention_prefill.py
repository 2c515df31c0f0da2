"""Prefill attention: many queries of a sequence, against new keys (ragged) or the paged cache.

Flash attention with the query rows in the vector lanes: a row is one token and one of the query
heads that share a key/value head. A task takes `AttentionShape.rows` rows, transposes their
queries once, and walks over the keys in blocks: scores S[key][row] and outputs O[feature][row]
are sums of a vector of rows times one broadcast scalar of K or V, so K and V are read as they lie
and the softmax needs no sums across lanes.
"""

from typing import Any

from tvm.script import ir as I

from gqsa_compiler._tvm import T, tirx
from gqsa_compiler.schedules.generic.attention_common import (
    LOG2_E,
    MASKED,
    AttentionShape,
    exp2,
    splat,
    tile_buffers,
    vec,
)

_RAGGED_BLOCK = 32  # keys of a block where no page sets it
_FEATURES = 8  # features of an output tile


class _State:
    """The buffers of one task; made where its TVMScript stands."""

    def __init__(self, shape: AttentionShape, block: int) -> None:
        rows = shape.rows
        self.queries = T.alloc_buffer((shape.head_dim, rows), "float32")
        self.out = T.alloc_buffer((shape.head_dim, rows), "float32")
        self.scores = T.alloc_buffer((block, rows), "float32")
        # A row sees the keys low < key <= high.
        self.low = T.alloc_buffer((rows,), "int32")
        self.high = T.alloc_buffer((rows,), "int32")
        self.bounds = T.alloc_buffer((4,), "int32")
        # Running maximum of the scores, sum of exponentials, and the last block's rescaling.
        self.top = T.alloc_buffer((rows,), "float32")
        self.total = T.alloc_buffer((rows,), "float32")
        self.factor = T.alloc_buffer((rows,), "float32")


def attention_prefill(shape: AttentionShape, paged: bool) -> Any:
    """Build the kernel that TVM's paged cache calls for several queries a sequence.

    Parameters
    ----------
    shape : AttentionShape
    paged : bool
        Keys and values are in the cache's pages; otherwise they are the new ones, ragged.

    Returns
    -------
    PrimFunc
        With the arguments that the runtime gives (``TIRPagedPrefillFunc``,
        ``TIRRaggedPrefillFunc``). Writes the output float32 [n, Hq, D] and, as log2, the sum of
        exponentials float32 [n, Hq] by which the results of several calls are merged; a query
        that sees no key gets lse -1e30. A negative ``sm_scale`` means -``sm_scale`` and the sliding
        window of `shape`. RoPE inside attention (``rotary_mode``) is not supported and ignored:
        the cache is made with mode NONE.
    """
    heads, kv_heads, dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    group, rows, lanes = shape.group, shape.rows, shape.lanes
    window = shape.window
    block = shape.page_size if paged else _RAGGED_BLOCK
    tile = shape.key_tile
    page = shape.page_size

    columns = [vec(i * lanes, lanes) for i in range(shape.row_vectors)]
    whole = vec(0, lanes)

    def accumulate(acc: list[Any], left: Any, line: Any, scalars: list[Any]) -> None:
        """Emit acc[i] += left[line] * scalars[i] for every row vector."""
        vectors = [T.Bind(left[line, at]) for at in columns]
        for i, scalar in enumerate(scalars):
            value = T.Bind(splat(scalar, lanes))
            at = vec(i * lanes, lanes)
            for r, vector in enumerate(vectors):
                T.buffer_store(acc[r], acc[r][at] + vector * value, [at])

    def score_tile(state: _State, j: Any, count: int, key: Any) -> None:
        """Emit the scores of `count` keys from j on; key(j, d) is a scalar of K."""
        acc = tile_buffers(shape.row_vectors, count, lanes)
        for i in range(count):
            for buffer in acc:
                T.buffer_store(buffer, splat(T.float32(0), lanes), [vec(i * lanes, lanes)])
        with T.serial(dim) as d:
            accumulate(acc, state.queries, d, [key(j + i, d) for i in range(count)])
        for i in range(count):
            for buffer, at in zip(acc, columns, strict=True):
                T.buffer_store(state.scores, buffer[vec(i * lanes, lanes)], [j + i, at])

    def output_tile(state: _State, d: Any, count: Any, value: Any) -> None:
        """Emit out[d : d + 8] = out * factor + the sum over keys of weight * value(j, d)."""
        acc = tile_buffers(shape.row_vectors, _FEATURES, lanes)
        for buffer, at in zip(acc, columns, strict=True):
            factor = T.Bind(state.factor[at])
            for i in range(_FEATURES):
                T.buffer_store(buffer, state.out[d + i, at] * factor, [vec(i * lanes, lanes)])
        with T.serial(count) as j:
            accumulate(acc, state.scores, j, [value(j, d + i) for i in range(_FEATURES)])
        for i in range(_FEATURES):
            for buffer, at in zip(acc, columns, strict=True):
                T.buffer_store(state.out, buffer[vec(i * lanes, lanes)], [d + i, at])

    def mask_key(state: _State, j: Any, key: Any) -> None:
        """Emit: rows that do not see `key` get the score MASKED."""
        for at in columns:
            keys = splat(key, lanes)
            seen = tirx.And(state.low[at] < keys, keys <= state.high[at])
            masked = T.Select(seen, state.scores[j, at], splat(T.float32(MASKED), lanes))
            T.buffer_store(state.scores, masked, [j, at])

    def new_maximum(state: _State, count: Any) -> None:
        """Emit top = max(top, scores); the old one is kept in factor."""
        running = tile_buffers(shape.row_vectors, 1, lanes)
        for buffer, at in zip(running, columns, strict=True):
            T.buffer_store(state.factor, state.top[at], [at])
            T.buffer_store(buffer, state.top[at], [whole])
        with T.serial(count) as j:
            for buffer, at in zip(running, columns, strict=True):
                T.buffer_store(buffer, T.max(buffer[whole], state.scores[j, at]), [whole])
        for buffer, at in zip(running, columns, strict=True):
            T.buffer_store(state.top, buffer[whole], [at])

    def weigh(state: _State, count: Any) -> None:
        """Emit factor = exp2(factor - top), scores = exp2(scores - top), and the new total."""
        sums = tile_buffers(shape.row_vectors, 1, lanes)
        tops = [T.Bind(state.top[at]) for at in columns]
        for r, at in enumerate(columns):
            factor = exp2(state.factor[at] - tops[r], lanes)
            T.buffer_store(state.factor, factor, [at])
            T.buffer_store(sums[r], state.total[at] * factor, [whole])
        with T.serial(count) as j:
            for r, at in enumerate(columns):
                weight = exp2(state.scores[j, at] - tops[r], lanes)
                T.buffer_store(state.scores, weight, [j, at])
                T.buffer_store(sums[r], sums[r][whole] + weight, [whole])
        for r, at in enumerate(columns):
            T.buffer_store(state.total, sums[r][whole], [at])

    def paged_reader(pages: Any, page_values: Any, page_begin: Any, h: Any) -> Any:
        def open_block(first: Any) -> Any:
            page = T.Bind(T.Cast("int64", page_values[page_begin + first // block]))
            return (
                lambda j, d: pages[page, 0, h, j, d],
                lambda j, d: pages[page, 1, h, j, d],
            )

        return open_block

    def ragged_reader(k: Any, v: Any, kv_begin: Any, h: Any) -> Any:
        def open_block(first: Any) -> Any:
            begin = T.Bind(kv_begin + first)
            return lambda j, d: k[begin + j, h, d], lambda j, d: v[begin + j, h, d]

        return open_block

    @T.macro
    def find_tile(q_indptr, batch, number, place):
        # place = (sequence, its first row of the tile, tiles before the sequence)
        place[2] = 0
        for b in T.serial(batch):
            tiles: T.let[T.int32] = ((q_indptr[b + 1] - q_indptr[b]) * group + rows - 1) // rows
            if number >= place[2] and number < place[2] + tiles:
                place[0] = b
                place[1] = (number - place[2]) * rows
            place[2] = place[2] + tiles

    @T.macro
    def count_tiles(q_indptr, batch, tiles):
        tiles[0] = 0
        for b in T.serial(batch):
            tiles[0] = tiles[0] + ((q_indptr[b + 1] - q_indptr[b]) * group + rows - 1) // rows

    @T.macro
    def load_rows(q, position, begin, base, row0, all_rows, h, kv_len, causal, sm_scale, state):
        # bounds: lowest low, highest low, lowest high, highest high of the rows.
        scale: T.let[T.float32] = T.max(sm_scale, -sm_scale) * T.float32(LOG2_E)
        state.bounds[0] = T.int32(2147483647)
        state.bounds[1] = T.int32(-2147483647)
        state.bounds[2] = T.int32(2147483647)
        state.bounds[3] = T.int32(-2147483647)
        for r in T.serial(rows):
            # Rows past the end repeat the last one; they are not stored.
            row: T.let[T.int32] = T.min(row0 + r, all_rows - 1)
            token: T.let[T.int32] = begin + row // group
            head: T.let[T.int32] = h * group + row % group
            at: T.let[T.int32] = position[token] - base
            for d in T.serial(dim):
                state.queries[d, r] = q[token, head, d] * scale
            state.high[r] = T.min(kv_len - 1, T.if_then_else(causal > 0, at, kv_len))
            if window > 0:
                state.low[r] = T.if_then_else(sm_scale < T.float32(0), at - window, T.int32(-1))
            else:
                state.low[r] = T.int32(-1)
            state.bounds[0] = T.min(state.bounds[0], state.low[r])
            state.bounds[1] = T.max(state.bounds[1], state.low[r])
            state.bounds[2] = T.min(state.bounds[2], state.high[r])
            state.bounds[3] = T.max(state.bounds[3], state.high[r])
        for r in T.vectorized(rows):
            state.top[r] = T.float32(MASKED)
            state.total[r] = T.float32(0)
        for d in T.serial(dim):
            for r in T.vectorized(rows):
                state.out[d, r] = T.float32(0)

    @T.macro
    def key_block(first, count, key, value, state):
        # Scores of the block's keys: whole tiles, then one key at a time.
        for t in T.serial(count // tile):
            score_tile(state, t * tile, tile, key)
        for t in T.serial(count % tile):
            score_tile(state, count // tile * tile + t, 1, key)
        if first + count - 1 > state.bounds[2] or first <= state.bounds[1]:
            for j in T.serial(count):
                mask_key(state, j, first + j)
        new_maximum(state, count)
        weigh(state, count)
        for t in T.serial(dim // _FEATURES):
            output_tile(state, t * _FEATURES, count, value)

    @T.macro
    def store_rows(output, lse, begin, row0, all_rows, h, state):
        for r in T.serial(T.min(rows, all_rows - row0)):
            token: T.let[T.int32] = begin + (row0 + r) // group
            head: T.let[T.int32] = h * group + (row0 + r) % group
            inverse: T.let[T.float32] = T.if_then_else(
                state.total[r] > T.float32(0), T.float32(1) / state.total[r], T.float32(0)
            )
            for d in T.serial(dim):
                output[token, head, d] = state.out[d, r] * inverse
            lse[token, head] = T.if_then_else(
                state.total[r] > T.float32(0),
                state.top[r] + T.log2(state.total[r]),
                T.float32(MASKED),
            )

    @T.macro
    def attend(q, q_indptr, position, offset, output, lse, place, h, kv_len, causal, sm_scale, read):
        state = I.meta_var(_State(shape, block))
        b: T.let[T.int32] = place[0]
        row0: T.let[T.int32] = place[1]
        begin: T.let[T.int32] = q_indptr[b]
        all_rows: T.let[T.int32] = (q_indptr[b + 1] - begin) * group
        load_rows(q, position, begin, offset[b], row0, all_rows, h, kv_len, causal, sm_scale, state)
        start: T.let[T.int32] = T.max(state.bounds[0] + 1, 0) // block
        stop: T.let[T.int32] = T.max((state.bounds[3] + block) // block, start)
        for step in T.serial(stop - start):
            first: T.let[T.int32] = (start + step) * block
            reader = I.meta_var(read(first))
            key_block(first, T.min(block, kv_len - first), reader[0], reader[1], state)
        store_rows(output, lse, begin, row0, all_rows, h, state)

    @T.prim_func(s_tir=True)
    def ragged(
        q_h: T.handle,
        q_indptr_h: T.handle,
        k_h: T.handle,
        v_h: T.handle,
        kv_indptr_h: T.handle,
        position_h: T.handle,
        offset_h: T.handle,
        output_h: T.handle,
        lse_h: T.handle,
        causal: T.int32,
        rotary_mode: T.int32,
        rope_scale: T.float32,
        rope_theta: T.float32,
        sm_scale: T.float32,
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        batch = T.int32()
        qo_len = T.int32()
        kv_total = T.int32()
        q_indptr_at = T.int32()
        kv_indptr_at = T.int32()
        position_at = T.int32()
        offset_at = T.int32()
        q = T.match_buffer(q_h, (qo_len, heads, dim), "float32")
        q_indptr = T.match_buffer(q_indptr_h, (batch + 1,), "int32", elem_offset=q_indptr_at)
        k = T.match_buffer(k_h, (kv_total, kv_heads, dim), "float32")
        v = T.match_buffer(v_h, (kv_total, kv_heads, dim), "float32")
        kv_indptr = T.match_buffer(kv_indptr_h, (batch + 1,), "int32", elem_offset=kv_indptr_at)
        position = T.match_buffer(position_h, (qo_len,), "int32", elem_offset=position_at)
        offset = T.match_buffer(offset_h, (batch,), "int32", elem_offset=offset_at)
        output = T.match_buffer(output_h, (qo_len, heads, dim), "float32")
        lse = T.match_buffer(lse_h, (qo_len, heads), "float32")
        tiles = T.alloc_buffer((1,), "int32")
        count_tiles(q_indptr, batch, tiles)
        total: T.let[T.int32] = tiles[0]
        for task in T.parallel(total * kv_heads):
            place = T.alloc_buffer((3,), "int32")
            h: T.let[T.int32] = task // total
            zig: T.let[T.int32] = task % total
            # First, last, second, ...: every thread's share has early (short) and late rows.
            number: T.let[T.int32] = T.if_then_else(zig % 2 == 0, zig // 2, total - 1 - zig // 2)
            find_tile(q_indptr, batch, number, place)
            kv_begin: T.let[T.int32] = kv_indptr[place[0]]
            kv_len: T.let[T.int32] = kv_indptr[place[0] + 1] - kv_begin
            read = I.meta_var(ragged_reader(k, v, kv_begin, h))
            attend(
                q, q_indptr, position, offset, output, lse, place, h, kv_len, causal, sm_scale, read
            )

    @T.prim_func(s_tir=True)
    def paged_kernel(
        q_h: T.handle,
        q_indptr_h: T.handle,
        pages_h: T.handle,
        page_indptr_h: T.handle,
        page_values_h: T.handle,
        length_h: T.handle,
        offset_h: T.handle,
        position_h: T.handle,
        output_h: T.handle,
        lse_h: T.handle,
        causal: T.int32,
        rotary_mode: T.int32,
        rope_scale: T.float32,
        rope_theta: T.float32,
        sm_scale: T.float32,
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        batch = T.int32()
        qo_len = T.int32()
        num_pages = T.int64()
        used_pages = T.int32()
        q_indptr_at = T.int32()
        page_indptr_at = T.int32()
        page_values_at = T.int32()
        length_at = T.int32()
        position_at = T.int32()
        offset_at = T.int32()
        q = T.match_buffer(q_h, (qo_len, heads, dim), "float32")
        q_indptr = T.match_buffer(q_indptr_h, (batch + 1,), "int32", elem_offset=q_indptr_at)
        pages = T.match_buffer(pages_h, (num_pages, 2, kv_heads, page, dim), "float32")
        page_indptr = T.match_buffer(
            page_indptr_h, (batch + 1,), "int32", elem_offset=page_indptr_at
        )
        page_values = T.match_buffer(
            page_values_h, (used_pages,), "int32", elem_offset=page_values_at
        )
        length = T.match_buffer(length_h, (batch,), "int32", elem_offset=length_at)
        offset = T.match_buffer(offset_h, (batch,), "int32", elem_offset=offset_at)
        position = T.match_buffer(position_h, (qo_len,), "int32", elem_offset=position_at)
        output = T.match_buffer(output_h, (qo_len, heads, dim), "float32")
        lse = T.match_buffer(lse_h, (qo_len, heads), "float32")
        tiles = T.alloc_buffer((1,), "int32")
        count_tiles(q_indptr, batch, tiles)
        total: T.let[T.int32] = tiles[0]
        for task in T.parallel(total * kv_heads):
            place = T.alloc_buffer((3,), "int32")
            h: T.let[T.int32] = task // total
            find_tile(q_indptr, batch, task % total, place)
            page_begin: T.let[T.int32] = page_indptr[place[0]]
            page_count: T.let[T.int32] = page_indptr[place[0] + 1] - page_begin
            kv_len: T.let[T.int32] = T.if_then_else(
                page_count > 0, (page_count - 1) * page + length[place[0]], 0
            )
            read = I.meta_var(paged_reader(pages, page_values, page_begin, h))
            attend(
                q, q_indptr, position, offset, output, lse, place, h, kv_len, causal, sm_scale, read
            )

    return paged_kernel if paged else ragged
