"""RoPE over fused q, k, v rows, with the RMSNorm of q and k where a model has it."""

import math
from typing import Any

from gqsa_compiler._tvm import T
from gqsa_compiler.errors import CompileError

# Below this many tokens a thread launch costs more than it saves.
_SERIAL_TOKENS = 4


def _lanes(*extents: int) -> int:
    """Return the widest vector, at most 16 floats, that divides every extent."""
    return math.gcd(16, *extents)


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
        output, of qkv's shape. n and context are symbolic.

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
    heads = num_heads + num_kv_heads
    half = rotary_dim // 2
    plain = head_dim - rotary_dim
    rows = heads + num_kv_heads
    lanes = _lanes(half)
    tail = _lanes(plain, rotary_dim)
    full = _lanes(head_dim)
    attrs = {"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8}

    @T.macro
    def copy(src, dst, t, h, begin, width, count):
        for i in T.serial(count):
            for v in T.vectorized(width):
                dst[t, h, begin + i * width + v] = src[t, h, begin + i * width + v]

    @T.macro
    def rotate(src, dst, cos_sin, t, h, pos):
        for i in T.serial(half // lanes):
            for v in T.vectorized(lanes):
                dst[t, h, i * lanes + v] = (
                    src[t, h, i * lanes + v] * cos_sin[pos, i * lanes + v]
                    - src[t, h, half + i * lanes + v] * cos_sin[pos, half + i * lanes + v]
                )
            for v in T.vectorized(lanes):
                dst[t, h, half + i * lanes + v] = (
                    src[t, h, half + i * lanes + v] * cos_sin[pos, i * lanes + v]
                    + src[t, h, i * lanes + v] * cos_sin[pos, half + i * lanes + v]
                )

    @T.macro
    def normalise(src, row, weight, t, h):
        squares = T.alloc_buffer((full,), "float32")
        total = T.alloc_buffer((1,), "float32")
        for v in T.vectorized(full):
            squares[v] = T.float32(0)
        for i in T.serial(head_dim // full):
            for v in T.vectorized(full):
                squares[v] = (
                    squares[v] + src[t, h, i * full + v] * src[t, h, i * full + v]
                )
        total[0] = T.float32(0)
        for v in T.unroll(full):
            total[0] = total[0] + squares[v]
        total[0] = T.float32(1) / T.sqrt(total[0] * T.float32(1 / head_dim) + T.float32(eps))
        for i in T.serial(head_dim // full):
            for v in T.vectorized(full):
                row[0, 0, i * full + v] = (
                    src[t, h, i * full + v] * total[0] * weight[i * full + v]
                )

    @T.macro
    def normalise_rotate(src, dst, cos_sin, weight, t, h, pos):
        row = T.alloc_buffer((1, 1, head_dim), "float32")
        normalise(src, row, weight, t, h)
        for i in T.serial(half // lanes):
            for v in T.vectorized(lanes):
                dst[t, h, i * lanes + v] = (
                    row[0, 0, i * lanes + v] * cos_sin[pos, i * lanes + v]
                    - row[0, 0, half + i * lanes + v] * cos_sin[pos, half + i * lanes + v]
                )
            for v in T.vectorized(lanes):
                dst[t, h, half + i * lanes + v] = (
                    row[0, 0, half + i * lanes + v] * cos_sin[pos, i * lanes + v]
                    + row[0, 0, i * lanes + v] * cos_sin[pos, half + i * lanes + v]
                )
        for i in T.serial(plain // tail):
            for v in T.vectorized(tail):
                dst[t, h, rotary_dim + i * tail + v] = row[0, 0, rotary_dim + i * tail + v]

    @T.macro
    def token(src, dst, positions, cos_sin, t):
        pos: T.let[T.int32] = positions[t]
        for h in T.serial(heads):
            rotate(src, dst, cos_sin, t, h, pos)
            copy(src, dst, t, h, rotary_dim, tail, plain // tail)
        for h in T.serial(num_kv_heads):
            copy(src, dst, t, heads + h, 0, full, head_dim // full)

    @T.macro
    def norm_token(src, dst, positions, cos_sin, q_norm, k_norm, t):
        pos: T.let[T.int32] = positions[t]
        for h in T.serial(num_heads):
            normalise_rotate(src, dst, cos_sin, q_norm, t, h, pos)
        for h in T.serial(num_kv_heads):
            normalise_rotate(src, dst, cos_sin, k_norm, t, num_heads + h, pos)
        for h in T.serial(num_kv_heads):
            copy(src, dst, t, heads + h, 0, full, head_dim // full)

    @T.prim_func(s_tir=True)
    def rope(qkv_h: T.handle, positions_h: T.handle, cos_sin_h: T.handle, out_h: T.handle):
        T.func_attr(attrs)
        n = T.int64()
        context = T.int64()
        qkv = T.match_buffer(qkv_h, (n, rows * head_dim), "float32")
        positions = T.match_buffer(positions_h, (n,), "int32")
        cos_sin = T.match_buffer(cos_sin_h, (context, rotary_dim), "float32")
        out = T.match_buffer(out_h, (n, rows * head_dim), "float32")
        src = T.decl_buffer((n, rows, head_dim), "float32", data=qkv.data)
        dst = T.decl_buffer((n, rows, head_dim), "float32", data=out.data)
        if n < T.int64(_SERIAL_TOKENS):
            for t in T.serial(n):
                token(src, dst, positions, cos_sin, t)
        else:
            for t in T.parallel(n):
                token(src, dst, positions, cos_sin, t)

    @T.prim_func(s_tir=True)
    def norm_rope(
        qkv_h: T.handle,
        positions_h: T.handle,
        cos_sin_h: T.handle,
        q_norm_h: T.handle,
        k_norm_h: T.handle,
        out_h: T.handle,
    ):
        T.func_attr(attrs)
        n = T.int64()
        context = T.int64()
        qkv = T.match_buffer(qkv_h, (n, rows * head_dim), "float32")
        positions = T.match_buffer(positions_h, (n,), "int32")
        cos_sin = T.match_buffer(cos_sin_h, (context, rotary_dim), "float32")
        q_norm = T.match_buffer(q_norm_h, (head_dim,), "float32")
        k_norm = T.match_buffer(k_norm_h, (head_dim,), "float32")
        out = T.match_buffer(out_h, (n, rows * head_dim), "float32")
        src = T.decl_buffer((n, rows, head_dim), "float32", data=qkv.data)
        dst = T.decl_buffer((n, rows, head_dim), "float32", data=out.data)
        if n < T.int64(_SERIAL_TOKENS):
            for t in T.serial(n):
                norm_token(src, dst, positions, cos_sin, q_norm, k_norm, t)
        else:
            for t in T.parallel(n):
                norm_token(src, dst, positions, cos_sin, q_norm, k_norm, t)

    return norm_rope if qk_norm else rope
