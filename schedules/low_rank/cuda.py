"""The kernel on a GPU: a thread an output of a token."""

from __future__ import annotations

from typing import Any

from gqsa_compiler._tvm import B
from gqsa_compiler.schedules.cuda.device import register
from gqsa_compiler.schedules.cuda.epilogue import activate
from gqsa_compiler.schedules.cuda.launch import each
from gqsa_compiler.schedules.generic.emit import (
    Buffer,
    Expr,
    argument,
    extent,
    int64,
    load,
    scheduled,
    store,
)
from gqsa_compiler.schedules.low_rank.spec import LowRankSpec


def low_rank(spec: LowRankSpec) -> Any:
    """Build the PrimFunc for a GPU; `gqsa_compiler.schedules.low_rank.kernel` has its arguments."""
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

        def body(number: Expr) -> None:
            token = B.bind(B.floordiv(number, int64(spec.n_out)))
            feature = B.bind(B.floormod(number, int64(spec.n_out)))
            value = _total(spec, base, u, b, token, feature, 0)
            if spec.activation is not None:
                value = activate(spec.activation, value)
            if spec.gated:
                value = value * _total(spec, second, u, b, token, feature, spec.n_out)
            store(out, value, token, feature)

        each(tokens * int64(spec.n_out), body)
    return builder.get()


def _total(
    spec: LowRankSpec,
    base: Buffer,
    u: Buffer | None,
    b: Buffer | None,
    token: Expr,
    feature: Expr,
    offset: int,
) -> Expr:
    """Emit ``base + u B`` of the feature `offset` behind `feature`, one of `n_out`."""
    at = B.bind(feature + int64(offset))
    total = register(load(base, token, at), "float32")
    for start, part in zip(spec.starts, spec.parts, strict=True):
        if part.slot is None or (spec.gated and start != offset):
            continue
        inside = B.And(at >= int64(start), at < int64(start + part.features))
        with B.If(inside), B.Then(), B.serial(int64(0), int64(spec.rank)) as r:
            value = load(u, token, int64(part.slot * spec.rank) + r)
            store(total, load(total, 0) + value * B.Cast("float32", load(b, r, at)), 0)
    return B.bind(load(total, 0))
