"""Phase 2: an RMSNorm that only linear layers read moves into their kernels."""

from __future__ import annotations

from dataclasses import replace

from gqsa_compiler._tvm import relax, tvm
from gqsa_compiler.passes.linear_op import LinearCall
from gqsa_compiler.passes.rewriter import Expr, Graph, is_call, key, rewrite_pass


def FuseNorm() -> tvm.transform.Pass:
    """``linear(rms_norm(x, w))``: the kernel normalises its input on the way in.

    After folding nearly every norm has one reader. With several, each recomputes the norm (K
    numbers a token), which is cheaper than writing it out; any other reader prevents the fusion.
    """
    return rewrite_pass("FuseNorm", _rule)


def _rule(graph: Graph, _var: relax.Var, call: relax.Call) -> Expr | None:
    linear = LinearCall.parse(call)
    if linear is None or linear.norm is not None:
        return None
    norm = graph.value(linear.x)
    if not is_call(norm, "relax.nn.rms_norm"):
        return None
    if [int(axis) for axis in norm.attrs.axes] not in ([-1], [1]):
        return None
    if not all(_only_as_input(user, linear.x) for user in graph.users(linear.x)):
        return None
    spec = replace(linear.spec, norm_eps=float(norm.attrs.epsilon))
    return replace(linear, spec=spec, x=norm.args[0], norm=norm.args[1]).emit()


def _only_as_input(user: Expr, x: Expr) -> bool:
    linear = LinearCall.parse(user)
    if linear is None or key(linear.x) != key(x):
        return False
    return linear.residual is None or key(linear.residual) != key(x)
