"""Phase 2: what follows a linear layer moves into its kernel: bias, activation, residual."""

from __future__ import annotations

from dataclasses import replace

from gqsa_compiler._tvm import relax, structural_equal, tvm
from gqsa_compiler.passes.linear_op import LinearCall
from gqsa_compiler.passes.rewriter import Expr, Graph, is_call, key, rewrite_pass
from gqsa_compiler.schedules.spec import Activation

ACTIVATIONS: dict[str, Activation] = {
    "relax.nn.silu": "silu",
    "relax.nn.gelu": "gelu",
    "relax.nn.gelu_tanh": "gelu_tanh",
    "relax.nn.relu": "relu",
}


def activation_of(expr: Expr) -> Activation | None:
    """Return our name of the activation that `expr` calls."""
    for op, name in ACTIVATIONS.items():
        if is_call(expr, op):
            return name
    return None


def _read_once(graph: Graph, expr: Expr) -> LinearCall | None:
    if not isinstance(expr, relax.Var) or graph.uses(expr) != 1:
        return None
    return LinearCall.parse(graph.value(expr))


def FuseBias() -> tvm.transform.Pass:
    """Fuse ``linear(x) + b`` with b a [N] parameter."""
    return rewrite_pass("FuseBias", _bias)


def _bias(graph: Graph, _var: relax.Var, call: relax.Call) -> Expr | None:
    if not is_call(call, "relax.add"):
        return None
    for value, other in ((call.args[0], call.args[1]), (call.args[1], call.args[0])):
        linear = _read_once(graph, value)
        record = graph.record(other)
        if linear is None or record is None or tuple(record.shape) != (linear.spec.n,):
            continue
        if linear.spec.epilogue == type(linear.spec.epilogue)():
            return replace(linear, spec=linear.with_epilogue(bias=True), biases=(other,)).emit()
    return None


def FuseActivation() -> tvm.transform.Pass:
    """Fuse ``act(linear(x))``."""
    return rewrite_pass("FuseActivation", _activation)


def _activation(graph: Graph, _var: relax.Var, call: relax.Call) -> Expr | None:
    activation = activation_of(call)
    if activation is None:
        return None
    linear = _read_once(graph, call.args[0])
    if linear is None:
        return None
    epilogue = linear.spec.epilogue
    if epilogue.activation is not None or epilogue.residual:
        return None
    return replace(linear, spec=linear.with_epilogue(activation=activation)).emit()


def FuseResidual() -> tvm.transform.Pass:
    """Fuse ``linear(x) + r`` with r of the output's shape."""
    return rewrite_pass("FuseResidual", _residual)


def _residual(graph: Graph, var: relax.Var, call: relax.Call) -> Expr | None:
    if not is_call(call, "relax.add"):
        return None
    for value, other in ((call.args[0], call.args[1]), (call.args[1], call.args[0])):
        linear = _read_once(graph, value)
        if linear is None or linear.spec.epilogue.residual or not isinstance(other, relax.Var):
            continue
        if key(value) != key(other) and structural_equal(other.ty, var.ty):
            return replace(linear, spec=linear.with_epilogue(residual=True), residual=other).emit()
    return None
