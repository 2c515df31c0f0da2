"""Phase 4: running sums, for which TVM has no code that a schedule could work on."""

from __future__ import annotations

from typing import Any

from gqsa_compiler._tvm import relax, te, tirx
from gqsa_compiler.errors import CompileError


def running_sum(builder: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    """Lower ``relax.cumsum`` to sums over all of the axis, what comes later left out.

    The work is the square of the axis' length, on vector units: for the positions of a text, which
    is what modules sum up so, next to nothing.

    Raises
    ------
    CompileError
        The sum is over all axes at once.
    """
    if call.attrs.axis is None:
        raise CompileError("A running sum over all axes of a tensor is not compiled; name one.")
    x = call.args[0]
    place = int(call.attrs.axis) % len(x.ty.shape)
    dtype, strict = call.ty.dtype, bool(call.attrs.exclusive)

    def compute(x: Any) -> Any:
        def element(*indices: Any) -> Any:
            here = indices[place]
            before = tirx.LT(step.var, here) if strict else tirx.LE(step.var, here)
            at = (*indices[:place], step, *indices[place + 1 :])
            value = tirx.Select(before, x[at].astype(dtype), tirx.const(0, dtype))
            return te.sum(value, axis=step)

        step = te.reduce_axis((0, x.shape[place]), "step")
        return te.compute(x.shape, element, name="running_sum")

    return builder.call_te(compute, x, primfunc_name_hint="running_sum")
