"""Attention on a GPU and the kernels around it, under the emulation, against numpy."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from gqsa_compiler.schedules.cuda import attention_decode, attention_prefill, kv_cache
from gqsa_compiler.schedules.cuda.arch import ARCHES
from gqsa_compiler.schedules.generic.attention_common import MASKED, AttentionShape
from tests.schedules.cuda.emulation.run import Program, emulate

Array = npt.NDArray[Any]
SHAPE = AttentionShape(6, 2, 24, page_size=8, window=5, lanes=4)
SHAPES = {
    "gqa3-d24": SHAPE,
    "mqa5-d64": AttentionShape(5, 1, 64, page_size=16, window=40, lanes=4),
}
BOUND = 3e-3
"""Weights and values are halves of size 1; outputs are rounded to halves."""


@cache
def kernel(name: str, shape: AttentionShape) -> Program:
    """Compile one kernel for the emulation."""
    build = {
        "ragged": lambda: attention_prefill.attention_prefill(shape, paged=False),
        "paged": lambda: attention_prefill.attention_prefill(shape, paged=True),
        "decode": lambda: attention_decode.attention_decode(shape),
        "merge": lambda: kv_cache.merge_states(shape),
        "copy": lambda: kv_cache.copy_page(shape),
        "compact": lambda: kv_cache.compact_copy(shape),
        "split": lambda: kv_cache.split_qkv(shape),
        "append": lambda: kv_cache.append_kv(shape),
        "get": lambda: kv_cache.get_kv(shape, 2),
    }[name]
    return emulate(build(), ARCHES["sm_80"])


def reference(q: Array, k: Array, v: Array, seen: Array) -> tuple[Array, Array]:
    """Return attention of q [m, Hq, D] over k, v [n, Hkv, D] and the log2 of the sums [m, Hq]."""
    group = q.shape[1] // k.shape[1]
    q = q.astype(np.float64)
    k, v = (np.repeat(x.astype(np.float64), group, axis=1) for x in (k, v))
    scores = np.einsum("ihd,jhd->hij", q, k) * q.shape[-1] ** -0.5 * np.log2(np.e)
    weights = np.exp2(scores) * seen
    total = weights.sum(axis=-1)
    out = np.einsum("hij,jhd->ihd", weights, v)
    with np.errstate(divide="ignore", invalid="ignore"):
        return out / total.T[:, :, None], np.log2(total).T


def compare(out: Array, lse: Array, want: tuple[Array, Array]) -> None:
    """Check the rows that see a key; the others must have an lse that merging ignores."""
    blind = np.isinf(want[1])
    np.testing.assert_allclose(out[~blind], want[0][~blind], atol=BOUND)
    np.testing.assert_allclose(lse[~blind], want[1][~blind], atol=1e-4)
    assert np.all(lse[blind] <= MASKED / 2)
    assert np.all(np.isfinite(out))


class Batch:
    """Random sequences: q and new k, v, and the same number of pages of history."""

    def __init__(self, shape: AttentionShape, lengths: list[int], history: list[int]) -> None:
        rng = np.random.default_rng(0)
        heads, keys, dim, page = (
            shape.num_heads,
            shape.num_kv_heads,
            shape.head_dim,
            shape.page_size,
        )

        def normal(*size: int) -> Array:
            return rng.standard_normal(size).astype(np.float16)

        self.shape, self.lengths, self.history = shape, lengths, history
        self.indptr = np.cumsum([0, *lengths]).astype(np.int32)
        total = int(self.indptr[-1])
        self.q = normal(total, heads, dim)
        self.k, self.v = normal(total, keys, dim), normal(total, keys, dim)
        counts = [-(-n // page) for n in history]
        self.page_indptr = np.cumsum([0, *counts]).astype(np.int32)
        used = int(self.page_indptr[-1])
        # Slots that no key fills hold NaN: nothing may come of them.
        self.pages = np.full((used + 2, 2, keys, page, dim), np.nan, np.float16)
        self.page_values = rng.permutation(used + 2)[:used].astype(np.int32)
        self.last = np.array([(n - 1) % page + 1 if n else 0 for n in history], np.int32)
        self.offset = np.arange(len(lengths), dtype=np.int32) * 3
        self.old = [(normal(n, keys, dim), normal(n, keys, dim)) for n in history]
        for b, n in enumerate(history):
            for j in range(n):
                number = self.page_values[self.page_indptr[b] + j // page]
                for kind in range(2):
                    self.pages[number, kind, :, j % page] = self.old[b][kind][j]

    def positions(self, before: list[int]) -> Array:
        """Return each query's position, `before` keys and the sequence's offset ahead of it."""
        parts = [
            np.arange(n) + m + o for n, m, o in zip(self.lengths, before, self.offset, strict=True)
        ]
        return np.concatenate(parts).astype(np.int32)

    def run(self, name: str, arrays: list[Array], *numbers: float, order: int = 1) -> Any:
        """Run a kernel whose last two arrays are out and lse; return these."""
        out = np.full_like(self.q, 7.0)
        lse = np.full(self.q.shape[:2], 7.0, np.float32)
        every = kernel(name, self.shape).run([*arrays, out, lse, *numbers], order)
        return every[len(arrays)], every[len(arrays) + 1]


@pytest.mark.parametrize("slides", [False, True], ids=["all", "window"])
@pytest.mark.parametrize("name", SHAPES)
def test_new_keys(name: str, slides: bool) -> None:
    shape = SHAPES[name]
    batch = Batch(shape, [1, 0, 70], [0, 0, 0])
    scale = shape.head_dim**-0.5 * (-1 if slides else 1)
    arrays = [batch.q, batch.indptr, batch.k, batch.v, batch.indptr]
    arrays += [batch.positions([0, 0, 0]), batch.offset]
    for causal in (0, 1):
        out, lse = batch.run("ragged", arrays, causal, 0, 1.0, 1e4, scale)
        for begin, end in zip(batch.indptr[:-1], batch.indptr[1:], strict=True):
            i, j = np.arange(end - begin)[:, None], np.arange(end - begin)[None]
            seen = (j <= i) if causal else np.ones((end - begin,) * 2, bool)
            if slides:
                seen = seen & (j > i - shape.window)
            rows = slice(begin, end)
            want = reference(batch.q[rows], batch.k[rows], batch.v[rows], seen)
            compare(out[rows], lse[rows], want)


@pytest.mark.parametrize("slides", [False, True], ids=["all", "window"])
@pytest.mark.parametrize("name", SHAPES)
def test_keys_in_pages(name: str, slides: bool) -> None:
    shape = SHAPES[name]
    lengths, history = [3, 24, 2], [0, 45, 8]
    batch = Batch(shape, lengths, history)
    scale = shape.head_dim**-0.5 * (-1 if slides else 1)
    arrays = [batch.q, batch.indptr, batch.pages, batch.page_indptr, batch.page_values]
    arrays += [batch.last, batch.offset, batch.positions(history)]
    out, lse = batch.run("paged", arrays, 0, 0, 1.0, 1e4, scale)
    for b, (n, m) in enumerate(zip(lengths, history, strict=True)):
        seen = np.ones((n, m), bool)
        if slides:
            seen = np.arange(m)[None] > np.arange(n)[:, None] + m - shape.window
        rows = slice(batch.indptr[b], batch.indptr[b + 1])
        compare(out[rows], lse[rows], reference(batch.q[rows], *batch.old[b], seen))


@pytest.mark.parametrize("slides", [False, True], ids=["all", "window"])
@pytest.mark.parametrize("name", SHAPES)
def test_one_query_a_sequence(name: str, slides: bool) -> None:
    shape = SHAPES[name]
    history = [1, 0, 330, 8]
    batch = Batch(shape, [1] * 4, history)
    scale = shape.head_dim**-0.5 * (-1 if slides else 1)
    arrays = [batch.q, batch.pages, batch.page_indptr, batch.page_values, batch.last]
    arrays += [batch.offset, batch.positions([m - 1 for m in history])]
    out, lse = batch.run("decode", arrays, 0, 1.0, 1e4, scale)
    for b, m in enumerate(history):
        seen = np.arange(m)[None] >= (m - shape.window if slides else 0)
        rows = slice(b, b + 1)
        compare(out[rows], lse[rows], reference(batch.q[rows], *batch.old[b], seen))


def test_large_scores_do_not_overflow() -> None:
    shape = replace(SHAPE, window=0)
    batch = Batch(shape, [3], [40])
    batch.q *= np.float16(100)
    arrays = [batch.q, batch.indptr, batch.pages, batch.page_indptr, batch.page_values]
    arrays += [batch.last, batch.offset, batch.positions([40])]
    out, _ = batch.run("paged", arrays, 0, 0, 1.0, 1e4, shape.head_dim**-0.5)
    want, _ = reference(batch.q, *batch.old[0], np.ones((3, 40), bool))
    np.testing.assert_allclose(out, want, atol=2e-2)


def test_merge() -> None:
    # The keys in two parts give what they give in one; a part without keys changes nothing.
    batch = Batch(SHAPE, [7], [20])
    seen, (k, v) = np.ones((7, 20), bool), batch.old[0]
    first, first_lse = reference(batch.q, k[:5], v[:5], seen[:, :5])
    second, second_lse = reference(batch.q, k[5:], v[5:], seen[:, 5:])
    second[0], second_lse[0] = 123.0, MASKED
    arrays = [first.astype(np.float16), first_lse.astype(np.float32)]
    arrays += [second.astype(np.float16), second_lse.astype(np.float32)]
    out, lse, _, _ = kernel("merge", SHAPE).run(arrays)
    want, want_lse = reference(batch.q, k, v, seen)
    want[0], want_lse[0] = first[0], first_lse[0]
    np.testing.assert_allclose(out, want, atol=BOUND)
    np.testing.assert_allclose(lse, want_lse, atol=1e-5)


def test_what_goes_into_the_pages_comes_out() -> None:
    rng = np.random.default_rng(3)
    heads, keys, dim, page = 6, 2, 24, SHAPE.page_size
    qkv = rng.standard_normal((5, heads + 2 * keys, dim)).astype(np.float16)
    empty = [np.zeros((5, n, dim), np.float16) for n in (heads, keys, keys)]
    positions = np.zeros(5, np.int32)
    _, _, q, k, v, _ = kernel("split", SHAPE).run([qkv, positions, *empty, 0])
    np.testing.assert_array_equal(np.concatenate([q, k, v], axis=1), qkv)
    pages = np.full((4, 2, keys, page, dim), -1, np.float16)
    places = np.array([3, 31, -1, 8, 0], np.int32)
    pages = kernel("append", SHAPE).run([pages, k, v, places])[0]
    kept = places >= 0
    for kind, new in enumerate((k, v)):
        stored = pages[places[kept] // page, kind, :, places[kept] % page]
        np.testing.assert_array_equal(stored, new[kept])
    assert np.count_nonzero(pages != -1) == 4 * 2 * keys * dim
    out = np.zeros((2, 4, keys, dim), np.float16)
    _, _, got_k, got_v, _ = kernel("get", SHAPE).run([pages, places[kept], out, out, 1])
    np.testing.assert_array_equal(got_k, np.stack([0 * k[kept], k[kept]]))
    np.testing.assert_array_equal(got_v[1], v[kept])


def test_copies_of_pages() -> None:
    rng = np.random.default_rng(4)
    pages = rng.standard_normal((6, 2, 2, SHAPE.page_size, 24)).astype(np.float16)
    copied = kernel("copy", SHAPE).run([pages, 1, 3, 5])[0]
    pages[3, :, :, :5] = pages[1, :, :, :5]
    np.testing.assert_array_equal(copied, pages)
    # Moves are done in order: a token may move onto one that has moved.
    moves = np.array([[10, 11, 40], [9, 10, 2]], np.int32)
    moved = kernel("compact", SHAPE).run([pages, np.array([0, 2, 3], np.int32), moves, 2])[0]
    for source, target in moves.T:
        pages[target // 8, :, :, target % 8] = pages[source // 8, :, :, source % 8]
    np.testing.assert_array_equal(moved, pages)
