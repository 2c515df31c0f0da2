"""RoPE over fused rows of q, k and v, with the RMSNorm of q and k where a model has it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from gqsa_compiler._tvm import B
from gqsa_compiler.errors import CompileError
from gqsa_compiler.schedules.generic.emit import (
    Buffer,
    Expr,
    argument,
    broadcast,
    copy,
    each_token,
    extent,
    int64,
    load,
    scheduled,
    store,
)
from gqsa_compiler.schedules.generic.rows import rms_factor

ROPE = "gqsa.rope"
"""The attribute of a function of `rope_qkv`: its `RopeShape` as JSON, by which a pass builds the
same for another target."""


@dataclass(frozen=True)
class RopeShape:
    """What `rope_qkv` is built for; its parameters say what each field means."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    qk_norm: bool = False
    eps: float = 1e-6

    def to_json(self) -> str:
        """Serialise to one line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> RopeShape:
        """Inverse of `to_json`."""
        return cls(**json.loads(text))


def rope_qkv(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rotary_dim: int,
    qk_norm: bool = False,
    eps: float = 1e-6,
) -> Any:
    """Build the PrimFunc that rotates q and k inside fused rows of q, k and v.

    The rotation is Hugging Face's ``rotate_half``: feature ``i`` of the first half of
    `rotary_dim` pairs with feature ``i + rotary_dim / 2``. Features from `rotary_dim` on, and v,
    are copied.

    Parameters
    ----------
    num_heads, num_kv_heads, head_dim : int
        Query heads Hq, key/value heads Hkv and features of a head D.
    rotary_dim : int
        Even, at most D.
    qk_norm : bool
        Normalise every head of q and k first: ``x * rsqrt(mean(x^2) + eps) * weight``.
    eps : float
        Used with `qk_norm`.

    Returns
    -------
    PrimFunc
        Scheduled, for `nn.op.tensor_ir_op`. Arguments: ``qkv`` float32 [n, (Hq + 2 Hkv) D],
        ``positions`` int32 [n], ``cos_sin`` float32 [context, rotary_dim] (first half cosines,
        second half sines), with `qk_norm` also ``q_norm`` and ``k_norm`` float32 [D], and the
        output, of qkv's shape. n and context are symbolic; every position is below context.

    Raises
    ------
    CompileError
        `rotary_dim` is odd, or not within the head.
    """
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise CompileError(
            f"RoPE cannot rotate {rotary_dim} of a head's {head_dim} features: "
            "the number must be even, positive and at most the head's."
        )
    tokens, context = extent("n"), extent("context")
    width = (num_heads + 2 * num_kv_heads) * head_dim
    with scheduled() as builder:
        qkv = argument("qkv", (tokens, width))
        positions = argument("positions", (tokens,), "int32")
        cos_sin = argument("cos_sin", (context, rotary_dim))
        # (first head, number of heads, norm) of what is rotated.
        parts: tuple[tuple[int, int, Buffer | None], ...] = ((0, num_heads + num_kv_heads, None),)
        if qk_norm:
            q_norm, k_norm = argument("q_norm", (head_dim,)), argument("k_norm", (head_dim,))
            parts = ((0, num_heads, q_norm), (num_heads, num_kv_heads, k_norm))
        out = argument("out", (tokens, width))
        rows = _Rows(head_dim, rotary_dim, eps, qkv, cos_sin, out)
        values = (num_heads + num_kv_heads) * head_dim

        def row(token: Expr) -> None:
            position = B.bind(int64(load(positions, token)))
            for first, count, norm in parts:
                with B.serial(int64(0), int64(count)) as head:
                    rows.rotate(token, B.bind((head + first) * head_dim), position, norm)
            with B.serial(int64(0), int64(num_kv_heads)) as head:
                at = (token, B.bind(head * head_dim + values))
                copy(out, at, qkv, at, head_dim, math.gcd(16, head_dim))

        each_token(tokens, width, row)
    shape = RopeShape(num_heads, num_kv_heads, head_dim, rotary_dim, qk_norm, eps)
    return builder.get().with_attr(ROPE, shape.to_json())


@dataclass(frozen=True)
class _Rows:
    """What the heads of q and k go through."""

    dim: int
    rotary: int
    eps: float
    qkv: Buffer
    cos_sin: Buffer
    out: Buffer

    def rotate(self, token: Expr, start: Expr, position: Expr, norm: Buffer | None) -> None:
        """Emit the head at column `start`: normalise it with `norm`, rotate it, store it."""
        half = self.rotary // 2
        lanes, tail = math.gcd(16, half), math.gcd(16, self.dim - self.rotary, self.rotary)
        scale = None if norm is None else self._factor(token, start)

        def feature(at: Expr, lanes: int) -> Expr:
            value = load(self.qkv, token, start + at, lanes=lanes)
            if scale is None or norm is None:
                return B.bind(value)
            return B.bind(value * broadcast(scale, lanes) * load(norm, at, lanes=lanes))

        with B.serial(int64(0), int64(half // lanes)) as i:
            low = i * lanes
            high = low + half
            first, second = feature(low, lanes), feature(high, lanes)
            cos = B.bind(load(self.cos_sin, position, low, lanes=lanes))
            sin = B.bind(load(self.cos_sin, position, high, lanes=lanes))
            store(self.out, first * cos - second * sin, token, start + low, lanes=lanes)
            store(self.out, second * cos + first * sin, token, start + high, lanes=lanes)
        with B.serial(int64(0), int64((self.dim - self.rotary) // tail)) as i:
            at = i * tail + self.rotary
            store(self.out, feature(at, tail), token, start + at, lanes=tail)

    def _factor(self, token: Expr, start: Expr) -> Expr:
        """Emit the RMS norm's factor of the head at column `start`."""

        def values(at: Expr, lanes: int) -> Expr:
            return load(self.qkv, token, start + at, lanes=lanes)

        return rms_factor(self.dim, math.gcd(16, self.dim), self.eps, values)
