"""RoPE over fused rows of q, k and v on a GPU: a warp a head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gqsa_compiler._tvm import B, T
from gqsa_compiler.schedules.cuda.arch import WARP
from gqsa_compiler.schedules.cuda.device import register, shuffle_xor
from gqsa_compiler.schedules.cuda.launch import THREADS, Thread, i32
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
from gqsa_compiler.schedules.generic.rope import RopeShape

_WARPS = THREADS // WARP


def rope_qkv(shape: RopeShape) -> Any:
    """Build the PrimFunc that rotates q and k inside fused rows of q, k and v.

    Arguments and result are those of `schedules.generic.rope.rope_qkv`.
    """
    tokens, context = extent("n"), extent("context")
    heads = shape.num_heads + 2 * shape.num_kv_heads
    with scheduled() as builder:
        qkv = argument("qkv", (tokens, heads * shape.head_dim))
        positions = argument("positions", (tokens,), "int32")
        cos_sin = argument("cos_sin", (context, shape.rotary_dim))
        norms = None
        if shape.qk_norm:
            dim = (shape.head_dim,)
            norms = (argument("q_norm", dim), argument("k_norm", dim))
        out = argument("out", (tokens, heads * shape.head_dim))
        count = tokens * int64(heads)
        blocks = B.floordiv(count + int64(_WARPS - 1), int64(_WARPS))
        with (
            B.thread_binding(0, blocks, thread="blockIdx.x") as block,
            B.thread_binding(0, THREADS, thread="threadIdx.x") as place,
        ):
            thread = Thread.of(place)
            number = B.bind(B.Cast("int64", block) * int64(_WARPS) + int64(thread.warp))
            with B.If(number < count), B.Then():
                token = B.bind(B.floordiv(number, int64(heads)))
                head = B.bind(B.Cast("int32", B.floormod(number, int64(heads))))
                work = _Head(shape, qkv, cos_sin, out, token, head, thread.lane)
                with B.If(head < i32(shape.num_heads + shape.num_kv_heads)):
                    with B.Then():
                        position = B.bind(int64(load(positions, token)))
                        work.rotate(position, norms)
                    with B.Else():
                        work.copy(0, shape.head_dim, None)
    return builder.get()


@dataclass(frozen=True)
class _Head:
    """A warp's head."""

    shape: RopeShape
    qkv: Buffer
    cos_sin: Buffer
    out: Buffer
    token: Expr
    head: Expr
    lane: Expr

    def _at(self, feature: Expr) -> Expr:
        return self.head * i32(self.shape.head_dim) + feature

    def _value(self, feature: Expr, norm: tuple[Expr, tuple[Buffer, Buffer]] | None) -> Expr:
        value = load(self.qkv, self.token, self._at(feature))
        if norm is not None:
            factor, (q_norm, k_norm) = norm
            is_query = self.head < i32(self.shape.num_heads)
            weight = B.Select(is_query, load(q_norm, feature), load(k_norm, feature))
            value = value * factor * weight
        return B.bind(value)

    def rotate(self, position: Expr, norms: tuple[Buffer, Buffer] | None) -> None:
        """Emit the head's rotation, normalised first where a model does that."""
        half = self.shape.rotary_dim // 2
        norm = None if norms is None else (self._factor(), norms)
        with B.serial(-(-half // WARP)) as i:
            low = B.bind(i * i32(WARP) + self.lane)
            with B.If(low < i32(half)), B.Then():
                high = B.bind(low + i32(half))
                first, second = self._value(low, norm), self._value(high, norm)
                cos = B.bind(load(self.cos_sin, position, low))
                sin = B.bind(load(self.cos_sin, position, high))
                store(self.out, first * cos - second * sin, self.token, self._at(low))
                store(self.out, second * cos + first * sin, self.token, self._at(high))
        self.copy(self.shape.rotary_dim, self.shape.head_dim, norm)

    def copy(self, begin: int, end: int, norm: tuple[Expr, tuple[Buffer, Buffer]] | None) -> None:
        """Emit the copy of features that are not rotated."""
        if begin == end:
            return
        with B.serial(-(-(end - begin) // WARP)) as i:
            at = B.bind(i * i32(WARP) + self.lane + i32(begin))
            with B.If(at < i32(end)), B.Then():
                store(self.out, self._value(at, norm), self.token, self._at(at))

    def _factor(self) -> Expr:
        """Emit the RMS norm's factor of the head."""
        dim = self.shape.head_dim
        total = register(const(0.0, "float32"), "float32")
        with B.serial(-(-dim // WARP)) as i:
            at = B.bind(i * i32(WARP) + self.lane)
            with B.If(at < i32(dim)), B.Then():
                value = B.bind(load(self.qkv, self.token, self._at(at)))
                store(total, load(total, 0) + value * value, 0)
        step = WARP // 2
        while step:
            value = B.bind(load(total, 0))
            store(total, value + shuffle_xor(value, step), 0)
            step //= 2
        mean = load(total, 0) * const(1.0 / dim, "float32") + const(self.shape.eps, "float32")
        return B.bind(T.rsqrt(mean))
