"""RMSNorm and LayerNorm where no linear layer can take them in: a block a token."""

from __future__ import annotations

from typing import Any

from gqsa_compiler._tvm import B, T
from gqsa_compiler.schedules.cuda.arch import WARP
from gqsa_compiler.schedules.cuda.device import SharedMemory, register
from gqsa_compiler.schedules.cuda.launch import (
    THREADS,
    Thread,
    block_sum,
    i32,
    one_block_each,
)
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

_WARPS = THREADS // WARP


def norm(features: int, eps: float, *, center: bool) -> Any:
    """Build the PrimFunc that normalises rows on a GPU.

    Parameters, arguments and result are those of `schedules.generic.norm.norm`.
    """
    tokens = extent("m")
    with scheduled() as builder:
        x = argument("x", (tokens, features))
        weight = argument("weight", (features,))
        bias = argument("bias", (features,)) if center else None
        out = argument("out", (tokens, features))
        normalise(x, weight, bias, out, tokens, features, eps)
    return builder.get()


def normalise(
    x: Buffer,
    weight: Buffer,
    bias: Buffer | None,
    out: Buffer,
    tokens: Expr,
    features: int,
    eps: float,
) -> None:
    """Emit the launch that normalises all rows of `x` into `out`, float32 [tokens, features].

    With `bias` it is a LayerNorm. The variance is taken around the mean, in a second pass.
    """
    with one_block_each(tokens, THREADS) as (token, thread):
        shared = SharedMemory.allocate({"sums": _WARPS, "squares": _WARPS})
        row = _Row(x, token, thread, features)
        mean: Expr = const(0.0, "float32")
        if bias is not None:
            total = block_sum(row.total(mean, 1), shared.part("sums"), _WARPS, thread)
            mean = B.bind(total * const(1.0 / features, "float32"))
        square = block_sum(row.total(mean, 2), shared.part("squares"), _WARPS, thread)
        square = square * const(1.0 / features, "float32") + const(eps, "float32")
        factor = B.bind(T.rsqrt(square))
        with B.serial(-(-features // THREADS)) as i, row.column(i) as at:
            value = (load(x, token, at) - mean) * factor * load(weight, at)
            if bias is not None:
                value = value + load(bias, at)
            store(out, value, token, at)


class _Row:
    """A block's row, its threads side by side."""

    def __init__(self, x: Buffer, token: Expr, thread: Thread, features: int) -> None:
        self.x, self.token, self.thread, self.features = x, token, thread, features

    def column(self, i: Expr) -> Any:
        """Emit the condition that the thread's `i`-th column exists; gives the column."""
        return _Column(B.bind(i * i32(THREADS) + self.thread.number), self.features)

    def total(self, mean: Expr, power: int) -> Expr:
        """Emit a thread's sum of its values less `mean`, or of their squares."""
        sum_ = register(const(0.0, "float32"), "float32")
        with B.serial(-(-self.features // THREADS)) as i, self.column(i) as at:
            value = B.bind(load(self.x, self.token, at) - mean)
            store(sum_, load(sum_, 0) + (value if power == 1 else value * value), 0)
        return load(sum_, 0)


class _Column:
    def __init__(self, at: Expr, features: int) -> None:
        self.at = at
        self.frames = (B.If(at < i32(features)), B.Then())

    def __enter__(self) -> Expr:
        for frame in self.frames:
            frame.__enter__()
        return self.at

    def __exit__(self, *error: Any) -> None:
        for frame in reversed(self.frames):
            frame.__exit__(*error)
