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
    const,
    each_token,
    extent,
    int64,
    load,
    local,
    row_sum,
    scheduled,
    store,
)

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
    tokens = extent("m")
    with scheduled() as builder:
        x = argument("x", (tokens, features))
        weight = argument("weight", (features,))
        bias = argument("bias", (features,)) if center else None
        out = argument("out", (tokens, features))

        def row(token: Expr) -> None:
            _row(x, weight, bias, out, token, features, eps)

        each_token(tokens, _SERIAL_TOKENS, row)
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
        mean = _mean(features, lanes, lambda at: load(x, token, at, lanes=lanes))

    def centered(at: Expr) -> Expr:
        value = load(x, token, at, lanes=lanes)
        return value if mean is None else value - broadcast(mean, lanes)

    # A second pass over a row that is in cache: the variance around a large mean stays exact.
    square = _mean(features, lanes, lambda at: centered(at) * centered(at))
    factor = B.bind(const(1.0, "float32") / B.sqrt(square + const(eps, "float32")))
    with B.serial(int64(0), int64(features // lanes)) as i:
        at = i * int64(lanes)
        value = centered(at) * broadcast(factor, lanes) * load(weight, at, lanes=lanes)
        if bias is not None:
            value = value + load(bias, at, lanes=lanes)
        store(out, value, token, at, lanes=lanes)


def _mean(features: int, lanes: int, value: Any) -> Expr:
    """Emit the mean over a row of ``value(offset)``, `lanes` elements at a time."""
    total = local(lanes)
    store(total, broadcast(const(0.0, "float32"), lanes), 0, lanes=lanes)
    with B.serial(int64(0), int64(features // lanes)) as i:
        store(total, load(total, 0, lanes=lanes) + value(i * int64(lanes)), 0, lanes=lanes)
    return B.bind(row_sum(load(total, 0, lanes=lanes), lanes) * const(1.0 / features, "float32"))
