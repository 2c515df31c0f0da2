"""Choosing the next token on a GPU, a block a sequence: only the token's number leaves it.

Nothing is sorted. A token's weight is ``2^-d``, d its distance below the best one in powers of two,
and tokens that are kept are those up to some distance. Distances are whole numbers here, of `_STEP`
each, and the one that a count (top-k) or a share of the weight (top-p) is reached at is found four
bits at a time, each time by sums over all tokens. Tokens of the same distance are kept or dropped
together. All sums have a fixed order: the same logits and numbers give the same token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from gqsa_compiler._tvm import B, T
from gqsa_compiler.schedules.cuda.arch import WARP
from gqsa_compiler.schedules.cuda.device import (
    SharedMemory,
    barrier,
    register,
    registers,
    shuffle_xor,
    warp_sum,
)
from gqsa_compiler.schedules.cuda.launch import Thread, block_sum, i32, one_block_each
from gqsa_compiler.schedules.generic.emit import (
    Buffer,
    Expr,
    argument,
    const,
    extent,
    load,
    scheduled,
    store,
)
from gqsa_compiler.schedules.generic.math import LOG2_E

FIELDS = 5
"""Numbers that say how a token is chosen: 1 / temperature (0: the likeliest), top-k (0: all),
top-p, min-p, and a number from [0, 1) that is drawn for it."""
_THREADS = 512
_WARPS = _THREADS // WARP
_DIGIT = 4
_DIGITS = 1 << _DIGIT
_BITS = 24
_FAR = 128.0
"""Powers of two below the best: a token that is so far off is none."""
_STEP = _FAR / (1 << _BITS)
_LARGEST = 3.4028234663852886e38
"""The largest finite float32: a best logit of it, or of as much below 0, is no finite number."""

Weight = Callable[[Expr], Expr]
"""Emits a token's weight, given its logit."""


def choose_tokens(vocab: int) -> Any:
    """Build the PrimFunc that chooses a token for each row of logits.

    Arguments: ``logits`` float32 [m, vocab], ``draws`` float32 [m, FIELDS], and the result ``out``
    int32 [m]: -1 where the logits are no finite numbers.
    """
    rows = extent("m")
    with scheduled() as builder:
        logits = argument("logits", (rows, vocab))
        draws = argument("draws", (rows, FIELDS))
        out = argument("out", (rows,), "int32")
        with one_block_each(rows, _THREADS) as (number, thread):
            parts = {"values": _WARPS, "places": _WARPS, "lanes": _THREADS}
            shared = SharedMemory.allocate({**parts, "sums": _DIGITS * _WARPS})
            row = _Row(logits, number, thread, vocab, shared)
            sharpness, *how = (B.bind(load(draws, number, i)) for i in range(FIELDS))
            best, place = row.best()
            finite = B.bind(B.And(best < _float(_LARGEST), best > _float(-_LARGEST)))
            with B.If(B.And(finite, sharpness > _float(0.0))):
                with B.Then():
                    barrier()  # all have read the shared results of `best`
                    token = _Draw(row, best, sharpness).emit(*how)
                    with B.If(token >= i32(0)), B.Then():
                        store(out, token, number)
                with B.Else(), B.If(thread.number == i32(0)), B.Then():
                    store(out, B.Select(finite, place, i32(-1)), number)
    return builder.get()


@dataclass(frozen=True)
class _Row:
    """A block's row; methods emit code for one thread."""

    logits: Buffer
    row: Expr
    thread: Thread
    vocab: int
    shared: SharedMemory

    @contextmanager
    def each(self) -> Iterator[tuple[Expr, Expr]]:
        """Emit a loop over the thread's tokens: their numbers and logits."""
        with B.serial(-(-self.vocab // _THREADS)) as i:
            at = B.bind(i * i32(_THREADS) + self.thread.number)
            with B.If(at < i32(self.vocab)), B.Then():
                yield at, B.bind(load(self.logits, self.row, at))

    def best(self) -> tuple[Expr, Expr]:
        """Emit the search of the largest logit, the first of equal ones; NaN counts as large."""
        value, place = register(_float(-_LARGEST), "float32"), register(i32(0), "int32")

        def take(other: Expr, where: Expr) -> None:
            first = B.And(other == load(value, 0), where < load(place, 0))
            with B.If(B.Or(other > load(value, 0), first)), B.Then():
                store(value, other, 0)
                store(place, where, 0)

        with self.each() as (at, logit):
            take(B.bind(B.Select(T.isnan(logit), _float(_LARGEST), logit)), at)
        step = WARP // 2
        while step:
            mine, where = B.bind(load(value, 0)), B.bind(load(place, 0))
            take(B.bind(shuffle_xor(mine, step)), B.bind(shuffle_xor(where, step)))
            step //= 2
        values, places = self.shared.part("values"), self.shared.part("places", "int32")
        with B.If(self.thread.lane == i32(0)), B.Then():
            store(values, load(value, 0), self.thread.warp)
            store(places, load(place, 0), self.thread.warp)
        barrier()
        with B.serial(_WARPS) as warp:
            take(B.bind(load(values, warp)), B.bind(load(places, warp)))
        return B.bind(load(value, 0)), B.bind(load(place, 0))


@dataclass(frozen=True)
class _Draw:
    """A draw from a row whose largest logit is `best`."""

    row: _Row
    best: Expr
    sharpness: Expr

    def emit(self, top_k: Expr, top_p: Expr, min_p: Expr, drawn: Expr) -> Expr:
        """Emit everything; returns the token, known to the one thread that has it, else -1."""
        limit = register(i32((1 << _BITS) - 1), "int32")
        with B.If(B.And(top_k > _float(0.0), top_k < _float(self.row.vocab))), B.Then():
            store(limit, self._reached(top_k, lambda _: _float(1.0)), 0)
        with B.If(top_p < _float(1.0)), B.Then():
            most = B.bind(load(limit, 0))

            def left(logit: Expr) -> Expr:
                inside = self._key(logit) <= most
                return B.bind(B.Select(inside, self._weight(logit), _float(0.0)))

            share = B.bind(self._total(left) * top_p)
            store(limit, B.min(most, self._reached(share, left)), 0)
        most = B.bind(load(limit, 0))

        def kept(logit: Expr) -> Expr:
            weight = self._weight(logit)
            inside = B.And(self._key(logit) <= most, weight >= min_p)
            return B.bind(B.Select(inside, weight, _float(0.0)))

        return self._pick(kept, drawn)

    def _distance(self, logit: Expr) -> Expr:
        return B.bind((self.best - logit) * self.sharpness * _float(LOG2_E))

    def _weight(self, logit: Expr) -> Expr:
        distance = self._distance(logit)
        near = distance < _float(_FAR)
        return B.bind(B.Select(near, T.exp2(_float(0.0) - distance), _float(0.0)))

    def _key(self, logit: Expr) -> Expr:
        near = B.min(self._distance(logit), _float(_FAR - _STEP))
        return B.bind(B.Cast("int32", near * _float(1 / _STEP)))

    def _total(self, weight: Weight) -> Expr:
        mine = register(_float(0.0), "float32")
        with self.row.each() as (_, logit):
            store(mine, load(mine, 0) + weight(logit), 0)
        barrier()  # what it is summed in may still be read
        partial = self.row.shared.part("values")
        return block_sum(load(mine, 0), partial, _WARPS, self.row.thread)

    def _reached(self, target: Expr, weight: Weight) -> Expr:
        """Emit the search of the least key up to which weights sum up to `target`."""
        values, sums = self.row.shared.part("values"), self.row.shared.part("sums")
        thread = self.row.thread
        found, left = register(i32(0), "int32"), register(target, "float32")
        with B.serial(_BITS // _DIGIT) as turn:
            shift = B.bind(i32(_BITS - _DIGIT) - turn * i32(_DIGIT))
            mine = registers(_DIGITS)
            for digit in range(_DIGITS):
                store(mine, _float(0.0), digit)
            with self.row.each() as (_, logit):
                key = B.bind(B.shift_right(self._key(logit), shift))
                near = B.shift_right(key, i32(_DIGIT)) == load(found, 0)
                value = B.bind(B.Select(near, weight(logit), _float(0.0)))
                last = B.bind(B.bitwise_and(key, i32(_DIGITS - 1)))
                for digit in range(_DIGITS):
                    more = B.Select(last == i32(digit), value, _float(0.0))
                    store(mine, load(mine, digit) + more, digit)
            warp_sum(mine, _DIGITS, thread.lane)
            lanes = i32(WARP // _DIGITS)
            with B.If(B.floormod(thread.lane, lanes) == i32(0)), B.Then():
                at = thread.warp * i32(_DIGITS) + B.floordiv(thread.lane, lanes)
                store(sums, load(mine, 0), at)
            barrier()
            with B.If(thread.number < i32(_DIGITS)), B.Then():
                total = register(_float(0.0), "float32")
                with B.serial(_WARPS) as warp:
                    at = warp * i32(_DIGITS) + thread.number
                    store(total, load(total, 0) + load(sums, at), 0)
                store(values, load(total, 0), thread.number)
            barrier()
            digit, before = _search(values, i32(0), _DIGITS, load(left, 0), reach=True)
            store(found, load(found, 0) * i32(_DIGITS) + digit, 0)
            store(left, load(left, 0) - before, 0)
            barrier()
        return B.bind(load(found, 0))

    def _pick(self, weight: Weight, drawn: Expr) -> Expr:
        """Emit the choice by a number from [0, 1): threads' sums first, then a thread's tokens."""
        lanes, values = self.row.shared.part("lanes"), self.row.shared.part("values")
        thread = self.row.thread
        mine = register(_float(0.0), "float32")
        with self.row.each() as (_, logit):
            store(mine, load(mine, 0) + weight(logit), 0)
        store(lanes, load(mine, 0), thread.number)
        barrier()
        total = register(_float(0.0), "float32")
        with B.If(thread.lane == i32(0)), B.Then():
            with B.serial(WARP) as lane:
                store(total, load(total, 0) + load(lanes, thread.number + lane), 0)
            store(values, load(total, 0), thread.warp)
        barrier()
        store(total, _float(0.0), 0)
        with B.serial(_WARPS) as warp:
            store(total, load(total, 0) + load(values, warp), 0)
        target = B.bind(load(total, 0) * drawn)
        warp, before = _search(values, i32(0), _WARPS, target, reach=False)
        target = B.bind(target - before)
        lane, before = _search(lanes, B.bind(warp * i32(WARP)), WARP, target, reach=False)
        target = B.bind(target - before)
        token, sum_ = register(i32(-1), "int32"), register(_float(0.0), "float32")
        chosen = thread.number == warp * i32(WARP) + lane
        with B.If(chosen), B.Then(), self.row.each() as (at, logit):
            value = B.bind(weight(logit))
            # The last one that has a weight, where rounding leaves the target beyond all.
            with B.If(B.And(value > _float(0.0), load(sum_, 0) <= target)), B.Then():
                store(token, at, 0)
                store(sum_, load(sum_, 0) + value, 0)
        return B.bind(load(token, 0))


def _search(
    values: Buffer, start: Expr, count: int, target: Expr, *, reach: bool
) -> tuple[Expr, Expr]:
    """Emit the search of the value with which a sum is beyond `target`, or reaches it.

    Returns its place, counted from `start`, and the sum before it; where rounding keeps the sum
    below, the last value that is not 0, or where a sum is to be reached the last of all.
    """
    place, before = (
        register(i32(count - 1 if reach else 0), "int32"),
        register(_float(0), "float32"),
    )
    sum_, open_ = register(_float(0.0), "float32"), register(i32(1), "int32")
    goal = B.bind(target)
    with B.serial(count) as i:
        value = B.bind(load(values, start + i))
        after = B.bind(load(sum_, 0) + value)
        ends = B.bind(after >= goal if reach else after > goal)
        takes = B.And(load(open_, 0) == i32(1), ends if reach else value > _float(0.0))
        with B.If(takes), B.Then():
            store(place, i, 0)
            store(before, load(sum_, 0), 0)
        with B.If(ends), B.Then():
            store(open_, i32(0), 0)
        store(sum_, after, 0)
    return B.bind(load(place, 0)), B.bind(load(before, 0))


def _float(value: float) -> Expr:
    return const(value, "float32")
