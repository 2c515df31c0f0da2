"""RMSNorm and LayerNorm where no linear layer can take them in (Gemma's post-norms, OPT)."""

from __future__ import annotations

import math
from typing import Any

from gqsa_compiler._tvm import B
from gqsa_compiler.schedules.generic.emit import (
    Buffer,
    Expr,
    argument,
    broadcast,
    each_token,
    extent,
    int64,
    load,
    scheduled,
    store,
)
from gqsa_compiler.schedules.generic.rows import rms_factor, row_mean


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
    tokens = extent("m")
    with scheduled() as builder:
        x = argument("x", (tokens, features))
        weight = argument("weight", (features,))
        bias = argument("bias", (features,)) if center else None
        out = argument("out", (tokens, features))

        def row(token: Expr) -> None:
            _row(x, weight, bias, out, token, features, eps)

        each_token(tokens, features, row)
    return builder.get()


def _row(
    x: Buffer,
    weight: Buffer,
    bias: Buffer | None,
    out: Buffer,
    token: Expr,
    features: int,
    eps: float,
) -> None:
    lanes = math.gcd(16, features)
    mean = None
    if bias is not None:
        mean = row_mean(features, lanes, lambda at, n: load(x, token, at, lanes=n))

    def centered(at: Expr, lanes: int) -> Expr:
        value = load(x, token, at, lanes=lanes)
        return value if mean is None else value - broadcast(mean, lanes)

    # A second pass over a row that is in cache: the variance around a large mean stays exact.
    factor = rms_factor(features, lanes, eps, centered)
    with B.serial(int64(0), int64(features // lanes)) as i:
        at = i * int64(lanes)
        value = centered(at, lanes) * broadcast(factor, lanes) * load(weight, at, lanes=lanes)
        if bias is not None:
            value = value + load(bias, at, lanes=lanes)
        store(out, value, token, at, lanes=lanes)
