"""The frame around every generic linear kernel: its arguments, in the order that all share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gqsa_compiler.schedules.generic.emit import Buffer, Expr, argument, extent, scheduled
from gqsa_compiler.schedules.spec import LinearSpec, ParamSpec


@dataclass(frozen=True)
class Arguments:
    """The arguments of a kernel, in `ScheduleRule.build`'s order; None where the spec has none."""

    tokens: Expr
    x: Buffer
    norm: Buffer | None
    params: dict[str, Buffer]
    bias: Buffer | None
    residual: Buffer | None
    out: Buffer


def kernel(
    spec: LinearSpec,
    params: tuple[ParamSpec, ...],
    body: Callable[[Arguments], None],
    *,
    open_extents: frozenset[str] = frozenset(),
) -> Any:
    """Build a PrimFunc whose body is emitted by `body`.

    Parameters
    ----------
    open_extents : frozenset of str
        Names of one-dimensional parameters whose length differs between layers that share this
        function: each gets a symbolic extent, as do those whose length is not known.
    """
    tokens = extent("m")
    with scheduled() as builder:
        x = argument("x", (tokens, spec.k))
        norm = argument("norm", (spec.k,)) if spec.norm_eps is not None else None
        packed = {}
        for p in params:
            shape: tuple[Any, ...] = p.shape
            if p.name in open_extents or p.shape == (None,):
                shape = (extent(f"{p.name}_length"),)
            packed[p.name] = argument(p.name, shape, p.dtype)
        bias = argument("bias", (spec.n,)) if spec.epilogue.bias else None
        residual = None
        if spec.epilogue.residual:
            residual = argument("residual", (tokens, spec.n_out))
        out = argument("out", (tokens, spec.n_out))
        body(Arguments(tokens, x, norm, packed, bias, residual, out))
    return builder.get()
