"""The kernel on a CPU: lanes are features, and each vector of B is used for a few tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gqsa_compiler._tvm import B
from gqsa_compiler.schedules.generic import math
from gqsa_compiler.schedules.generic.config import has_native_half
from gqsa_compiler.schedules.generic.emit import (
    THREAD_FLOATS,
    Buffer,
    Expr,
    argument,
    broadcast,
    extent,
    half_to_float,
    int64,
    load,
    local,
    scheduled,
    store,
    vector_lanes,
)
from gqsa_compiler.schedules.low_rank.spec import LowRankSpec
from gqsa_compiler.targets import TargetSpec

TOKENS = 4
"""Tokens computed at once."""
TASKS = 32
"""Pieces of the features, spread over the threads."""


def low_rank(spec: LowRankSpec, target: TargetSpec) -> Any:
    """Build the PrimFunc for a CPU; `gqsa_compiler.schedules.low_rank.kernel` has its arguments."""
    tokens = extent("m")
    with scheduled() as builder:
        base = argument("base", (tokens, spec.n))
        u = b = None
        second = base
        if spec.slots:
            u = argument("u", (tokens, spec.slots * spec.rank))
            b = argument("b", (spec.rank, spec.n), spec.dtype)
        else:
            second = argument("second", (tokens, spec.n))
        out = argument("out", (tokens, spec.n_out))
        native = has_native_half(target)
        work = _Work(spec, vector_lanes(target), native, base, second, u, b, out)
        # As `each_token`: a little is not worth waking threads for.
        alone = max(1, THREAD_FLOATS // (spec.n * (spec.rank + 1)))
        with B.If(tokens <= int64(alone)):
            with B.Then():
                work.task(tokens, None)
            with B.Else(), B.parallel(int64(0), int64(TASKS)) as task:
                work.task(tokens, task)
    return builder.get()


@dataclass(frozen=True)
class _Source:
    """Where the values of an output come from: a part, all of it or what is computed together."""

    start: int
    slot: int | None


@dataclass(frozen=True)
class _Work:
    """The arguments of the kernel."""

    spec: LowRankSpec
    lanes: int
    native_half: bool
    base: Buffer
    second: Buffer
    u: Buffer | None
    b: Buffer | None
    out: Buffer

    def task(self, tokens: Expr, task: Expr | None) -> None:
        """Emit a task's share of the features for all tokens; without a task all of them."""
        sources = [
            _Source(start, part.slot)
            for start, part in zip(self.spec.starts, self.spec.parts, strict=True)
        ]
        if self.spec.gated:
            self._span(tokens, task, self.spec.n_out, sources)
            return
        for part, source in zip(self.spec.parts, sources, strict=True):
            self._span(tokens, task, part.features, [source])

    def _span(
        self, tokens: Expr, task: Expr | None, width: int, sources: Sequence[_Source]
    ) -> None:
        """Emit `width` outputs, of one source or of a gate and what it lets through."""
        vectors, tail = divmod(width, self.lanes)
        first: Expr = int64(0)
        last: Expr = int64(vectors)
        if task is not None:
            first, last = (
                B.bind(B.floordiv(t * int64(vectors), int64(TASKS)))
                for t in (task, task + int64(1))
            )
        with B.serial(int64(0), last - first) as i:
            column = B.bind((first + i) * int64(self.lanes))
            self._all_tokens(tokens, column, self.lanes, sources)
        if not tail:
            return
        if task is None:
            self._tail(tokens, vectors * self.lanes, tail, sources)
        else:
            with B.If(task == int64(TASKS - 1)), B.Then():
                self._tail(tokens, vectors * self.lanes, tail, sources)

    def _tail(self, tokens: Expr, start: int, count: int, sources: Sequence[_Source]) -> None:
        with B.serial(int64(0), int64(count)) as i:
            self._all_tokens(tokens, B.bind(int64(start) + i), 1, sources)

    def _all_tokens(
        self, tokens: Expr, column: Expr, lanes: int, sources: Sequence[_Source]
    ) -> None:
        tiles = B.bind(B.floordiv(tokens, int64(TOKENS)))
        with B.serial(int64(0), tiles) as i:
            self._tile(B.bind(i * int64(TOKENS)), TOKENS, column, lanes, sources)
        rest = B.bind(tiles * int64(TOKENS))
        with B.serial(int64(0), tokens - rest) as i:
            self._tile(B.bind(rest + i), 1, column, lanes, sources)

    def _tile(
        self, token: Expr, count: int, column: Expr, lanes: int, sources: Sequence[_Source]
    ) -> None:
        """Emit outputs ``column .. column + lanes`` of `count` tokens."""
        at = [B.bind(token + int64(t)) for t in range(count)]
        both = (self.base, self.second)
        sums = [
            self._sums(base, at, column, lanes, source)
            for base, source in zip(both, sources, strict=False)
        ]
        for t, place in enumerate(at):
            value = B.bind(load(sums[0], t * lanes, lanes=lanes))
            if self.spec.activation is not None:
                value = B.bind(math.activate(self.spec.activation, value))
            if self.spec.gated:
                value = value * load(sums[1], t * lanes, lanes=lanes)
            store(self.out, value, place, column + int64(sources[0].start), lanes=lanes)

    def _sums(
        self, base: Buffer, tokens: list[Expr], column: Expr, lanes: int, source: _Source
    ) -> Buffer:
        """Emit ``base + u B`` of a few tokens: local float32 [tokens * lanes]."""
        feature = B.bind(column + int64(source.start))
        totals = local(len(tokens) * lanes)
        for t, token in enumerate(tokens):
            store(totals, load(base, token, feature, lanes=lanes), t * lanes, lanes=lanes)
        if source.slot is not None:
            first = source.slot * self.spec.rank
            with B.serial(int64(0), int64(self.spec.rank)) as r:
                weight = load(self.b, r, feature, lanes=lanes)
                if self.spec.dtype == "float16":
                    weight = half_to_float(weight, lanes, native=self.native_half)
                weight = B.bind(weight)
                for t, token in enumerate(tokens):
                    value = broadcast(load(self.u, token, int64(first) + r), lanes)
                    total = math.fma(weight, value, load(totals, t * lanes, lanes=lanes))
                    store(totals, total, t * lanes, lanes=lanes)
        return totals
