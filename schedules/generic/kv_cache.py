"""The kernels around attention that TVM's paged KV cache calls: split, append, copy, merge.

Pages are float32 [pages, 2 (K, V), Hkv, page_size, D], TVM's own layout.
"""

from typing import Any

from gqsa_compiler._tvm import T
from gqsa_compiler.schedules.generic.attention_common import ATTRS, AttentionShape, exp2

# Below this many tokens a thread launch costs more than it saves.
_SERIAL_TOKENS = 8


def split_qkv(shape: AttentionShape) -> Any:
    """Build the kernel that splits fused rows into q, k and v.

    Arguments: ``qkv`` float32 [n, Hq + 2 Hkv, D], ``positions`` int32 [n] (unused: RoPE is
    applied before), the outputs ``q``, ``k``, ``v`` float32 [n, heads, D], and ``apply_rope``
    int64 (unused, mode NONE).
    """
    heads, kv_heads, dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    lanes = shape.feature_lanes

    @T.macro
    def copy(src: Any, dst: Any, n: Any, h: Any, skip: Any) -> None:
        for i in T.serial(dim // lanes):
            for v in T.vectorized(lanes):
                dst[n, h, i * lanes + v] = src[n, skip + h, i * lanes + v]

    @T.macro
    def token(qkv: Any, q: Any, k: Any, v: Any, n: Any) -> None:
        for h in T.serial(heads):
            copy(qkv, q, n, h, 0)
        for h in T.serial(kv_heads):
            copy(qkv, k, n, h, heads)
        for h in T.serial(kv_heads):
            copy(qkv, v, n, h, heads + kv_heads)

    @T.prim_func(s_tir=True)
    def split(
        qkv_h: T.handle,
        positions_h: T.handle,
        q_h: T.handle,
        k_h: T.handle,
        v_h: T.handle,
        apply_rope: T.int64,
    ) -> None:
        T.func_attr(ATTRS)
        tokens = T.int32()
        positions_at = T.int32()
        qkv = T.match_buffer(qkv_h, (tokens, heads + 2 * kv_heads, dim), "float32")
        positions = T.match_buffer(positions_h, (tokens,), "int32", elem_offset=positions_at)
        q = T.match_buffer(q_h, (tokens, heads, dim), "float32")
        k = T.match_buffer(k_h, (tokens, kv_heads, dim), "float32")
        v = T.match_buffer(v_h, (tokens, kv_heads, dim), "float32")
        if tokens < _SERIAL_TOKENS:
            for n in T.serial(tokens):
                token(qkv, q, k, v, n)
        else:
            for n in T.parallel(tokens):
                token(qkv, q, k, v, n)

    return split


def append_kv(shape: AttentionShape) -> Any:
    """Build the kernel that writes new keys and values into the pages.

    Arguments: ``pages``, ``k`` and ``v`` float32 [n, Hkv, D], ``position_map`` int32 [n] (page *
    page_size + slot; -1: the token is not kept).
    """
    kv_heads, dim, page = shape.num_kv_heads, shape.head_dim, shape.page_size
    lanes = shape.feature_lanes

    @T.macro
    def token(pages: Any, k: Any, v: Any, position_map: Any, n: Any) -> None:
        place: T.let[T.int32] = position_map[n]
        if place >= 0:
            number: T.let[T.int64] = T.Cast("int64", place // page)
            slot: T.let[T.int32] = place % page
            for h, i in T.grid(kv_heads, dim // lanes):
                for x in T.vectorized(lanes):
                    pages[number, 0, h, slot, i * lanes + x] = k[n, h, i * lanes + x]
                for x in T.vectorized(lanes):
                    pages[number, 1, h, slot, i * lanes + x] = v[n, h, i * lanes + x]

    @T.prim_func(s_tir=True)
    def append(pages_h: T.handle, k_h: T.handle, v_h: T.handle, position_map_h: T.handle) -> None:
        T.func_attr(ATTRS)
        tokens = T.int32()
        num_pages = T.int64()
        map_at = T.int32()
        pages = T.match_buffer(pages_h, (num_pages, 2, kv_heads, page, dim), "float32")
        k = T.match_buffer(k_h, (tokens, kv_heads, dim), "float32")
        v = T.match_buffer(v_h, (tokens, kv_heads, dim), "float32")
        position_map = T.match_buffer(position_map_h, (tokens,), "int32", elem_offset=map_at)
        if tokens < _SERIAL_TOKENS:
            for n in T.serial(tokens):
                token(pages, k, v, position_map, n)
        else:
            for n in T.parallel(tokens):
                token(pages, k, v, position_map, n)

    return append


def merge_states(shape: AttentionShape) -> Any:
    """Build the kernel that merges a second attention result into a first, in place.

    Arguments: ``out`` float32 [n, Hq, D] and ``lse`` float32 [n, Hq] (log2), updated, and the same
    two of the other result.
    """
    heads, dim, lanes = shape.num_heads, shape.head_dim, shape.feature_lanes

    @T.macro
    def row(out: Any, lse: Any, other: Any, other_lse: Any, n: Any) -> None:
        for h in T.serial(heads):
            top: T.let[T.float32] = T.max(lse[n, h], other_lse[n, h])
            mine = T.meta_var(exp2(lse[n, h] - top, 1))
            its = T.meta_var(exp2(other_lse[n, h] - top, 1))
            both: T.let[T.float32] = mine + its
            scale: T.let[T.float32] = mine / both
            other_scale: T.let[T.float32] = its / both
            for i in T.serial(dim // lanes):
                for x in T.vectorized(lanes):
                    out[n, h, i * lanes + x] = (
                        out[n, h, i * lanes + x] * scale + other[n, h, i * lanes + x] * other_scale
                    )
            lse[n, h] = top + T.log2(both)

    @T.prim_func(s_tir=True)
    def merge(out_h: T.handle, lse_h: T.handle, other_h: T.handle, other_lse_h: T.handle) -> None:
        T.func_attr(ATTRS)
        tokens = T.int32()
        out = T.match_buffer(out_h, (tokens, heads, dim), "float32")
        lse = T.match_buffer(lse_h, (tokens, heads), "float32")
        other = T.match_buffer(other_h, (tokens, heads, dim), "float32")
        other_lse = T.match_buffer(other_lse_h, (tokens, heads), "float32")
        if tokens < _SERIAL_TOKENS:
            for n in T.serial(tokens):
                row(out, lse, other, other_lse, n)
        else:
            for n in T.parallel(tokens):
                row(out, lse, other, other_lse, n)

    return merge


def copy_page(shape: AttentionShape) -> Any:
    """Build the kernel that copies the first tokens of a page to another one (sequence forks).

    Arguments: ``pages``, ``source``, ``destination`` and ``length``, all int64.
    """
    kv_heads, dim, page = shape.num_kv_heads, shape.head_dim, shape.page_size
    lanes = shape.feature_lanes

    @T.prim_func(s_tir=True)
    def copy(pages_h: T.handle, source: T.int64, destination: T.int64, length: T.int64) -> None:
        T.func_attr(ATTRS)
        num_pages = T.int64()
        pages = T.match_buffer(pages_h, (num_pages, 2, kv_heads, page, dim), "float32")
        for kind, h, slot, i in T.grid(2, kv_heads, length, dim // lanes):
            for x in T.vectorized(lanes):
                pages[destination, kind, h, slot, i * lanes + x] = pages[
                    source, kind, h, slot, i * lanes + x
                ]

    return copy


def compact_copy(shape: AttentionShape) -> Any:
    """Build the kernel that moves accepted tokens together after a token tree.

    Arguments: ``pages``, ``indptr`` int32 [batch + 1], ``source_destination`` int32 [2, total]
    (page * page_size + slot), ``batch`` int32. Within a sequence the moves are done in order.
    """
    kv_heads, dim, page = shape.num_kv_heads, shape.head_dim, shape.page_size
    lanes = shape.feature_lanes

    @T.prim_func(s_tir=True)
    def compact(pages_h: T.handle, indptr_h: T.handle, moves_h: T.handle, batch: T.int32) -> None:
        T.func_attr(ATTRS)
        num_pages = T.int64()
        total = T.int32()
        indptr_at = T.int32()
        moves_at = T.int32()
        pages = T.match_buffer(pages_h, (num_pages, 2, kv_heads, page, dim), "float32")
        indptr = T.match_buffer(indptr_h, (batch + 1,), "int32", elem_offset=indptr_at)
        moves = T.match_buffer(moves_h, (2, total), "int32", elem_offset=moves_at)
        for m in T.serial(indptr[0], indptr[batch]):
            source: T.let[T.int32] = moves[0, m]
            target: T.let[T.int32] = moves[1, m]
            for kind, h, i in T.grid(2, kv_heads, dim // lanes):
                for x in T.vectorized(lanes):
                    pages[
                        T.Cast("int64", target // page), kind, h, target % page, i * lanes + x
                    ] = pages[
                        T.Cast("int64", source // page), kind, h, source % page, i * lanes + x
                    ]

    return compact


def get_kv(shape: AttentionShape, num_layers: int) -> Any:
    """Build the kernel that reads keys and values back, for ``debug_get_kv``.

    Arguments: ``pages``, ``position_map`` int32 [n], the outputs ``k`` and ``v`` float32
    [num_layers, n, Hkv, D], and ``layer`` int64.
    """
    kv_heads, dim, page = shape.num_kv_heads, shape.head_dim, shape.page_size

    @T.prim_func(s_tir=True)
    def get(
        pages_h: T.handle, map_h: T.handle, k_h: T.handle, v_h: T.handle, layer: T.int64
    ) -> None:
        T.func_attr(ATTRS)
        tokens = T.int64()
        num_pages = T.int64()
        map_at = T.int64()
        pages = T.match_buffer(pages_h, (num_pages, 2, kv_heads, page, dim), "float32")
        position_map = T.match_buffer(map_h, (tokens,), "int32", elem_offset=map_at)
        k = T.match_buffer(k_h, (num_layers, tokens, kv_heads, dim), "float32")
        v = T.match_buffer(v_h, (num_layers, tokens, kv_heads, dim), "float32")
        for n, h, d in T.grid(tokens, kv_heads, dim):
            place: T.let[T.int32] = position_map[n]
            k[layer, n, h, d] = pages[T.Cast("int64", place // page), 0, h, place % page, d]
            v[layer, n, h, d] = pages[T.Cast("int64", place // page), 1, h, place % page, d]

    return get
