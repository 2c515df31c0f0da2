"""The attention kernels called alone, for what the runtime object seldom or never asks."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gqsa_compiler._tvm import T, Target, tvm
from gqsa_compiler.errors import CompileError
from gqsa_compiler.schedules.generic.attention_common import (
    MASKED,
    AttentionShape,
    exp2,
    tile_buffers,
)
from gqsa_compiler.schedules.generic.attention_decode import attention_decode
from gqsa_compiler.schedules.generic.attention_prefill import attention_prefill
from gqsa_compiler.schedules.generic.config import has_native_half
from gqsa_compiler.schedules.generic.emit import span, vector_lanes
from gqsa_compiler.schedules.generic.kv_cache import compact_copy, copy_page, merge_states
from gqsa_compiler.targets import parse_target

SHAPE = AttentionShape(6, 2, 32, page_size=8, window=5, lanes=vector_lanes(parse_target("cpu")))
SCALE = SHAPE.head_dim**-0.5
HALF_OR_NOT = pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=5)
Array = npt.NDArray[Any]


@cache
def kernel(name: str, half: bool = False) -> Any:
    """Compile one kernel for this machine."""
    native = has_native_half(parse_target("cpu"))
    shape = replace(SHAPE, half=half, native_half=native)
    build = {
        "ragged": lambda: attention_prefill(shape, paged=False),
        "paged": lambda: attention_prefill(shape, paged=True),
        "decode": lambda: attention_decode(shape),
        "merge": lambda: merge_states(shape),
        "copy": lambda: copy_page(shape),
        "compact": lambda: compact_copy(shape),
    }[name]
    module = tvm.IRModule({"main": build().with_attr("global_symbol", "main")})
    return tvm.compile(module, Target(parse_target("cpu").tvm_dict()))["main"]


def reference(q: Array, k: Array, v: Array, seen: Array) -> tuple[Array, Array]:
    """Return attention of q [m, Hq, D] over k, v [n, Hkv, D] and the log2 of the sums [m, Hq]."""
    group = q.shape[1] // k.shape[1]
    k, v = (np.repeat(x.astype(np.float64), group, axis=1) for x in (k, v))
    scores = np.einsum("ihd,jhd->hij", q, k) * SCALE * np.log2(np.e)
    weights = np.exp2(scores) * seen
    total = weights.sum(axis=-1)
    out = np.einsum("hij,jhd->ihd", weights, v)
    with np.errstate(divide="ignore", invalid="ignore"):
        return out / total.T[:, :, None], np.log2(total).T


def compare(out: Array, lse: Array, want: Array, want_lse: Array) -> None:
    """Check the rows that see a key; the others must have an lse that merging ignores."""
    blind = np.isinf(want_lse)
    np.testing.assert_allclose(out[~blind], want[~blind], atol=3e-6)
    np.testing.assert_allclose(lse[~blind], want_lse[~blind], atol=3e-6, rtol=1e-6)
    assert np.all(lse[blind] <= MASKED / 2)
    assert np.all(np.isfinite(out))


def half_view(stored: Array) -> Array:
    """Return the float16 pages that float32 pages hold, in the first half of the memory."""
    return stored.reshape(-1).view(np.float16)[: stored.size].reshape(stored.shape)


class Batch:
    """Random sequences: q and new k, v, and the same number of pages of history."""

    def __init__(self, lengths: list[int], history: list[int], half: bool = False) -> None:
        rng = np.random.default_rng(0)

        def normal(*shape: int) -> Array:
            return rng.standard_normal(shape).astype(np.float32)

        heads, keys, dim, page = SHAPE.num_heads, SHAPE.num_kv_heads, SHAPE.head_dim, 8
        self.lengths, self.history = lengths, history
        self.indptr = np.cumsum([0, *lengths]).astype(np.int32)
        total = int(self.indptr[-1])
        self.q = normal(total, heads, dim)
        self.k, self.v = normal(total, keys, dim), normal(total, keys, dim)
        counts = [-(-n // page) for n in history]
        self.page_indptr = np.cumsum([0, *counts]).astype(np.int32)
        used = int(self.page_indptr[-1])
        # Slots that no key fills hold NaN: nothing may come of them.
        self.stored = np.full((used + 2, 2, keys, page, dim), np.nan, np.float32)
        self.pages = half_view(self.stored) if half else self.stored
        self.page_values = rng.permutation(used + 2)[:used].astype(np.int32)
        self.last = np.array([(n - 1) % page + 1 if n else 0 for n in history], np.int32)
        self.offset = np.arange(len(lengths), dtype=np.int32) * 3
        self.old_k = [normal(n, keys, dim).astype(self.pages.dtype) for n in history]
        self.old_v = [normal(n, keys, dim).astype(self.pages.dtype) for n in history]
        for b, n in enumerate(history):
            for j in range(n):
                number = self.page_values[self.page_indptr[b] + j // page]
                self.pages[number, 0, :, j % page] = self.old_k[b][j]
                self.pages[number, 1, :, j % page] = self.old_v[b][j]

    def positions(self, before: list[int]) -> Array:
        """Return each query's position, `before` keys and the sequence's offset ahead of it."""
        parts = [
            np.arange(n) + m + o for n, m, o in zip(self.lengths, before, self.offset, strict=True)
        ]
        return np.concatenate(parts).astype(np.int32)

    def outputs(self) -> list[Array]:
        """Return arrays for out and lse, full of a number that would show."""
        return [np.full_like(self.q, 7.0), np.full(self.q.shape[:2], 7.0, np.float32)]


def call(
    name: str, arrays: list[Array], *numbers: float, half: bool = False
) -> tuple[Array, Array]:
    """Run a kernel whose last two arrays are out and lse."""
    tensors = [tvm.runtime.tensor(x) for x in arrays]
    kernel(name, half)(*tensors, *numbers)
    return tensors[-2].numpy(), tensors[-1].numpy()


@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("sign", [1, -1])
@settings(max_examples=10, deadline=None)
@given(lengths=LENGTHS.filter(any))
def test_ragged(causal: int, sign: int, lengths: list[int]) -> None:
    batch = Batch(lengths, [0] * len(lengths))
    positions = batch.positions([0] * len(lengths))
    arrays = [batch.q, batch.indptr, batch.k, batch.v, batch.indptr, positions, batch.offset]
    out, lse = call("ragged", arrays + batch.outputs(), causal, 0, 1.0, 1e4, sign * SCALE)
    for begin, end in zip(batch.indptr[:-1], batch.indptr[1:], strict=True):
        i, j = np.arange(end - begin)[:, None], np.arange(end - begin)[None]
        seen = (j <= i) if causal else np.ones(np.broadcast_shapes(i.shape, j.shape), bool)
        if sign < 0:
            seen = seen & (j > i - SHAPE.window)
        rows = slice(begin, end)
        compare(out[rows], lse[rows], *reference(batch.q[rows], batch.k[rows], batch.v[rows], seen))


@HALF_OR_NOT
@pytest.mark.parametrize("sign", [1, -1])
@settings(max_examples=15, deadline=None)
@given(pairs=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 40)), min_size=1, max_size=4))
def test_paged(half: bool, sign: int, pairs: list[tuple[int, int]]) -> None:
    batch = Batch([n for n, _ in pairs], [m for _, m in pairs], half)
    arrays = [
        batch.q,
        batch.indptr,
        batch.stored,
        batch.page_indptr,
        batch.page_values,
        batch.last,
        batch.offset,
        batch.positions(batch.history),
    ]
    out, lse = call("paged", arrays + batch.outputs(), 0, 0, 1.0, 1e4, sign * SCALE, half=half)
    for b, (n, m) in enumerate(pairs):
        seen = np.ones((n, m), bool)
        if sign < 0:
            seen = np.arange(m)[None] > np.arange(n)[:, None] + m - SHAPE.window
        rows = slice(batch.indptr[b], batch.indptr[b + 1])
        compare(
            out[rows], lse[rows], *reference(batch.q[rows], batch.old_k[b], batch.old_v[b], seen)
        )


@HALF_OR_NOT
@pytest.mark.parametrize("sign", [1, -1])
@settings(max_examples=15, deadline=None)
@given(history=st.lists(st.integers(0, 600), min_size=1, max_size=4))
def test_decode(half: bool, sign: int, history: list[int]) -> None:
    batch = Batch([1] * len(history), history, half)
    arrays = [
        batch.q,
        batch.stored,
        batch.page_indptr,
        batch.page_values,
        batch.last,
        batch.offset,
        batch.positions([m - 1 for m in history]),
    ]
    out, lse = call("decode", arrays + batch.outputs(), 0, 1.0, 1e4, sign * SCALE, half=half)
    for b, m in enumerate(history):
        seen = np.arange(m)[None] >= (m - SHAPE.window if sign < 0 else 0)
        rows = slice(b, b + 1)
        compare(
            out[rows], lse[rows], *reference(batch.q[rows], batch.old_k[b], batch.old_v[b], seen)
        )


@pytest.mark.parametrize("tokens", [1, 30])
def test_merge(tokens: int) -> None:
    # The keys in two parts give what they give in one; a part without keys changes nothing.
    batch = Batch([tokens], [20])
    seen = np.ones((tokens, 20), bool)
    k, v = batch.old_k[0], batch.old_v[0]
    first, first_lse = reference(batch.q, k[:5], v[:5], seen[:, :5])
    second, second_lse = reference(batch.q, k[5:], v[5:], seen[:, 5:])
    second[0], second_lse[0] = 123.0, MASKED
    arrays = [x.astype(np.float32) for x in (first, first_lse, second, second_lse)]
    tensors = [tvm.runtime.tensor(x) for x in arrays]
    kernel("merge")(*tensors)
    want, want_lse = reference(batch.q, k, v, seen)
    want[0], want_lse[0] = first[0], first_lse[0]
    np.testing.assert_allclose(tensors[0].numpy(), want, atol=2e-6)
    np.testing.assert_allclose(tensors[1].numpy(), want_lse, atol=2e-6)


@HALF_OR_NOT
def test_copies_of_pages(half: bool) -> None:
    stored = np.nan_to_num(Batch([1], [40], half).stored)
    pages = half_view(stored) if half else stored
    tensor = tvm.runtime.tensor(stored)
    kernel("copy", half)(tensor, 1, 3, 5)
    pages[3, :, :, :5] = pages[1, :, :, :5]
    np.testing.assert_array_equal(tensor.numpy(), stored)
    # Moves are done in order: a token may move onto one that has moved.
    moves = np.array([[10, 11, 40], [9, 10, 2]], np.int32)
    kernel("compact", half)(
        tensor, *(tvm.runtime.tensor(x) for x in (np.array([0, 2, 3], np.int32), moves)), 2
    )
    for source, target in moves.T:
        pages[target // 8, :, :, target % 8] = pages[source // 8, :, :, source % 8]
    np.testing.assert_array_equal(tensor.numpy(), stored)


@pytest.mark.parametrize("lanes", [1, 4, 16])
def test_exp2_is_exact_to_two_parts_in_ten_million(lanes: int) -> None:
    @T.prim_func(s_tir=True)
    def function(x_h: T.handle, y_h: T.handle) -> None:
        n = T.int64()
        x = T.match_buffer(x_h, (n,), "float32")
        y = T.match_buffer(y_h, (n,), "float32")
        for i in T.serial(n // lanes):
            y[span(i * lanes, lanes)] = exp2(x[span(i * lanes, lanes)], lanes)

    module = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
    run = tvm.compile(module, Target(parse_target("cpu").tvm_dict()))["main"]
    values = np.concatenate([np.linspace(-130, 64, 99_999), [-1e30]]).astype(np.float32)
    out = tvm.runtime.tensor(np.zeros_like(values))
    run(tvm.runtime.tensor(values), out)
    want = np.exp2(np.maximum(values, -125).astype(np.float64))
    assert np.abs(out.numpy() / want - 1).max() < 2e-7


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": 7}, "7 query heads cannot share 2 key/value heads"),
        ({"head_dim": 20}, "head of 20 features is not supported"),
        ({"page_size": 12}, "cache page of 12 tokens is not supported"),
        ({"window": -1}, "a window of -1 tokens"),
        ({"lanes": 3}, "vectors of 3 floats"),
    ],
)
def test_a_wrong_shape_is_refused(fields: dict[str, int], message: str) -> None:
    numbers = {
        "num_heads": 6,
        "num_kv_heads": 2,
        "head_dim": 32,
        "page_size": 8,
        "window": 0,
        "lanes": 8,
        **fields,
    }
    with pytest.raises(CompileError, match=message):
        AttentionShape(**numbers)


def test_a_tile_that_would_leave_the_stack_is_refused() -> None:
    with pytest.raises(CompileError, match="would not be on the stack"):
        tile_buffers(1, 16, 16)
