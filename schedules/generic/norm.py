"""RMSNorm and LayerNorm where no linear layer can take them in (Gemma's post-norms, OPT)."""

import math
from typing import Any

from gqsa_compiler._tvm import T

# Below this many tokens a thread launch costs more than it saves.
_SERIAL_TOKENS = 16


def norm(features: int, eps: float, *, center: bool) -> Any:
    """Build the PrimFunc that normalises rows.

    Parameters
    ----------
    features : int
        Row length K, any positive number.
    eps : float
        Added to the mean square (the variance when `center`).
    center : bool
        False: RMSNorm, ``x * rsqrt(mean(x^2) + eps) * weight``. True: LayerNorm,
        ``(x - mean(x)) * rsqrt(var(x) + eps) * weight + bias``.

    Returns
    -------
    PrimFunc
        Scheduled. Arguments: ``x`` float32 [m, K], ``weight`` float32 [K], with `center` ``bias``
        float32 [K], and the output float32 [m, K]; m is symbolic.
    """
    lanes = math.gcd(16, features)
    steps = features // lanes
    attrs = {"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8}

    @T.macro
    def statistics(x, sums, stats, t):
        # Two passes over a row that is in cache: the variance of large means stays exact.
        for v in T.vectorized(lanes):
            sums[v] = T.float32(0)
        if center:
            for i in T.serial(steps):
                for v in T.vectorized(lanes):
                    sums[v] = sums[v] + x[t, i * lanes + v]
        stats[0] = T.float32(0)
        for v in T.unroll(lanes):
            stats[0] = stats[0] + sums[v]
        stats[0] = stats[0] * T.float32(1 / features)
        for v in T.vectorized(lanes):
            sums[v] = T.float32(0)
        for i in T.serial(steps):
            for v in T.vectorized(lanes):
                sums[v] = sums[v] + (x[t, i * lanes + v] - stats[0]) * (
                    x[t, i * lanes + v] - stats[0]
                )
        stats[1] = T.float32(0)
        for v in T.unroll(lanes):
            stats[1] = stats[1] + sums[v]
        stats[1] = T.float32(1) / T.sqrt(stats[1] * T.float32(1 / features) + T.float32(eps))

    @T.macro
    def rms_row(x, weight, out, t):
        sums = T.alloc_buffer((lanes,), "float32")
        stats = T.alloc_buffer((2,), "float32")
        statistics(x, sums, stats, t)
        for i in T.serial(steps):
            for v in T.vectorized(lanes):
                out[t, i * lanes + v] = x[t, i * lanes + v] * stats[1] * weight[i * lanes + v]

    @T.macro
    def layer_row(x, weight, bias, out, t):
        sums = T.alloc_buffer((lanes,), "float32")
        stats = T.alloc_buffer((2,), "float32")
        statistics(x, sums, stats, t)
        for i in T.serial(steps):
            for v in T.vectorized(lanes):
                out[t, i * lanes + v] = (x[t, i * lanes + v] - stats[0]) * stats[1] * weight[
                    i * lanes + v
                ] + bias[i * lanes + v]

    @T.prim_func(s_tir=True)
    def rms_norm(x_h: T.handle, weight_h: T.handle, out_h: T.handle):
        T.func_attr(attrs)
        m = T.int64()
        x = T.match_buffer(x_h, (m, features), "float32")
        weight = T.match_buffer(weight_h, (features,), "float32")
        out = T.match_buffer(out_h, (m, features), "float32")
        if m <= T.int64(_SERIAL_TOKENS):
            for t in T.serial(m):
                rms_row(x, weight, out, t)
        else:
            for t in T.parallel(m):
                rms_row(x, weight, out, t)

    @T.prim_func(s_tir=True)
    def layer_norm(x_h: T.handle, weight_h: T.handle, bias_h: T.handle, out_h: T.handle):
        T.func_attr(attrs)
        m = T.int64()
        x = T.match_buffer(x_h, (m, features), "float32")
        weight = T.match_buffer(weight_h, (features,), "float32")
        bias = T.match_buffer(bias_h, (features,), "float32")
        out = T.match_buffer(out_h, (m, features), "float32")
        if m <= T.int64(_SERIAL_TOKENS):
            for t in T.serial(m):
                layer_row(x, weight, bias, out, t)
        else:
            for t in T.parallel(m):
                layer_row(x, weight, bias, out, t)

    return layer_norm if center else rms_norm
