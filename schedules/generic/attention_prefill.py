"""Prefill attention: many queries of a sequence, against new keys (ragged) or the paged cache.

Flash attention: a task takes `AttentionShape.rows` query rows (a row is one token and one of the
query heads that share a key/value head), transposes their queries once, and walks over the keys
in blocks with a running softmax.
"""

from dataclasses import dataclass
from typing import Any

from gqsa_compiler._tvm import T
from gqsa_compiler.schedules.generic.attention_common import ATTRS, LOG2_E, MASKED, AttentionShape
from gqsa_compiler.schedules.generic.attention_prefill_tiles import (
    FEATURES,
    State,
    Tiles,
    paged_reader,
    ragged_reader,
)

_RAGGED_BLOCK = 32  # keys of a block where no page sets it
_INT_MAX = 2**31 - 1


@dataclass(frozen=True)
class _Operands:
    """The arguments that both kernels have."""

    q: Any
    q_indptr: Any
    position: Any
    offset: Any
    output: Any
    lse: Any
    causal: Any
    sm_scale: Any


def _attend(shape: AttentionShape, block: int) -> tuple[Any, Any, Any]:
    """Return the macros that count a batch's tiles of rows, find one, and compute it."""
    dim, group, rows = shape.head_dim, shape.group, shape.rows
    window, key_tile = shape.window, shape.key_tile
    tiles = Tiles(shape)

    @T.macro
    def count_tiles(q_indptr: Any, batch: Any, count: Any) -> None:
        count[0] = 0
        for b in T.serial(batch):
            count[0] = count[0] + ((q_indptr[b + 1] - q_indptr[b]) * group + rows - 1) // rows

    @T.macro
    def find_tile(q_indptr: Any, batch: Any, number: Any, place: Any) -> None:
        # place = (sequence, the tile's first row in it, tiles of the sequences before).
        place[2] = 0
        for b in T.serial(batch):
            own: T.let[T.int32] = ((q_indptr[b + 1] - q_indptr[b]) * group + rows - 1) // rows
            if number >= place[2] and number < place[2] + own:
                place[0] = b
                place[1] = (number - place[2]) * rows
            place[2] = place[2] + own

    @T.macro
    def load_rows(
        args: Any, state: Any, begin: Any, base: Any, row0: Any, last: Any, h: Any, kv_len: Any
    ) -> None:
        scale: T.let[T.float32] = T.max(args.sm_scale, -args.sm_scale) * T.float32(LOG2_E)
        state.bounds[0] = T.int32(_INT_MAX)
        state.bounds[1] = T.int32(-_INT_MAX)
        state.bounds[2] = T.int32(_INT_MAX)
        state.bounds[3] = T.int32(-_INT_MAX)
        for r in T.serial(rows):
            # Rows past the end repeat the last one; they are not stored.
            row: T.let[T.int32] = T.min(row0 + r, last)
            token: T.let[T.int32] = begin + row // group
            head: T.let[T.int32] = h * group + row % group
            at: T.let[T.int32] = args.position[token] - base
            for d in T.serial(dim):
                state.queries[d, r] = args.q[token, head, d] * scale
            state.high[r] = T.min(kv_len - 1, T.if_then_else(args.causal > 0, at, kv_len))
            state.low[r] = T.int32(-1)
            if window > 0:
                if args.sm_scale < T.float32(0):
                    state.low[r] = at - window
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
    def key_block(state: Any, first: Any, count: Any, key: Any, value: Any) -> None:
        # Whole tiles of scores, then one key at a time.
        for t in T.serial(count // key_tile):
            tiles.scores(state, t * key_tile, key_tile, key)
        for t in T.serial(count % key_tile):
            tiles.scores(state, count // key_tile * key_tile + t, 1, key)
        if first + count - 1 > state.bounds[2] or first <= state.bounds[1]:
            for j in T.serial(count):
                tiles.mask(state, j, first + j)
        tiles.new_maximum(state, count)
        tiles.weights(state, count)
        for t in T.serial(dim // FEATURES):
            tiles.outputs(state, t * FEATURES, count, value)

    @T.macro
    def store_rows(args: Any, state: Any, begin: Any, row0: Any, last: Any, h: Any) -> None:
        for r in T.serial(T.min(rows, last + 1 - row0)):
            token: T.let[T.int32] = begin + (row0 + r) // group
            head: T.let[T.int32] = h * group + (row0 + r) % group
            inverse: T.let[T.float32] = T.if_then_else(
                state.total[r] > T.float32(0), T.float32(1) / state.total[r], T.float32(0)
            )
            for d in T.serial(dim):
                args.output[token, head, d] = state.out[d, r] * inverse
            args.lse[token, head] = T.if_then_else(
                state.total[r] > T.float32(0),
                state.top[r] + T.log2(state.total[r]),
                T.float32(MASKED),
            )

    @T.macro
    def attend(args: Any, place: Any, h: Any, kv_len: Any, read: Any) -> None:
        state = T.meta_var(State(shape, block))
        b: T.let[T.int32] = place[0]
        row0: T.let[T.int32] = place[1]
        begin: T.let[T.int32] = args.q_indptr[b]
        last: T.let[T.int32] = (args.q_indptr[b + 1] - begin) * group - 1
        load_rows(args, state, begin, args.offset[b], row0, last, h, kv_len)
        start: T.let[T.int32] = T.max(state.bounds[0] + 1, 0) // block
        stop: T.let[T.int32] = T.max((state.bounds[3] + block) // block, start)
        for step in T.serial(stop - start):
            first: T.let[T.int32] = (start + step) * block
            reader = T.meta_var(read(first))
            key_block(state, first, T.min(block, kv_len - first), reader[0], reader[1])
        store_rows(args, state, begin, row0, last, h)

    return count_tiles, find_tile, attend


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
        ``TIRRaggedPrefillFunc``). Writes the output float32 [n, Hq, D] and ``lse`` float32
        [n, Hq], the log2 of the sum of exponentials, by which the results of several calls are
        merged; a query that sees no key gets lse -1e30 or less, and an output without meaning. A
        negative ``sm_scale`` means -``sm_scale`` and the sliding window of `shape`.
        ``rotary_mode`` is not looked at: the cache is made with mode NONE.
    """
    return _paged(shape) if paged else _ragged(shape)


def _ragged(shape: AttentionShape) -> Any:
    heads, kv_heads, dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    count_tiles, find_tile, attend = _attend(shape, _RAGGED_BLOCK)

    @T.prim_func(s_tir=True)
    def attention_prefill_ragged(
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
    ) -> None:
        T.func_attr(ATTRS)
        batch = T.int32()
        tokens = T.int32()
        kv_total = T.int32()
        q_indptr_at = T.int32()
        kv_indptr_at = T.int32()
        position_at = T.int32()
        offset_at = T.int32()
        q = T.match_buffer(q_h, (tokens, heads, dim), "float32")
        q_indptr = T.match_buffer(q_indptr_h, (batch + 1,), "int32", elem_offset=q_indptr_at)
        k = T.match_buffer(k_h, (kv_total, kv_heads, dim), "float32")
        v = T.match_buffer(v_h, (kv_total, kv_heads, dim), "float32")
        kv_indptr = T.match_buffer(kv_indptr_h, (batch + 1,), "int32", elem_offset=kv_indptr_at)
        position = T.match_buffer(position_h, (tokens,), "int32", elem_offset=position_at)
        offset = T.match_buffer(offset_h, (batch,), "int32", elem_offset=offset_at)
        output = T.match_buffer(output_h, (tokens, heads, dim), "float32")
        lse = T.match_buffer(lse_h, (tokens, heads), "float32")
        args = T.meta_var(_Operands(q, q_indptr, position, offset, output, lse, causal, sm_scale))
        tiles = T.alloc_buffer((1,), "int32")
        count_tiles(q_indptr, batch, tiles)
        total: T.let[T.int32] = tiles[0]
        for task in T.parallel(total * kv_heads):
            place = T.alloc_buffer((3,), "int32")
            h: T.let[T.int32] = task // total
            # First, last, second, ...: every thread's share has early (short) and late rows.
            zigzag: T.let[T.int32] = task % total
            number: T.let[T.int32] = T.if_then_else(
                zigzag % 2 == 0, zigzag // 2, total - 1 - zigzag // 2
            )
            find_tile(q_indptr, batch, number, place)
            kv_begin: T.let[T.int32] = kv_indptr[place[0]]
            kv_len: T.let[T.int32] = kv_indptr[place[0] + 1] - kv_begin
            read = T.meta_var(ragged_reader(k, v, kv_begin, h))
            attend(args, place, h, kv_len, read)

    return attention_prefill_ragged


def _paged(shape: AttentionShape) -> Any:
    heads, kv_heads, dim, page = (
        shape.num_heads,
        shape.num_kv_heads,
        shape.head_dim,
        shape.page_size,
    )
    count_tiles, find_tile, attend = _attend(shape, page)

    @T.prim_func(s_tir=True)
    def attention_prefill_paged(
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
    ) -> None:
        T.func_attr(ATTRS)
        batch = T.int32()
        tokens = T.int32()
        num_pages = T.int64()
        used_pages = T.int32()
        q_indptr_at = T.int32()
        page_indptr_at = T.int32()
        page_values_at = T.int32()
        length_at = T.int32()
        position_at = T.int32()
        offset_at = T.int32()
        q = T.match_buffer(q_h, (tokens, heads, dim), "float32")
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
        position = T.match_buffer(position_h, (tokens,), "int32", elem_offset=position_at)
        output = T.match_buffer(output_h, (tokens, heads, dim), "float32")
        lse = T.match_buffer(lse_h, (tokens, heads), "float32")
        args = T.meta_var(_Operands(q, q_indptr, position, offset, output, lse, causal, sm_scale))
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
            read = T.meta_var(paged_reader(pages, page_values, page_begin, h, page))
            attend(args, place, h, kv_len, read)

    return attention_prefill_paged
