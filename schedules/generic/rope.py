"""RoPE over fused rows of q, k and v, with the RMSNorm of q and k where a model has it."""

import math
from dataclasses import dataclass
from typing import Any

from gqsa_compiler._tvm import T
from gqsa_compiler.errors import CompileError

# Below this many tokens a thread launch costs more than it saves.
_SERIAL_TOKENS = 4
_OPAQUE = 8  # Relax's operator pattern: never fused into others
_ATTRS = {"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": _OPAQUE}


@dataclass(frozen=True)
class _Heads:
    """Sizes of a fused row."""

    queries: int
    keys: int
    dim: int
    rotary: int

    @property
    def rows(self) -> int:
        return self.queries + 2 * self.keys


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
    heads = _Heads(num_heads, num_kv_heads, head_dim, rotary_dim)
    return _norm_rope(heads, eps) if qk_norm else _rope(heads)


def _lanes(*extents: int) -> int:
    """Return the widest vector, at most 16 floats, that divides every extent."""
    return math.gcd(16, *extents)


def _macros(heads: _Heads) -> tuple[Any, Any]:
    """Return the macros that rotate a head, from [st, sh] to [t, h], and that copy one."""
    dim, rotary = heads.dim, heads.rotary
    half = rotary // 2
    lanes, tail, full = _lanes(half), _lanes(dim - rotary, rotary), _lanes(dim)

    @T.macro
    def rotate(
        src: Any, st: Any, sh: Any, dst: Any, t: Any, h: Any, cos_sin: Any, position: Any
    ) -> None:
        for i in T.serial(half // lanes):
            for x in T.vectorized(lanes):
                dst[t, h, i * lanes + x] = (
                    src[st, sh, i * lanes + x] * cos_sin[position, i * lanes + x]
                    - src[st, sh, half + i * lanes + x] * cos_sin[position, half + i * lanes + x]
                )
            for x in T.vectorized(lanes):
                dst[t, h, half + i * lanes + x] = (
                    src[st, sh, half + i * lanes + x] * cos_sin[position, i * lanes + x]
                    + src[st, sh, i * lanes + x] * cos_sin[position, half + i * lanes + x]
                )
        for i in T.serial((dim - rotary) // tail):
            for x in T.vectorized(tail):
                dst[t, h, rotary + i * tail + x] = src[st, sh, rotary + i * tail + x]

    @T.macro
    def copy(src: Any, dst: Any, t: Any, h: Any) -> None:
        for i in T.serial(dim // full):
            for x in T.vectorized(full):
                dst[t, h, i * full + x] = src[t, h, i * full + x]

    return rotate, copy


def _rope(heads: _Heads) -> Any:
    dim, rotary, rows = heads.dim, heads.rotary, heads.rows
    turned, copied = heads.queries + heads.keys, heads.keys
    rotate, copy = _macros(heads)

    @T.macro
    def token(src: Any, dst: Any, positions: Any, cos_sin: Any, t: Any) -> None:
        position: T.let[T.int32] = positions[t]
        for h in T.serial(turned):
            rotate(src, t, h, dst, t, h, cos_sin, position)
        for h in T.serial(copied):
            copy(src, dst, t, turned + h)

    @T.prim_func(s_tir=True)
    def rope(qkv_h: T.handle, positions_h: T.handle, cos_sin_h: T.handle, out_h: T.handle) -> None:
        T.func_attr(_ATTRS)
        n = T.int64()
        context = T.int64()
        qkv = T.match_buffer(qkv_h, (n, rows * dim), "float32")
        positions = T.match_buffer(positions_h, (n,), "int32")
        cos_sin = T.match_buffer(cos_sin_h, (context, rotary), "float32")
        out = T.match_buffer(out_h, (n, rows * dim), "float32")
        src = T.decl_buffer((n, rows, dim), "float32", data=qkv.data)
        dst = T.decl_buffer((n, rows, dim), "float32", data=out.data)
        if n < T.int64(_SERIAL_TOKENS):
            for t in T.serial(n):
                token(src, dst, positions, cos_sin, t)
        else:
            for t in T.parallel(n):
                token(src, dst, positions, cos_sin, t)

    return rope


def _norm_rope(heads: _Heads, eps: float) -> Any:
    dim, rotary, rows = heads.dim, heads.rotary, heads.rows
    queries, keys = heads.queries, heads.keys
    full = _lanes(dim)
    rotate, copy = _macros(heads)

    @T.macro
    def normalise(src: Any, t: Any, h: Any, weight: Any, row: Any) -> None:
        squares = T.alloc_buffer((full,), "float32")
        scale = T.alloc_buffer((1,), "float32")
        for x in T.vectorized(full):
            squares[x] = T.float32(0)
        for i in T.serial(dim // full):
            for x in T.vectorized(full):
                squares[x] = squares[x] + src[t, h, i * full + x] * src[t, h, i * full + x]
        scale[0] = T.float32(0)
        for x in T.unroll(full):
            scale[0] = scale[0] + squares[x]
        scale[0] = T.float32(1) / T.sqrt(scale[0] * T.float32(1 / dim) + T.float32(eps))
        for i in T.serial(dim // full):
            for x in T.vectorized(full):
                row[0, 0, i * full + x] = src[t, h, i * full + x] * scale[0] * weight[i * full + x]

    @T.macro
    def token(
        src: Any, dst: Any, positions: Any, cos_sin: Any, q_norm: Any, k_norm: Any, t: Any
    ) -> None:
        row = T.alloc_buffer((1, 1, dim), "float32")
        position: T.let[T.int32] = positions[t]
        for h in T.serial(queries):
            normalise(src, t, h, q_norm, row)
            rotate(row, 0, 0, dst, t, h, cos_sin, position)
        for h in T.serial(keys):
            normalise(src, t, queries + h, k_norm, row)
            rotate(row, 0, 0, dst, t, queries + h, cos_sin, position)
        for h in T.serial(keys):
            copy(src, dst, t, queries + keys + h)

    @T.prim_func(s_tir=True)
    def norm_rope(
        qkv_h: T.handle,
        positions_h: T.handle,
        cos_sin_h: T.handle,
        q_norm_h: T.handle,
        k_norm_h: T.handle,
        out_h: T.handle,
    ) -> None:
        T.func_attr(_ATTRS)
        n = T.int64()
        context = T.int64()
        qkv = T.match_buffer(qkv_h, (n, rows * dim), "float32")
        positions = T.match_buffer(positions_h, (n,), "int32")
        cos_sin = T.match_buffer(cos_sin_h, (context, rotary), "float32")
        q_norm = T.match_buffer(q_norm_h, (dim,), "float32")
        k_norm = T.match_buffer(k_norm_h, (dim,), "float32")
        out = T.match_buffer(out_h, (n, rows * dim), "float32")
        src = T.decl_buffer((n, rows, dim), "float32", data=qkv.data)
        dst = T.decl_buffer((n, rows, dim), "float32", data=out.data)
        if n < T.int64(_SERIAL_TOKENS):
            for t in T.serial(n):
                token(src, dst, positions, cos_sin, q_norm, k_norm, t)
        else:
            for t in T.parallel(n):
                token(src, dst, positions, cos_sin, q_norm, k_norm, t)

    return norm_rope
