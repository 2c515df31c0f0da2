"""A Relax function with its weights, some of them compressed, as an ONNX model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt
from onnx import ModelProto, helper

from gqsa_compiler._tvm import GenericConst, relax, tvm
from gqsa_compiler.checkpoint import BSRLayer
from gqsa_compiler.errors import ModelError
from gqsa_compiler.export.onnx_graph import GraphWriter, value_info
from gqsa_compiler.export.onnx_ops import RULES

FUNCTION = "main"


def relax_to_onnx(
    mod: Any,
    parameters: Mapping[str, npt.NDArray[Any]],
    layers: Mapping[str, BSRLayer],
    producer: str,
    *,
    sizes: Mapping[str, str] | None = None,
    outputs: tuple[str, ...] = (),
) -> tuple[ModelProto, tuple[BSRLayer, ...]]:
    """Write a function as an ONNX model.

    Parameters
    ----------
    mod : tvm.IRModule
        One function, `FUNCTION`, with the attribute ``num_input``.
    parameters : mapping of str to numpy.ndarray
        By name, in the order of the function's parameters after its inputs; those of `layers` are
        not looked at.
    layers : mapping of str to BSRLayer
        Compressed layers by their weight's name among `parameters`.
    producer : str
        Program and version.
    sizes : mapping, optional
        What sizes that vary are called in the file, by their name in the function.
    outputs : tuple of str, optional
        What outputs are called; ``output_0`` and so on unless given.

    Returns
    -------
    ModelProto, tuple of BSRLayer
        The model, all tensors inside, and the layers that it uses.

    Raises
    ------
    ModelError
        An operator has no counterpart, or a compressed weight is read in another way than by a
        linear layer.
    """
    func = mod[FUNCTION]
    graph = GraphWriter(layers)
    count = int(func.attrs["num_input"])
    names: dict[int, str] = {}
    inputs = []
    for var in func.params[:count]:
        name = str(var.name)
        names[_key(var)] = name
        graph.input_sizes(name, var.ty.shape)
        inputs.append(value_info(name, var.ty, sizes))
    writer = _Function(graph, names, parameters)
    weights = list(func.params)[count:]
    if len(weights) != len(parameters):
        raise ModelError(f"The function has {len(weights)} parameters, not {len(parameters)}.")
    writer.weights = {_key(v): n for v, n in zip(weights, parameters, strict=True)}
    result = writer.body(func)
    results = list(result.fields) if isinstance(result, relax.Tuple) else [result]
    described = []
    for number, expr in enumerate(results):
        name = outputs[number] if number < len(outputs) else f"output_{number}"
        graph.add("Identity", writer.value(expr), to=name)
        described.append(value_info(name, expr.ty, sizes))
    model = graph.model(inputs, described, producer)
    return model, tuple(graph.used.values())


class _Function:
    def __init__(
        self,
        graph: GraphWriter,
        names: dict[int, str],
        parameters: Mapping[str, npt.NDArray[Any]],
    ) -> None:
        self.graph, self.names, self.parameters = graph, names, parameters
        self.weights: dict[int, str] = {}
        self.bound: dict[int, Any] = {}

    def body(self, func: Any) -> Any:
        """Write all bindings; returns the expression of the results."""
        for block in func.body.blocks:
            for binding in block.bindings:
                self._bind(binding.var, binding.value)
        return self._resolve(func.body.body)

    def _resolve(self, expr: Any) -> Any:
        while isinstance(expr, relax.Var) and _key(expr) in self.bound:
            value = self.bound[_key(expr)]
            if not isinstance(value, (relax.Var, relax.Tuple)):
                break
            expr = value
        return expr

    def _bind(self, var: Any, value: Any) -> None:
        self.bound[_key(var)] = value
        if isinstance(value, relax.Var):
            if _key(value) in self.names:
                self.names[_key(var)] = self.names[_key(value)]
            return
        if isinstance(value, relax.Tuple) or self._turned(value) is not None:
            return  # written where it is used
        if isinstance(value, relax.TupleGetItem):
            source = _key(value.tuple_value)
            self.names[_key(var)] = f"{self.names[source]}_part{int(value.index)}"
            return
        if isinstance(value, GenericConst):
            self.names[_key(var)] = self.graph.constant(_array(value))
            return
        if not isinstance(value, relax.Call) or not isinstance(value.op, tvm.ir.Op):
            raise ModelError(f"{type(value).__name__} {value} cannot be written as ONNX.")
        name = self.graph.name(str(value.op.name).rpartition(".")[2])
        self._call(value, name)
        self.names[_key(var)] = name

    def _call(self, call: Any, name: str) -> None:
        kind = str(call.op.name).removeprefix("relax.")
        if kind == "matmul":
            weight = self._turned(self._value_of(call.args[1]))
            if weight is not None and weight in self.graph.layers:
                self.graph.linear(self.graph.layers[weight], self.value(call.args[0]), name)
                return
        if kind in ("nn.conv1d", "nn.conv2d"):
            filters = self.weights.get(_key(self._resolve(call.args[1])))
            if filters is not None and filters in self.graph.layers:
                self._patches(call, self.graph.layers[filters], name)
                return
        if kind == "split":
            self._split(call, name)
            return
        rule = RULES.get(kind)
        if rule is None:
            raise ModelError(f"The operator {kind} cannot be written as ONNX.")
        inputs: list[str] = []
        for argument in call.args:
            argument = self._resolve(argument)
            if isinstance(argument, relax.Tuple):
                tensors = [item for item in argument.fields if _is_tensor(item)]
                inputs += [self.value(item) for item in tensors]
            elif _is_tensor(argument):
                inputs.append(self.value(argument))
        try:
            rule(self.graph, call, inputs, name)
        except (TypeError, ValueError, ArithmeticError, AttributeError, LookupError) as error:
            raise ModelError(f"The operator {kind} cannot be written as ONNX: {error}.") from error

    def _patches(self, call: Any, layer: BSRLayer, name: str) -> None:
        """A convolution without overlap: patches become rows, and channels the last axis."""
        graph, x = self.graph, self.value(call.args[0])
        sizes, kernel = list(call.args[0].ty.shape), [int(item) for item in call.attrs.strides]
        rank, spatial = len(sizes), list(call.ty.shape)[2:]
        if set(kernel) == {1}:
            rows = graph.add("Transpose", x, perm=[0, *range(2, rank), 1])
        else:
            cut = [item for pair in zip(spatial, kernel, strict=True) for item in pair]
            wide = graph.add("Reshape", x, graph.sizes([*sizes[:2], *cut]))
            places = range(2, 2 + len(cut))
            turned = graph.add("Transpose", wide, perm=[0, *places[::2], 1, *places[1::2]])
            rows = graph.add("Reshape", turned, graph.sizes([sizes[0], *spatial, layer.shape[1]]))
        result = graph.name("patches")
        graph.linear(layer, rows, result)
        graph.add("Transpose", result, to=name, perm=[0, rank - 1, *range(1, rank - 1)])

    def _split(self, call: Any, name: str) -> None:
        """A split has several outputs, called after it."""
        parts = list(call.ty.fields)
        axis = int(call.attrs.axis) % len(parts[0].shape)
        lengths = self.graph.sizes([part.shape[axis] for part in parts])
        outputs = [f"{name}_part{number}" for number in range(len(parts))]
        node = helper.make_node(
            "Split", [self.value(call.args[0]), lengths], outputs, name, axis=axis
        )
        self.graph.nodes.append(node)

    def _value_of(self, expr: Any) -> Any:
        expr = self._resolve(expr)
        return self.bound.get(_key(expr), expr) if isinstance(expr, relax.Var) else expr

    def _turned(self, value: Any) -> str | None:
        """Return W's name for ``permute_dims(W)`` of a parameter that is a matrix."""
        if not isinstance(value, relax.Call) or not isinstance(value.op, tvm.ir.Op):
            return None
        if str(value.op.name) != "relax.permute_dims" or len(value.ty.shape) != 2:
            return None
        source = self._resolve(value.args[0])
        return self.weights.get(_key(source)) if isinstance(source, relax.Var) else None

    def value(self, expr: Any) -> str:
        """Return the name of a tensor; a parameter is added when it is first used."""
        expr = self._resolve(expr)
        if isinstance(expr, GenericConst):
            return self.graph.constant(_array(expr))
        known = self.names.get(_key(expr))
        if known is not None:
            return known
        turned = self._turned(self.bound.get(_key(expr)))
        if turned is not None:
            name = self.graph.add("Transpose", self._weight(turned), perm=[1, 0])
            self.names[_key(expr)] = name
            return name
        weight = self.weights.get(_key(expr))
        if weight is None:
            raise ModelError(f"{expr} is no tensor that can be written as ONNX.")
        return self._weight(weight)

    def _weight(self, name: str) -> str:
        if name in self.graph.layers:
            raise ModelError(
                f"Weight {name!r} is compressed, but the model reads it in another way than as a "
                "linear layer's weight; leave that layer out of the compression (`ignore`)."
            )
        self.graph.arrays[name] = self.parameters[name]
        return name


def _is_tensor(expr: Any) -> bool:
    return isinstance(getattr(expr, "ty", None), relax.TensorType)


def _array(constant: Any) -> npt.NDArray[Any]:
    return constant.value.numpy()


def _key(expr: Any) -> int:
    return int(expr.__chandle__())
