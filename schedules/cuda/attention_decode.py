"""Decode attention on a GPU: one query a sequence against the paged cache.

Reading K and V is what it costs, so a block takes one key/value head, a few of the query heads that
share it, and a share of one sequence's pages ("flash decoding"); a second launch merges the
shares. A key is read by a few neighbouring lanes, 8 features each, so that a warp has several keys
at once; each such part of a warp goes through its own keys with its own running softmax.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gqsa_compiler._tvm import B, T
from gqsa_compiler.schedules.cuda.arch import WARP
from gqsa_compiler.schedules.cuda.attention_common import PagedKeys, first_unseen, magnitude
from gqsa_compiler.schedules.cuda.device import (
    SharedMemory,
    barrier,
    register,
    registers,
    shuffle_xor,
)
from gqsa_compiler.schedules.cuda.kv_cache import HALVES, pages_argument
from gqsa_compiler.schedules.cuda.launch import Thread, i32, one_block_each
from gqsa_compiler.schedules.generic.attention_common import (
    MASKED,
    AttentionShape,
    largest_divisor,
    rope_arguments,
    table_argument,
)
from gqsa_compiler.schedules.generic.emit import (
    Buffer,
    Expr,
    argument,
    const,
    extent,
    int64,
    load,
    scheduled,
    store,
)

_SHARE = 256
"""Keys that are worth a block of their own."""
_MOST_SHARES = 64
_WARPS = 4
_HEADS = 8
"""Query heads of a block, at most."""


@dataclass(frozen=True)
class _Plan:
    """How a block divides its work.

    Parameters
    ----------
    shape : AttentionShape
    lanes : int
        Lanes that read one key: a power of two, of which some idle where a head's chunks are not.
    heads : int
        Query heads of a block.
    """

    shape: AttentionShape
    lanes: int
    heads: int

    @classmethod
    def of(cls, shape: AttentionShape) -> _Plan:
        lanes = 1
        while lanes * HALVES < shape.head_dim:
            lanes *= 2
        return cls(shape, lanes, largest_divisor(shape.group, _HEADS))

    @property
    def at_once(self) -> int:
        """Keys that a block works on at once: the parts of its warps."""
        return _WARPS * WARP // self.lanes

    @property
    def head_tiles(self) -> int:
        """Blocks that share a key/value head's keys."""
        return self.shape.num_heads // self.heads

    def shared_parts(self) -> dict[str, int]:
        """List what a block keeps in shared memory, in 4-byte words."""
        parts = self.at_once * self.heads
        return {"out": parts * self.shape.head_dim, "top": parts, "total": parts}


def attention_decode(shape: AttentionShape) -> Any:
    """Build the kernel that TVM's paged cache calls for one query a sequence.

    Arguments are those of `schedules.generic.attention_decode.attention_decode`, but pages, queries
    and the output are float16. Scores, weights and sums are float32.
    """
    heads, dim, page = shape.num_heads, shape.head_dim, shape.page_size
    batch, used_pages = extent("batch", "int32"), extent("used_pages", "int32")
    plan = _Plan.of(shape)
    with scheduled() as builder:
        q = argument("q", (batch, heads, dim), "float16")
        pages = pages_argument(shape)
        page_indptr = table_argument("page_indptr", batch + 1)
        page_values = table_argument("page_values", used_pages)
        length = table_argument("length", batch)
        offset = table_argument("offset", batch)
        position = table_argument("position", batch)
        output = argument("output", (batch, heads, dim), "float16")
        lse = argument("lse", (batch, heads))
        sm_scale = rope_arguments()
        wanted = B.floordiv(used_pages * i32(page) + i32(_SHARE - 1), i32(_SHARE))
        shares = B.max(B.min(wanted, i32(_MOST_SHARES)), i32(1))
        found = _Found(
            B.alloc_buffer((batch, shares, heads, dim), "float32"),
            B.alloc_buffer((batch, shares, heads), "float32"),
            B.alloc_buffer((batch, shares, heads), "float32"),
        )
        with (
            B.thread_binding(0, shares, thread="blockIdx.x") as share,
            B.thread_binding(0, plan.head_tiles, thread="blockIdx.y") as tile,
            B.thread_binding(0, batch, thread="blockIdx.z") as b,
            B.thread_binding(0, _WARPS * WARP, thread="threadIdx.x") as thread,
        ):
            share, tile, b = (B.bind(B.Cast("int32", x)) for x in (share, tile, b))
            begin = B.bind(load(page_indptr, b))
            count = B.bind(load(page_indptr, b + i32(1)) - begin)
            filled = (count - i32(1)) * i32(page) + load(length, b)
            keys = B.bind(B.Select(count > i32(0), filled, i32(0)))
            place = B.bind(load(position, b) - load(offset, b))
            low = B.bind(first_unseen(shape, sm_scale, place) + i32(1))
            each = B.bind(B.floordiv(B.max(keys - low, i32(0)) + shares - i32(1), shares))
            first = B.bind(low + share * each)
            head0 = B.bind(tile * i32(plan.heads))
            kv_head = B.bind(B.floordiv(head0, i32(shape.group)))
            source = PagedKeys(shape, pages, page_values, begin, kv_head)
            block = _Block(plan, source, Thread.of(thread))
            block.walk(q, b, head0, magnitude(sm_scale), first, B.min(first + each, keys))
            block.leave(found, b, share, head0)
        _merge(shape, found, shares, batch, output, lse)
    return builder.get()


@dataclass(frozen=True)
class _Found:
    """What the shares found: sums of weighted values, maxima, sums of weights."""

    out: Buffer
    top: Buffer
    total: Buffer


class _Block:
    """A block's share of a sequence's keys; methods emit code for one thread."""

    def __init__(self, plan: _Plan, source: PagedKeys, thread: Thread) -> None:
        self.plan, self.source, self.thread = plan, source, thread
        self.lane = B.bind(B.floormod(thread.number, i32(plan.lanes)))
        self.part = B.bind(B.floordiv(thread.number, i32(plan.lanes)))
        self.feature = B.bind(self.lane * i32(HALVES))
        self.active = B.bind(self.feature < i32(plan.shape.head_dim))
        self.shared = SharedMemory.allocate(plan.shared_parts())
        self.query = registers(plan.heads * HALVES)
        self.out = registers(plan.heads * HALVES)
        self.top, self.total = registers(plan.heads), registers(plan.heads)

    def _halves(self, value: Expr) -> Buffer:
        """Emit the conversion of 8 halves, which idle lanes do not have, to floats."""
        halves, floats = registers(HALVES, "float16"), registers(HALVES)
        for i in range(HALVES):
            store(halves, const(0.0, "float16"), i)
        with B.If(self.active), B.Then():
            store(halves, value, i32(0), lanes=HALVES)
        for i in range(HALVES):
            store(floats, B.Cast("float32", load(halves, i)), i)
        return floats

    def walk(self, q: Buffer, b: Expr, head0: Expr, scale: Expr, first: Expr, end: Expr) -> None:
        """Emit the pass over the keys ``first .. end``."""
        plan = self.plan
        for g in range(plan.heads):
            values = self._halves(load(q, b, head0 + i32(g), self.feature, lanes=HALVES))
            for i in range(HALVES):
                store(self.query, load(values, i) * scale, g * HALVES + i)
                store(self.out, const(0.0, "float32"), g * HALVES + i)
            store(self.top, const(MASKED, "float32"), g)
            store(self.total, const(0.0, "float32"), g)
        many = B.floordiv(B.max(end - first, i32(0)) + i32(plan.at_once - 1), i32(plan.at_once))
        with B.serial(many) as i:
            key = B.bind(first + i * i32(plan.at_once) + self.part)
            # All lanes take part in the sums over lanes; a key that is not there weighs nothing.
            there = B.bind(key < end)
            self._add(B.bind(B.Select(there, key, first)), there)

    def _add(self, key: Expr, there: Expr) -> None:
        plan = self.plan
        keys = self._halves(self.source.load(0, key, self.feature, HALVES))
        values = self._halves(self.source.load(1, key, self.feature, HALVES))
        for g in range(plan.heads):
            score = register(const(0.0, "float32"), "float32")
            for i in range(HALVES):
                product = load(self.query, g * HALVES + i) * load(keys, i)
                store(score, load(score, 0) + product, 0)
            step = plan.lanes // 2
            while step:
                mine = B.bind(load(score, 0))
                store(score, mine + shuffle_xor(mine, step), 0)
                step //= 2
            seen = B.bind(B.Select(there, load(score, 0), const(MASKED, "float32")))
            old = B.bind(load(self.top, g))
            top = B.bind(B.max(old, seen))
            factor = B.bind(T.exp2(old - top))
            weight = B.bind(B.Select(there, T.exp2(seen - top), const(0.0, "float32")))
            store(self.top, top, g)
            store(self.total, load(self.total, g) * factor + weight, g)
            for i in range(HALVES):
                at = g * HALVES + i
                store(self.out, load(self.out, at) * factor + weight * load(values, i), at)

    def leave(self, found: _Found, b: Expr, share: Expr, head0: Expr) -> None:
        """Emit the merge of the parts of the block's warps."""
        plan, dim = self.plan, self.plan.shape.head_dim
        out, top, total = (self.shared.part(name) for name in ("out", "top", "total"))
        for g in range(plan.heads):
            place = B.bind(self.part * i32(plan.heads) + i32(g))
            with B.If(self.active), B.Then():
                at = B.bind(place * i32(dim) + self.feature)
                for i in range(HALVES):
                    store(out, load(self.out, g * HALVES + i), at + i32(i))
            with B.If(self.lane == i32(0)), B.Then():
                store(top, load(self.top, g), place)
                store(total, load(self.total, g), place)
        barrier()
        threads = _WARPS * WARP
        count = plan.heads * dim
        with B.serial(-(-count // threads)) as i:
            number = B.bind(i * i32(threads) + self.thread.number)
            with B.If(number < i32(count)), B.Then():
                g = B.bind(B.floordiv(number, i32(dim)))
                feature = B.bind(B.floormod(number, i32(dim)))
                head = B.bind(head0 + g)
                best = register(const(MASKED, "float32"), "float32")
                with B.serial(plan.at_once) as part:
                    place = part * i32(plan.heads) + g
                    store(best, B.max(load(best, 0), load(top, place)), 0)
                sums = registers(2)
                store(sums, const(0.0, "float32"), 0)
                store(sums, const(0.0, "float32"), 1)
                with B.serial(plan.at_once) as part:
                    place = B.bind(part * i32(plan.heads) + g)
                    factor = B.bind(T.exp2(load(top, place) - load(best, 0)))
                    value = load(out, place * i32(dim) + feature)
                    store(sums, load(sums, 0) + value * factor, 0)
                    store(sums, load(sums, 1) + load(total, place) * factor, 1)
                store(found.out, load(sums, 0), b, share, head, feature)
                with B.If(feature == i32(0)), B.Then():
                    store(found.top, load(best, 0), b, share, head)
                    store(found.total, load(sums, 1), b, share, head)


def _merge(
    shape: AttentionShape, found: _Found, shares: Expr, batch: Expr, output: Buffer, lse: Buffer
) -> None:
    """Emit the launch that merges the shares: a warp a head."""
    heads, dim = shape.num_heads, shape.head_dim
    with one_block_each(batch * i32(heads), WARP) as (number, thread):
        b = B.bind(B.Cast("int32", B.floordiv(number, int64(heads))))
        head = B.bind(B.Cast("int32", B.floormod(number, int64(heads))))
        best = register(const(MASKED, "float32"), "float32")
        with B.serial(shares) as share:
            store(best, B.max(load(best, 0), load(found.top, b, share, head)), 0)
        total = register(const(0.0, "float32"), "float32")
        with B.serial(shares) as share:
            factor = T.exp2(load(found.top, b, share, head) - load(best, 0))
            store(total, load(total, 0) + load(found.total, b, share, head) * factor, 0)
        sees = B.bind(load(total, 0) > const(0.0, "float32"))
        safe = B.bind(B.Select(sees, load(total, 0), const(1.0, "float32")))
        with B.serial(-(-dim // WARP)) as i:
            feature = B.bind(i * i32(WARP) + thread.lane)
            with B.If(feature < i32(dim)), B.Then():
                value = register(const(0.0, "float32"), "float32")
                with B.serial(shares) as share:
                    factor = T.exp2(load(found.top, b, share, head) - load(best, 0))
                    part = load(found.out, b, share, head, feature)
                    store(value, load(value, 0) + part * factor, 0)
                store(output, B.Cast("float16", load(value, 0) / safe), b, head, feature)
        with B.If(thread.lane == i32(0)), B.Then():
            known = load(best, 0) + T.log2(safe)
            store(lse, B.Select(sees, known, const(MASKED, "float32")), b, head)
