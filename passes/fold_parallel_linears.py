"""Phase 2: layers that read the same input become one kernel (q, k, v; gate and up)."""

from __future__ import annotations

from gqsa_compiler._tvm import relax, tvm
from gqsa_compiler.passes.fuse_epilogue import ACTIVATIONS, activation_of
from gqsa_compiler.passes.linear_op import LinearCall, stack
from gqsa_compiler.passes.rewriter import Expr, Graph, is_call, rewrite_pass


def FoldParallelLinears() -> tvm.transform.Pass:
    """Fold ``concat(linears of one x)`` and ``act(gate(x)) * up(x)``.

    A fold needs every intermediate result to be read once, so that nothing is computed twice.
    """
    return rewrite_pass("FoldParallelLinears", _rule)


def _rule(graph: Graph, _var: relax.Var, call: relax.Call) -> Expr | None:
    if is_call(call, "relax.concat"):
        return _fold_concat(graph, call)
    if is_call(call, "relax.multiply"):
        for gate, up in ((call.args[0], call.args[1]), (call.args[1], call.args[0])):
            folded = _fold_gated(graph, gate, up)
            if folded is not None:
                return folded
    return None


def _linear(graph: Graph, expr: Expr) -> LinearCall | None:
    """Return the linear that only this place reads."""
    if not isinstance(expr, relax.Var) or graph.uses(expr) != 1:
        return None
    return LinearCall.parse(graph.value(expr))


def _fold_concat(graph: Graph, call: relax.Call) -> Expr | None:
    parts = graph.value(call.args[0])
    axis = None if call.attrs.axis is None else int(call.attrs.axis)
    if not isinstance(parts, relax.Tuple) or axis not in (-1, 1):
        return None
    linears = [_linear(graph, part) for part in parts.fields]
    if len(linears) < 2 or any(linear is None for linear in linears):
        return None
    folded = stack([linear for linear in linears if linear is not None])
    return None if folded is None else folded.emit()


def _fold_gated(graph: Graph, gate: Expr, up: Expr) -> Expr | None:
    if not isinstance(gate, relax.Var) or graph.uses(gate) != 1:
        return None
    activation = activation_of(graph.value(gate))
    if activation is None or activation not in ACTIVATIONS.values():
        return None
    pair = (_linear(graph, graph.value(gate).args[0]), _linear(graph, up))
    if pair[0] is None or pair[1] is None or pair[0].spec.n != pair[1].spec.n:
        return None
    folded = stack([pair[0], pair[1]])
    if folded is None:
        return None
    spec = folded.with_epilogue(gated=True, activation=activation)
    return LinearCall(spec, folded.x, folded.weights, biases=folded.biases).emit()
