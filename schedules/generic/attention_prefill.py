"""Prefill attention: many queries of a sequence, against new keys (ragged) or the paged cache.

Flash attention: a task takes `AttentionShape.rows` query rows (a row is one token and one of the
query heads that share a key/value head), transposes their queries once, and walks over the keys
in blocks with a running softmax.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gqsa_compiler._tvm import B
from gqsa_compiler.schedules.generic.attention_common import (
    MASKED,
    AttentionShape,
    rope_arguments,
    table_argument,
)
from gqsa_compiler.schedules.generic.attention_prefill_tiles import (
    FEATURES,
    Reader,
    State,
    Tiles,
    paged_reader,
    ragged_reader,
)
from gqsa_compiler.schedules.generic.emit import (
    Buffer,
    Expr,
    argument,
    const,
    extent,
    load,
    local,
    scalar,
    scheduled,
    store,
)
from gqsa_compiler.schedules.generic.kv_pages import Pages, pages_argument
from gqsa_compiler.schedules.generic.math import LOG2_E

_RAGGED_BLOCK = 32  # keys of a block where no page sets it
_INT_MAX = 2**31 - 1


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
    batch, tokens, new = (extent(name, "int32") for name in ("batch", "n", "new_keys"))
    with scheduled() as builder:
        q = argument("q", (tokens, shape.num_heads, shape.head_dim))
        q_indptr = table_argument("q_indptr", batch + 1)
        k = argument("k", (new, shape.num_kv_heads, shape.head_dim))
        v = argument("v", (new, shape.num_kv_heads, shape.head_dim))
        kv_indptr = table_argument("kv_indptr", batch + 1)
        position = table_argument("position", tokens)
        offset = table_argument("offset", batch)
        work = _Work.of(shape, _RAGGED_BLOCK, batch, q, q_indptr, position, offset)
        total = work.count_tiles()
        with B.parallel(total * shape.num_kv_heads) as task:
            # First, last, second, ...: every thread's share has early (short) and late rows.
            zigzag = B.bind(B.floormod(task, total))
            half = B.floordiv(zigzag, 2)
            tile = B.if_then_else(B.floormod(zigzag, 2) < 1, half, total - 1 - half)
            b, row0 = work.find_tile(B.bind(tile))
            kv_begin = B.bind(load(kv_indptr, b))
            kv_len = B.bind(load(kv_indptr, b + 1) - kv_begin)
            h = B.bind(B.floordiv(task, total))
            work.attend(b, row0, h, kv_len, ragged_reader(k, v, kv_begin, h))
    return builder.get()


def _paged(shape: AttentionShape) -> Any:
    page = shape.page_size
    batch, tokens, used = (extent(name, "int32") for name in ("batch", "n", "used_pages"))
    with scheduled() as builder:
        q = argument("q", (tokens, shape.num_heads, shape.head_dim))
        q_indptr = table_argument("q_indptr", batch + 1)
        stored = pages_argument(shape)
        page_indptr = table_argument("page_indptr", batch + 1)
        page_values = table_argument("page_values", used)
        length = table_argument("length", batch)
        offset = table_argument("offset", batch)
        position = table_argument("position", tokens)
        work = _Work.of(shape, page, batch, q, q_indptr, position, offset)
        pages = Pages.of(shape, stored)
        total = work.count_tiles()
        with B.parallel(total * shape.num_kv_heads) as task:
            b, row0 = work.find_tile(B.bind(B.floormod(task, total)))
            begin = B.bind(load(page_indptr, b))
            count = B.bind(load(page_indptr, b + 1) - begin)
            filled = (count - 1) * page + load(length, b)
            kv_len = B.bind(B.if_then_else(count > 0, filled, 0))
            h = B.bind(B.floordiv(task, total))
            work.attend(b, row0, h, kv_len, paged_reader(pages, page_values, begin, h))
    return builder.get()


@dataclass(frozen=True)
class _Work:
    """The arguments that both kernels have, and the code on them; methods emit statements."""

    shape: AttentionShape
    block: int
    batch: Expr
    q: Buffer
    q_indptr: Buffer
    position: Buffer
    offset: Buffer
    output: Buffer
    lse: Buffer
    causal: Expr
    sm_scale: Expr

    @classmethod
    def of(
        cls,
        shape: AttentionShape,
        block: int,
        batch: Expr,
        q: Buffer,
        q_indptr: Buffer,
        position: Buffer,
        offset: Buffer,
    ) -> _Work:
        """Declare the arguments that are last in both kernels."""
        tokens = q.shape[0]
        output = argument("output", (tokens, shape.num_heads, shape.head_dim))
        lse = argument("lse", (tokens, shape.num_heads))
        causal = scalar("causal", "int32")
        sm_scale = rope_arguments()
        return cls(
            shape, block, batch, q, q_indptr, position, offset, output, lse, causal, sm_scale
        )

    def _rows_of(self, b: Expr) -> Expr:
        tokens = load(self.q_indptr, b + 1) - load(self.q_indptr, b)
        return tokens * self.shape.group

    def _tiles_of(self, b: Expr) -> Expr:
        rows = self.shape.rows
        return B.floordiv(self._rows_of(b) + (rows - 1), rows)

    def count_tiles(self) -> Expr:
        """Count the tiles of rows of all sequences."""
        count = local(1, "int32")
        store(count, const(0, "int32"), 0)
        with B.serial(self.batch) as b:
            store(count, load(count, 0) + self._tiles_of(b), 0)
        return B.bind(load(count, 0))

    def find_tile(self, number: Expr) -> tuple[Expr, Expr]:
        """Return the sequence that tile `number` is of, and the tile's first row in it."""
        sequence, row, before = (local(1, "int32") for _ in range(3))
        store(before, const(0, "int32"), 0)
        with B.serial(self.batch) as b:
            own = B.bind(self._tiles_of(b))
            start = B.bind(load(before, 0))
            with B.If(B.And(number >= start, number < start + own)), B.Then():
                store(sequence, b, 0)
                store(row, (number - start) * self.shape.rows, 0)
            store(before, start + own, 0)
        return B.bind(load(sequence, 0)), B.bind(load(row, 0))

    def attend(self, b: Expr, row0: Expr, h: Expr, kv_len: Expr, read: Reader) -> None:
        """Attention of the rows from `row0` of sequence `b`, in key/value head `h`."""
        block = self.block
        state = State(self.shape, block)
        begin = B.bind(load(self.q_indptr, b))
        last = B.bind(self._rows_of(b) - 1)
        self._load_rows(state, begin, B.bind(load(self.offset, b)), row0, last, h, kv_len)
        start = B.bind(B.floordiv(B.max(load(state.bounds, 0) + 1, 0), block))
        stop = B.bind(B.max(B.floordiv(load(state.bounds, 3) + block, block), start))
        with B.serial(stop - start) as step:
            first = B.bind((start + step) * block)
            self._key_block(state, first, B.bind(B.min(block, kv_len - first)), read)
        self._store_rows(state, begin, row0, last, h)

    def _token_and_head(self, begin: Expr, row: Expr, h: Expr) -> tuple[Expr, Expr]:
        group = self.shape.group
        token = B.bind(begin + B.floordiv(row, group))
        return token, B.bind(h * group + B.floormod(row, group))

    def _load_rows(
        self, state: State, begin: Expr, base: Expr, row0: Expr, last: Expr, h: Expr, kv_len: Expr
    ) -> None:
        scale = B.bind(B.max(self.sm_scale, -self.sm_scale) * const(LOG2_E, "float32"))
        for i, bound in enumerate((_INT_MAX, -_INT_MAX, _INT_MAX, -_INT_MAX)):
            store(state.bounds, const(bound, "int32"), i)
        with B.serial(self.shape.rows) as r:
            # Rows past the end repeat the last one; they are not stored.
            token, head = self._token_and_head(begin, B.bind(B.min(row0 + r, last)), h)
            with B.serial(self.shape.head_dim) as d:
                store(state.queries, load(self.q, token, head, d) * scale, d, r)
            at = B.bind(load(self.position, token) - base)
            high = B.bind(B.min(kv_len - 1, B.if_then_else(self.causal > 0, at, kv_len)))
            low = const(-1, "int32")
            if self.shape.window:
                slides = self.sm_scale < const(0.0, "float32")
                low = B.bind(B.if_then_else(slides, at - self.shape.window, low))
            store(state.low, low, r)
            store(state.high, high, r)
            for i, (pick, value) in enumerate(
                ((B.min, low), (B.max, low), (B.min, high), (B.max, high))
            ):
                store(state.bounds, pick(load(state.bounds, i), value), i)
        state.clear()

    def _key_block(self, state: State, first: Expr, count: Expr, read: Reader) -> None:
        tiles = Tiles(self.shape)
        keys, values = read(first, count)
        key = keys()
        key_tile = self.shape.key_tile
        # Whole tiles of scores, then one key at a time.
        whole = B.bind(B.floordiv(count, key_tile))
        with B.serial(whole) as t:
            tiles.scores(state, t * key_tile, key_tile, key)
        with B.serial(B.floormod(count, key_tile)) as t:
            tiles.scores(state, whole * key_tile + t, 1, key)
        unseen = B.Or(first + count - 1 > load(state.bounds, 2), first <= load(state.bounds, 1))
        with B.If(unseen), B.Then(), B.serial(count) as j:
            tiles.mask(state, j, first + j)
        tiles.new_maximum(state, count)
        tiles.weights(state, count)
        value = values()
        with B.serial(self.shape.head_dim // FEATURES) as t:
            tiles.outputs(state, t * FEATURES, count, value)

    def _store_rows(self, state: State, begin: Expr, row0: Expr, last: Expr, h: Expr) -> None:
        zero = const(0.0, "float32")
        with B.serial(B.min(self.shape.rows, last + 1 - row0)) as r:
            token, head = self._token_and_head(begin, row0 + r, h)
            total = B.bind(load(state.total, r))
            inverse = B.if_then_else(total > zero, const(1.0, "float32") / total, zero)
            inverse = B.bind(inverse)
            with B.serial(self.shape.head_dim) as d:
                store(self.output, load(state.out, d, r) * inverse, token, head, d)
            lse = load(state.top, r) + B.log2(total)
            masked = const(MASKED, "float32")
            store(self.lse, B.if_then_else(total > zero, lse, masked), token, head)
