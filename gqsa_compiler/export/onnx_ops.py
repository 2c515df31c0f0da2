"""Relax operators as ONNX nodes: what `torch.export` of a module comes to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from gqsa_compiler._tvm import relax, tirx
from gqsa_compiler.errors import ModelError
from gqsa_compiler.export.onnx_graph import Call, GraphWriter, Rule, onnx_dtype
from gqsa_compiler.export.onnx_images import IMAGES

UNARY: Mapping[str, str] = {
    "abs": "Abs", "ceil": "Ceil", "cos": "Cos", "erf": "Erf", "exp": "Exp", "floor": "Floor",
    "isnan": "IsNaN", "log": "Log", "logical_not": "Not", "negative": "Neg", "round": "Round",
    "sigmoid": "Sigmoid", "sign": "Sign", "sin": "Sin", "sqrt": "Sqrt", "tanh": "Tanh",
    "nn.gelu": "Gelu", "nn.relu": "Relu",
}  # fmt: skip
BINARY: Mapping[str, str] = {
    "add": "Add", "divide": "Div", "equal": "Equal", "greater": "Greater",
    "greater_equal": "GreaterOrEqual", "less": "Less", "less_equal": "LessOrEqual",
    "logical_and": "And", "logical_or": "Or", "logical_xor": "Xor", "matmul": "MatMul",
    "maximum": "Max", "minimum": "Min", "multiply": "Mul", "power": "Pow", "subtract": "Sub",
    "floor_mod": "Mod",
}  # fmt: skip
_REDUCTIONS: Mapping[str, str] = {
    "max": "ReduceMax", "mean": "ReduceMean", "min": "ReduceMin", "prod": "ReduceProd",
    "sum": "ReduceSum",
}  # fmt: skip


def _plain(op: str, **attributes: Any) -> Rule:
    def rule(graph: GraphWriter, _call: Call, inputs: list[str], to: str) -> None:
        graph.add(op, *inputs, to=to, **attributes)

    return rule


def _logic(op: str) -> Rule:
    """A bitwise operator, which ONNX keeps apart for booleans."""

    def rule(graph: GraphWriter, call: Call, inputs: list[str], to: str) -> None:
        boolean = str(call.args[0].ty.dtype) == "bool"
        graph.add(op if boolean else f"Bitwise{op}", *inputs, to=to)

    return rule


def _not_equal(graph: GraphWriter, _call: Call, inputs: list[str], to: str) -> None:
    graph.add("Not", graph.add("Equal", *inputs), to=to)


def _rsqrt(graph: GraphWriter, _call: Call, inputs: list[str], to: str) -> None:
    graph.add("Reciprocal", graph.add("Sqrt", *inputs), to=to)


def _square(graph: GraphWriter, _call: Call, inputs: list[str], to: str) -> None:
    graph.add("Mul", inputs[0], inputs[0], to=to)


def _silu(graph: GraphWriter, _call: Call, inputs: list[str], to: str) -> None:
    graph.add("Mul", inputs[0], graph.add("Sigmoid", inputs[0]), to=to)


def _astype(graph: GraphWriter, call: Call, inputs: list[str], to: str) -> None:
    graph.cast(inputs[0], onnx_dtype(str(call.ty.dtype)), to)


def _shaped(op: str) -> Rule:
    """Reshape or Expand to the shape of the result."""

    def rule(graph: GraphWriter, call: Call, inputs: list[str], to: str) -> None:
        graph.add(op, inputs[0], graph.sizes(call.ty.shape), to=to)

    return rule


def _permute(graph: GraphWriter, call: Call, inputs: list[str], to: str) -> None:
    rank = len(call.ty.shape)
    axes = call.attrs.axes
    order = list(range(rank))[::-1] if axes is None else [int(axis) % rank for axis in axes]
    graph.add("Transpose", inputs[0], to=to, perm=order)


def _concat(graph: GraphWriter, call: Call, inputs: list[str], to: str) -> None:
    graph.add("Concat", *inputs, to=to, axis=int(call.attrs.axis or 0))


def _take(graph: GraphWriter, call: Call, inputs: list[str], to: str) -> None:
    if call.attrs.axis is None:
        raise ModelError("A selection from a flattened tensor cannot be written as ONNX.")
    graph.add("Gather", *inputs, to=to, axis=int(call.attrs.axis))


def _gather_elements(graph: GraphWriter, call: Call, inputs: list[str], to: str) -> None:
    graph.add("GatherElements", *inputs, to=to, axis=int(call.attrs.axis))


def _index_tensor(graph: GraphWriter, call: Call, inputs: list[str], to: str) -> None:
    """Select by one array of places for each of the first axes, which broadcast."""
    places = list(call.args[1].fields)
    rank = len(call.ty.shape) - (len(call.args[0].ty.shape) - len(places))
    shape = graph.sizes(list(call.ty.shape)[:rank])
    last = graph.ints(-1)
    columns = [
        graph.add("Unsqueeze", graph.add("Expand", name, shape), last) for name in inputs[1:]
    ]
    graph.add("GatherND", inputs[0], graph.add("Concat", *columns, axis=-1), to=to)


def _strided_slice(graph: GraphWriter, call: Call, inputs: list[str], to: str) -> None:
    axes, begins, ends = (_values(argument) for argument in call.args[1:4])
    steps = _values(call.args[4]) if len(call.args) > 4 else [1] * len(axes)
    graph.add(
        "Slice",
        inputs[0],
        graph.sizes(begins),
        graph.sizes(ends),
        graph.sizes(axes),
        graph.sizes(steps),
        to=to,
    )


def _values(expr: Any) -> list[Any]:
    """List the integers of a tuple or shape of an operator's argument."""
    fields = expr.fields if isinstance(expr, relax.Tuple) else expr.values
    return [getattr(item, "value", item) if not _is_size(item) else item for item in fields]


def _is_size(item: Any) -> bool:
    return isinstance(item, (int, tirx.IntImm, tirx.Var))


def _arange(graph: GraphWriter, call: Call, _inputs: list[str], to: str) -> None:
    ends = []
    for argument in call.args[:3]:
        value = getattr(argument, "value", argument) if not _is_size(argument) else argument
        ends.append(graph.add("Squeeze", graph.size(value)))
    integers = graph.add("Range", *ends)
    graph.cast(integers, onnx_dtype(str(call.ty.dtype)), to)


def _full(graph: GraphWriter, call: Call, inputs: list[str], to: str) -> None:
    fill = inputs[-1]
    cast = graph.cast(fill, onnx_dtype(str(call.ty.dtype)))
    graph.add("Expand", cast, graph.sizes(call.ty.shape), to=to)


def _zeros(value: float) -> Rule:
    def rule(graph: GraphWriter, call: Call, _inputs: list[str], to: str) -> None:
        fill = graph.constant(np.array(value, str(call.ty.dtype)))
        graph.add("Expand", fill, graph.sizes(call.ty.shape), to=to)

    return rule


def _softmax(graph: GraphWriter, call: Call, inputs: list[str], to: str) -> None:
    graph.add("Softmax", inputs[0], to=to, axis=int(call.attrs.axis))


def _leaky_relu(graph: GraphWriter, call: Call, inputs: list[str], to: str) -> None:
    graph.add("LeakyRelu", inputs[0], to=to, alpha=float(call.attrs.alpha))


def _softplus(graph: GraphWriter, call: Call, inputs: list[str], to: str) -> None:
    """Where it is linear from the threshold on, it differs from ONNX's by rounding only."""
    if float(call.attrs.beta) != 1.0:
        raise ModelError("A softplus whose beta is not 1 cannot be written as ONNX.")
    graph.add("Softplus", inputs[0], to=to)


def _last_axis(call: Call, what: str) -> None:
    rank = len(call.args[0].ty.shape)
    if [int(axis) % rank for axis in call.attrs.axes] != [rank - 1]:
        raise ModelError(f"A {what} over other axes than the last cannot be written as ONNX.")


def _layer_norm(graph: GraphWriter, call: Call, inputs: list[str], to: str) -> None:
    _last_axis(call, "layer norm")
    graph.add("LayerNormalization", *inputs, to=to, axis=-1, epsilon=float(call.attrs.epsilon))


def _rms_norm(graph: GraphWriter, call: Call, inputs: list[str], to: str) -> None:
    _last_axis(call, "RMS norm")
    square = graph.add("Mul", inputs[0], inputs[0])
    mean = graph.add("ReduceMean", square, graph.ints(-1), keepdims=1)
    epsilon = graph.constant(np.float32(call.attrs.epsilon).reshape(()))
    factor = graph.add("Reciprocal", graph.add("Sqrt", graph.add("Add", mean, epsilon)))
    graph.add("Mul", graph.add("Mul", inputs[0], factor), inputs[1], to=to)


def _reduction(op: str) -> Rule:
    def rule(graph: GraphWriter, call: Call, inputs: list[str], to: str) -> None:
        axes = call.attrs.axis
        places = [] if axes is None else [graph.ints(*(int(axis) for axis in axes))]
        graph.add(op, inputs[0], *places, to=to, keepdims=int(bool(call.attrs.keepdims)))

    return rule


def _argmax(graph: GraphWriter, call: Call, inputs: list[str], to: str) -> None:
    keep = int(bool(call.attrs.keepdims))
    graph.add("ArgMax", inputs[0], to=to, axis=int(call.attrs.axis), keepdims=keep)


def _cumsum(graph: GraphWriter, call: Call, inputs: list[str], to: str) -> None:
    axis = graph.constant(np.array(int(call.attrs.axis), np.int64))
    graph.add("CumSum", inputs[0], axis, to=to)


def _triangle(upper: int) -> Rule:
    def rule(graph: GraphWriter, call: Call, inputs: list[str], to: str) -> None:
        k = getattr(call.args[1], "value", call.args[1]) if len(call.args) > 1 else 0
        diagonal = graph.constant(np.array(int(k), np.int64))
        graph.add("Trilu", inputs[0], diagonal, to=to, upper=upper)

    return rule


def _clip(graph: GraphWriter, call: Call, inputs: list[str], to: str) -> None:
    """Between two numbers; infinities stand for no bound, and say so in ONNX too."""
    dtype = str(call.ty.dtype)
    ends = [float(getattr(argument, "value", argument)) for argument in call.args[1:3]]
    whole = "float" not in dtype  # integers have no infinities: the bound is left out
    bounds = [
        "" if whole and np.isinf(end) else graph.constant(np.array(end, dtype)) for end in ends
    ]
    graph.add("Clip", inputs[0], *bounds, to=to)


def _repeat(graph: GraphWriter, call: Call, inputs: list[str], to: str) -> None:
    """Repeat each slice of an axis: a new axis beside it, broadcast and joined."""
    axis, times = int(call.attrs.axis), int(call.attrs.repeats)
    shape = list(call.args[0].ty.shape)
    wide = graph.add("Unsqueeze", inputs[0], graph.ints(axis + 1))
    new = [*shape[: axis + 1], times, *shape[axis + 1 :]]
    graph.add(
        "Reshape", graph.add("Expand", wide, graph.sizes(new)), graph.sizes(call.ty.shape), to=to
    )


RULES: Mapping[str, Rule] = {
    **IMAGES,
    **{name: _plain(op) for name, op in UNARY.items()},
    **{name: _plain(op) for name, op in BINARY.items()},
    **{name: _reduction(op) for name, op in _REDUCTIONS.items()},
    "arange": _arange,
    "argmax": _argmax,
    "astype": _astype,
    "bitwise_and": _logic("And"),
    "bitwise_or": _logic("Or"),
    "broadcast_to": _shaped("Expand"),
    "clip": _clip,
    "concat": _concat,
    "cumsum": _cumsum,
    "expand_dims": _shaped("Reshape"),
    "flatten": _shaped("Reshape"),
    "full": _full,
    "full_like": _full,
    "gather_elements": _gather_elements,
    "index_tensor": _index_tensor,
    "nn.gelu_tanh": _plain("Gelu", approximate="tanh"),
    "nn.layer_norm": _layer_norm,
    "nn.leakyrelu": _leaky_relu,
    "nn.rms_norm": _rms_norm,
    "nn.silu": _silu,
    "nn.softmax": _softmax,
    "nn.softplus": _softplus,
    "not_equal": _not_equal,
    "mod": _plain("Mod", fmod=1),
    "ones": _zeros(1),
    "ones_like": _zeros(1),
    "permute_dims": _permute,
    "repeat": _repeat,
    "reshape": _shaped("Reshape"),
    "rsqrt": _rsqrt,
    "square": _square,
    "squeeze": _shaped("Reshape"),
    "strided_slice": _strided_slice,
    "take": _take,
    "tril": _triangle(0),
    "triu": _triangle(1),
    "where": _plain("Where"),
    "zeros": _zeros(0),
    "zeros_like": _zeros(0),
}
"""By Relax's names without ``relax.``; each writes a node whose output is `to`."""
