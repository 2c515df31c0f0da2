"""The kernels around attention that TVM's paged KV cache calls, on a GPU.

Everything the cache holds and takes is float16 here: pages, q, k, v and attention's output, so
that the runtime and the kernels mean the same bytes (unlike `generic.kv_pages`).
"""

from __future__ import annotations

from typing import Any

from gqsa_compiler._tvm import B, T
from gqsa_compiler.schedules.cuda.launch import each
from gqsa_compiler.schedules.generic.attention_common import AttentionShape, table_argument
from gqsa_compiler.schedules.generic.emit import (
    Buffer,
    Expr,
    argument,
    extent,
    int64,
    load,
    scalar,
    scheduled,
    store,
)

HALVES = 8
"""Of a 16-byte load; divides every supported head."""


def pages_argument(shape: AttentionShape) -> Buffer:
    """Declare the pages, float16 [pages, 2 (K, V), Hkv, page_size, D], as the next argument."""
    kv_heads, page, dim = shape.num_kv_heads, shape.page_size, shape.head_dim
    return argument("pages", (extent("num_pages"), 2, kv_heads, page, dim), "float16")


def _split(number: Expr, *sizes: int) -> list[Expr]:
    """Emit the indices of element `number` of [..., *sizes], int64."""
    indices = []
    for size in reversed(sizes):
        indices.append(B.bind(B.floormod(number, int64(size))))
        number = B.bind(B.floordiv(number, int64(size)))
    return [number, *reversed(indices)]


def split_qkv(shape: AttentionShape) -> Any:
    """Build the kernel that splits fused rows into q, k and v.

    Arguments: ``qkv`` float16 [n, Hq + 2 Hkv, D], ``positions`` int32 [n] (unused: RoPE is
    applied before), the outputs ``q``, ``k``, ``v`` float16 [n, heads, D], and ``apply_rope``
    int64 (unused, mode NONE).
    """
    heads, kv_heads, dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    tokens = extent("n", "int32")
    width = heads + 2 * kv_heads
    with scheduled() as builder:
        qkv = argument("qkv", (tokens, width, dim), "float16")
        table_argument("positions", tokens)
        q = argument("q", (tokens, heads, dim), "float16")
        k = argument("k", (tokens, kv_heads, dim), "float16")
        v = argument("v", (tokens, kv_heads, dim), "float16")
        scalar("apply_rope", "int64")
        chunks = dim // HALVES

        def body(number: Expr) -> None:
            token, head, chunk = _split(number, width, chunks)
            at = B.bind(chunk * int64(HALVES))
            value = load(qkv, token, head, at, lanes=HALVES)
            first, second = int64(heads), int64(heads + kv_heads)
            with B.If(head < first):
                with B.Then():
                    store(q, value, token, head, at, lanes=HALVES)
                with B.Else(), B.If(head < second):
                    with B.Then():
                        store(k, value, token, head - first, at, lanes=HALVES)
                    with B.Else():
                        store(v, value, token, head - second, at, lanes=HALVES)

        each(B.Cast("int64", tokens) * int64(width * chunks), body)
    return builder.get()


def append_kv(shape: AttentionShape) -> Any:
    """Build the kernel that writes new keys and values into the pages.

    Arguments: ``pages``, ``k`` and ``v`` float16 [n, Hkv, D], ``position_map`` int32 [n] (page *
    page_size + slot; -1: the token is not kept).
    """
    kv_heads, dim = shape.num_kv_heads, shape.head_dim
    tokens = extent("n", "int32")
    with scheduled() as builder:
        pages = pages_argument(shape)
        k = argument("k", (tokens, kv_heads, dim), "float16")
        v = argument("v", (tokens, kv_heads, dim), "float16")
        position_map = table_argument("position_map", tokens)
        chunks = dim // HALVES

        def body(number: Expr) -> None:
            token, head, chunk = _split(number, kv_heads, chunks)
            at = B.bind(chunk * int64(HALVES))
            place = B.bind(load(position_map, token))
            with B.If(place >= 0), B.Then():
                page, slot = page_and_slot(shape, place)
                for kind, new in enumerate((k, v)):
                    value = load(new, token, head, at, lanes=HALVES)
                    store(pages, value, page, int64(kind), head, slot, at, lanes=HALVES)

        each(B.Cast("int64", tokens) * int64(kv_heads * chunks), body)
    return builder.get()


def page_and_slot(shape: AttentionShape, place: Expr) -> tuple[Expr, Expr]:
    """Emit the page and the slot, int64, of a place in the cache."""
    page = B.bind(int64(B.floordiv(place, shape.page_size)))
    return page, B.bind(int64(B.floormod(place, shape.page_size)))


def merge_states(shape: AttentionShape) -> Any:
    """Build the kernel that merges a second attention result into a first, in place.

    Arguments: ``out`` float16 [n, Hq, D] and ``lse`` float32 [n, Hq] (log2), updated, and the same
    two of the other result.
    """
    heads, dim = shape.num_heads, shape.head_dim
    tokens = extent("n", "int32")
    with scheduled() as builder:
        out = argument("out", (tokens, heads, dim), "float16")
        lse = argument("lse", (tokens, heads))
        other = argument("other", (tokens, heads, dim), "float16")
        other_lse = argument("other_lse", (tokens, heads))

        def body(number: Expr) -> None:
            token, head = _split(number, heads)
            mine, its = B.bind(load(lse, token, head)), B.bind(load(other_lse, token, head))
            top = B.bind(B.max(mine, its))
            mine, its = B.bind(T.exp2(mine - top)), B.bind(T.exp2(its - top))
            both = B.bind(mine + its)
            with B.serial(dim) as i:
                first = B.Cast("float32", load(out, token, head, i)) * (mine / both)
                second = B.Cast("float32", load(other, token, head, i)) * (its / both)
                store(out, B.Cast("float16", first + second), token, head, i)
            store(lse, top + T.log2(both), token, head)

        each(B.Cast("int64", tokens) * int64(heads), body)
    return builder.get()


def copy_page(shape: AttentionShape) -> Any:
    """Build the kernel that copies the first tokens of a page to another one (sequence forks).

    Arguments: ``pages``, ``source``, ``destination`` and ``length``, all int64.
    """
    with scheduled() as builder:
        pages = pages_argument(shape)
        source, destination = scalar("source", "int64"), scalar("destination", "int64")
        length = scalar("length", "int64")
        chunks = shape.head_dim // HALVES

        def body(number: Expr) -> None:
            slot, kind, head, chunk = _split(number, 2, shape.num_kv_heads, chunks)
            at = (kind, head, slot, B.bind(chunk * int64(HALVES)))
            value = load(pages, source, *at, lanes=HALVES)
            store(pages, value, destination, *at, lanes=HALVES)

        each(length * int64(2 * shape.num_kv_heads * chunks), body)
    return builder.get()


def compact_copy(shape: AttentionShape) -> Any:
    """Build the kernel that moves accepted tokens together after a token tree.

    Arguments: ``pages``, ``indptr`` int32 [batch + 1], ``source_destination`` int32 [2, total]
    (page * page_size + slot), ``batch`` int32. A thread moves its part of every token of a
    sequence, in order.
    """
    with scheduled() as builder:
        pages = pages_argument(shape)
        batch = extent("batch", "int32")
        indptr = table_argument("indptr", batch + 1)
        moves = table_argument("source_destination", 2, extent("total", "int32"))
        B.arg("batch", batch)
        chunks = shape.head_dim // HALVES

        def body(number: Expr) -> None:
            sequence, kind, head, chunk = _split(number, 2, shape.num_kv_heads, chunks)
            at = B.bind(chunk * int64(HALVES))
            begin = B.bind(load(indptr, sequence))
            with B.serial(load(indptr, sequence + int64(1)) - begin) as i:
                page, slot = page_and_slot(shape, B.bind(load(moves, 0, begin + i)))
                value = load(pages, page, kind, head, slot, at, lanes=HALVES)
                page, slot = page_and_slot(shape, B.bind(load(moves, 1, begin + i)))
                store(pages, value, page, kind, head, slot, at, lanes=HALVES)

        each(B.Cast("int64", batch) * int64(2 * shape.num_kv_heads * chunks), body)
    return builder.get()


def get_kv(shape: AttentionShape, num_layers: int) -> Any:
    """Build the kernel that reads keys and values back, for ``debug_get_kv``.

    Arguments: ``pages``, ``position_map`` int32 [n], the outputs ``k`` and ``v`` float16
    [num_layers, n, Hkv, D], and ``layer`` int64.
    """
    kv_heads, dim = shape.num_kv_heads, shape.head_dim
    tokens = extent("n")
    with scheduled() as builder:
        pages = pages_argument(shape)
        position_map = table_argument("position_map", tokens)
        k = argument("k", (num_layers, tokens, kv_heads, dim), "float16")
        v = argument("v", (num_layers, tokens, kv_heads, dim), "float16")
        layer = scalar("layer", "int64")
        chunks = dim // HALVES

        def body(number: Expr) -> None:
            token, head, chunk = _split(number, kv_heads, chunks)
            at = B.bind(chunk * int64(HALVES))
            page, slot = page_and_slot(shape, B.bind(load(position_map, token)))
            for kind, out in enumerate((k, v)):
                value = load(pages, page, int64(kind), head, slot, at, lanes=HALVES)
                store(out, value, layer, token, head, at, lanes=HALVES)

        each(tokens * int64(kv_heads * chunks), body)
    return builder.get()
