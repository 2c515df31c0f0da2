"""Sums over a row of activations, of any length."""

from __future__ import annotations

from collections.abc import Callable

from gqsa_compiler._tvm import B
from gqsa_compiler.schedules.generic.emit import (
    Expr,
    broadcast,
    const,
    horizontal_sum,
    int64,
    load,
    local,
    store,
)
from gqsa_compiler.schedules.generic.math import fma

Values = Callable[[Expr, int], Expr]
"""``values(at, lanes)`` emits the elements of a row from `at` on, as a vector of `lanes`."""


def row_mean(size: int, lanes: int, values: Values) -> Expr:
    """Emit the mean of a row of `size` elements."""
    return _mean(size, lanes, lambda at, width, total: total + values(at, width))


def rms_factor(size: int, lanes: int, eps: float, values: Values) -> Expr:
    """Emit ``1 / sqrt(mean(v^2) + eps)`` of a row of `size` elements."""

    def add_square(at: Expr, width: int, total: Expr) -> Expr:
        value = B.bind(values(at, width))
        return fma(value, value, total)

    mean = _mean(size, lanes, add_square)
    return B.bind(const(1.0, "float32") / B.sqrt(mean + const(eps, "float32")))


def _mean(size: int, lanes: int, add: Callable[[Expr, int, Expr], Expr]) -> Expr:
    """Sum `lanes` elements at a time with ``add(at, lanes, total)``, the last ones singly."""
    vectors, tail = divmod(size, lanes)
    total = local(lanes)
    store(total, broadcast(const(0.0, "float32"), lanes), 0, lanes=lanes)
    with B.serial(int64(0), int64(vectors)) as i:
        more = add(i * int64(lanes), lanes, load(total, 0, lanes=lanes))
        store(total, more, 0, lanes=lanes)
    summed = local(1)
    store(summed, horizontal_sum(load(total, 0, lanes=lanes), lanes), 0)
    if tail:
        with B.serial(int64(0), int64(tail)) as i:
            store(summed, add(int64(vectors * lanes) + i, 1, load(summed, 0)), 0)
    return B.bind(load(summed, 0) * const(1.0 / size, "float32"))
