"""The kernels around attention that TVM's paged KV cache calls: split, append, copy, merge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gqsa_compiler._tvm import B
from gqsa_compiler.schedules.generic.attention_common import (
    AttentionShape,
    exp2,
    table_argument,
)
from gqsa_compiler.schedules.generic.emit import (
    Buffer,
    Expr,
    argument,
    broadcast,
    copy,
    each_token,
    extent,
    float_to_half,
    half_to_float,
    int64,
    load,
    scalar,
    scheduled,
    store,
)
from gqsa_compiler.schedules.generic.kv_pages import Pages, pages_argument


def split_qkv(shape: AttentionShape) -> Any:
    """Build the kernel that splits fused rows into q, k and v.

    With a float16 cache, k and v are rounded to float16 here: attention then sees the same numbers
    of a new key as of one that it reads from the pages, however a prompt is cut into chunks.

    Arguments: ``qkv`` float32 [n, Hq + 2 Hkv, D], ``positions`` int32 [n] (unused: RoPE is
    applied before), the outputs ``q``, ``k``, ``v`` float32 [n, heads, D], and ``apply_rope``
    int64 (unused, mode NONE).
    """
    heads, kv_heads, dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    tokens = extent("n", "int32")
    with scheduled() as builder:
        qkv = argument("qkv", (tokens, heads + 2 * kv_heads, dim))
        table_argument("positions", tokens)
        q = argument("q", (tokens, heads, dim))
        k = argument("k", (tokens, kv_heads, dim))
        v = argument("v", (tokens, kv_heads, dim))
        scalar("apply_rope", "int64")

        def row(n: Expr) -> None:
            with B.serial(heads) as h:
                copy(q, (n, h, 0), qkv, (n, h, 0), dim, shape.feature_lanes)
            for first, out in ((heads, k), (heads + kv_heads, v)):
                with B.serial(kv_heads) as h:
                    _copy_rounded(shape, out, (n, h, 0), qkv, (n, h + first, 0))

        each_token(tokens, (heads + 2 * kv_heads) * dim, row)
    return builder.get()


def _copy_rounded(
    shape: AttentionShape,
    target: Buffer,
    to: Sequence[Expr],
    source: Buffer,
    origin: Sequence[Expr],
) -> None:
    """Copy a head of keys or values, rounded to what the cache can hold."""
    lanes, native = shape.feature_lanes, shape.native_half
    if not shape.half:
        copy(target, to, source, origin, shape.head_dim, lanes)
        return
    with B.serial(shape.head_dim // lanes) as i:
        value = B.bind(load(source, *origin[:-1], origin[-1] + i * lanes, lanes=lanes))
        half = B.bind(float_to_half(value, lanes, native=native))
        value = half_to_float(half, lanes, native=native)
        store(target, value, *to[:-1], to[-1] + i * lanes, lanes=lanes)


def append_kv(shape: AttentionShape) -> Any:
    """Build the kernel that writes new keys and values into the pages.

    Arguments: ``pages``, ``k`` and ``v`` float32 [n, Hkv, D], ``position_map`` int32 [n] (page *
    page_size + slot; -1: the token is not kept).
    """
    kv_heads, dim, lanes = shape.num_kv_heads, shape.head_dim, shape.feature_lanes
    tokens = extent("n", "int32")
    with scheduled() as builder:
        stored = pages_argument(shape)
        k = argument("k", (tokens, kv_heads, dim))
        v = argument("v", (tokens, kv_heads, dim))
        position_map = table_argument("position_map", tokens)
        pages = Pages.of(shape, stored)

        def row(n: Expr) -> None:
            place = B.bind(load(position_map, n))
            with B.If(place >= 0), B.Then():
                page, slot = _page_and_slot(shape, place)
                with B.serial(kv_heads) as h:
                    for kind, new in enumerate((k, v)):
                        with B.serial(dim // lanes) as i:
                            value = load(new, n, h, i * lanes, lanes=lanes)
                            pages.store(value, page, kind, h, slot, i * lanes, lanes=lanes)

        each_token(tokens, 2 * kv_heads * dim, row)
    return builder.get()


def merge_states(shape: AttentionShape) -> Any:
    """Build the kernel that merges a second attention result into a first, in place.

    Arguments: ``out`` float32 [n, Hq, D] and ``lse`` float32 [n, Hq] (log2), updated, and the same
    two of the other result.
    """
    heads, dim, lanes = shape.num_heads, shape.head_dim, shape.feature_lanes
    tokens = extent("n", "int32")
    with scheduled() as builder:
        out = argument("out", (tokens, heads, dim))
        lse = argument("lse", (tokens, heads))
        other = argument("other", (tokens, heads, dim))
        other_lse = argument("other_lse", (tokens, heads))

        def row(n: Expr) -> None:
            with B.serial(heads) as h:
                top = B.bind(B.max(load(lse, n, h), load(other_lse, n, h)))
                mine = exp2(load(lse, n, h) - top, 1)
                its = exp2(load(other_lse, n, h) - top, 1)
                both = B.bind(mine + its)
                scale = B.bind(broadcast(mine / both, lanes))
                other_scale = B.bind(broadcast(its / both, lanes))
                with B.serial(dim // lanes) as i:
                    at = (n, h, i * lanes)
                    merged = load(out, *at, lanes=lanes) * scale
                    merged = merged + load(other, *at, lanes=lanes) * other_scale
                    store(out, merged, *at, lanes=lanes)
                store(lse, top + B.log2(both), n, h)

        each_token(tokens, 2 * heads * dim, row)
    return builder.get()


def copy_page(shape: AttentionShape) -> Any:
    """Build the kernel that copies the first tokens of a page to another one (sequence forks).

    Arguments: ``pages``, ``source``, ``destination`` and ``length``, all int64.
    """
    with scheduled() as builder:
        stored = pages_argument(shape)
        source, destination = scalar("source", "int64"), scalar("destination", "int64")
        length = scalar("length", "int64")
        pages = Pages.of(shape, stored)
        with B.grid(2, shape.num_kv_heads, length) as (kind, h, slot):
            pages.move((destination, kind, h, slot, 0), (source, kind, h, slot, 0))
    return builder.get()


def compact_copy(shape: AttentionShape) -> Any:
    """Build the kernel that moves accepted tokens together after a token tree.

    Arguments: ``pages``, ``indptr`` int32 [batch + 1], ``source_destination`` int32 [2, total]
    (page * page_size + slot), ``batch`` int32. Within a sequence the moves are done in order.
    """
    with scheduled() as builder:
        stored = pages_argument(shape)
        batch = extent("batch", "int32")
        indptr = table_argument("indptr", batch + 1)
        moves = table_argument("source_destination", 2, extent("total", "int32"))
        B.arg("batch", batch)
        pages = Pages.of(shape, stored)
        with B.serial(load(indptr, 0), load(indptr, batch)) as move:
            source, source_slot = _page_and_slot(shape, load(moves, 0, move))
            target, target_slot = _page_and_slot(shape, load(moves, 1, move))
            with B.grid(2, shape.num_kv_heads) as (kind, h):
                pages.move((target, kind, h, target_slot, 0), (source, kind, h, source_slot, 0))
    return builder.get()


def get_kv(shape: AttentionShape, num_layers: int) -> Any:
    """Build the kernel that reads keys and values back, for ``debug_get_kv``.

    Arguments: ``pages``, ``position_map`` int32 [n], the outputs ``k`` and ``v`` float32
    [num_layers, n, Hkv, D], and ``layer`` int64.
    """
    kv_heads, dim, lanes = shape.num_kv_heads, shape.head_dim, shape.feature_lanes
    tokens = extent("n")
    with scheduled() as builder:
        stored = pages_argument(shape)
        position_map = table_argument("position_map", tokens)
        k = argument("k", (num_layers, tokens, kv_heads, dim))
        v = argument("v", (num_layers, tokens, kv_heads, dim))
        layer = scalar("layer", "int64")
        pages = Pages.of(shape, stored)
        with B.serial(tokens) as n:
            page, slot = _page_and_slot(shape, load(position_map, n))
            with B.serial(kv_heads) as h:
                for kind, out in enumerate((k, v)):
                    with B.serial(dim // lanes) as i:
                        value = pages.load(page, kind, h, slot, i * lanes, lanes=lanes)
                        store(out, value, layer, n, h, i * lanes, lanes=lanes)
    return builder.get()


def _page_and_slot(shape: AttentionShape, place: Expr) -> tuple[Expr, Expr]:
    place = B.bind(place)
    page = B.bind(int64(B.floordiv(place, shape.page_size)))
    return page, B.bind(B.floormod(place, shape.page_size))
