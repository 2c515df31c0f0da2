"""A Relax function as an ONNX graph: the state of the translation, and what sizes become."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from gqsa_compiler._tvm import tirx
from gqsa_compiler.checkpoint import BSRLayer
from gqsa_compiler.errors import ModelError
from gqsa_compiler.frontends.onnx import sparse_op

IR_VERSION = 10
INLINE_BYTES = 1024
"""Tensors up to this size stay in the ONNX file when the others lie beside it."""

Call = Any  # relax.Call


@dataclass
class GraphWriter:
    """Nodes, initializers and names of an ONNX graph that is being written.

    Attributes
    ----------
    layers : mapping of str to BSRLayer
        Compressed layers, by the name of the weight that they stand for.
    arrays : dict of str to numpy.ndarray
        Initializers.
    used : dict of str to BSRLayer
        The layers that the graph has a node of.
    """

    layers: Mapping[str, BSRLayer]
    nodes: list[NodeProto] = field(default_factory=list)
    arrays: dict[str, npt.NDArray[Any]] = field(default_factory=dict)
    used: dict[str, BSRLayer] = field(default_factory=dict)
    _sizes: dict[str, str] = field(default_factory=dict)
    _known: dict[str, str] = field(default_factory=dict)
    _count: int = 0

    def name(self, hint: str) -> str:
        """Return a name that is not used yet."""
        self._count += 1
        return f"{hint}_{self._count}"

    def add(self, op: str, *inputs: str, to: str | None = None, **attributes: Any) -> str:
        """Add a node and return its output's name."""
        name = to or self.name(op.lower())
        self.nodes.append(helper.make_node(op, list(inputs), [name], name, **attributes))
        return name

    def cast(self, value: str, dtype: int, to: str | None = None) -> str:
        """Add a conversion to an ONNX dtype."""
        name = to or self.name("cast")
        self.nodes.append(helper.make_node("Cast", [value], [name], name, to=dtype))
        return name

    def constant(self, array: npt.NDArray[Any]) -> str:
        """Add an initializer without a name of its own, once for each content."""
        key = f"{array.dtype}{array.shape}{array.tobytes()!r}"
        if array.size > 64 or key not in self._known:
            name = self.name("constant")
            self.arrays[name] = array
            if array.size > 64:
                return name
            self._known[key] = name
        return self._known[key]

    def ints(self, *values: int) -> str:
        """Add an int64 vector."""
        return self.constant(np.array(values, np.int64))

    def input_sizes(self, name: str, shape: Any) -> None:
        """Learn the sizes that an input sets; its own nodes are written where they are used."""
        for axis, size in enumerate(shape):
            if isinstance(size, tirx.Var) and str(size.name) not in self._sizes:
                self._sizes[str(size.name)] = f"{name}:{axis}"

    def size(self, value: Any) -> str:
        """Return an int64 vector of one, for a size that is an expression of inputs' sizes.

        Raises
        ------
        ModelError
            The expression is of a kind that is not written.
        """
        if isinstance(value, (int, tirx.IntImm)):
            return self.ints(int(value))
        text = str(value)
        if text not in self._known:
            self._known[text] = self._size(value)
        return self._known[text]

    def _size(self, value: Any) -> str:
        if isinstance(value, tirx.Var):
            place = self._sizes.get(str(value.name))
            if place is None:
                raise ModelError(f"The size {value} is no size of an input.")
            name, _, axis = place.rpartition(":")
            return self.add("Shape", name, start=int(axis), end=int(axis) + 1)
        for kind, op in _ARITHMETIC:
            if isinstance(value, kind):
                return self.add(op, self.size(value.a), self.size(value.b))
        if isinstance(value, tirx.Cast):
            return self.size(value.value)
        raise ModelError(f"A size of the form {value} cannot be written as ONNX.")

    def sizes(self, shape: Any) -> str:
        """Return an int64 vector of sizes."""
        values = list(shape)
        if all(isinstance(value, (int, tirx.IntImm)) for value in values):
            return self.ints(*(int(value) for value in values))
        return self.add("Concat", *(self.size(value) for value in values), axis=0)

    def linear(self, layer: BSRLayer, x: str, to: str) -> None:
        """Add a compressed layer."""
        self.used[layer.name] = layer
        self.nodes.append(sparse_op.node(layer, x, to))
        self.arrays.update(layer_tensors(layer))

    def model(
        self, inputs: list[ValueInfoProto], outputs: list[ValueInfoProto], producer: str
    ) -> ModelProto:
        """Return the model, with all initializers inside."""
        tensors = [
            numpy_helper.from_array(np.array(a, order="C"), n) for n, a in self.arrays.items()
        ]
        graph = helper.make_graph(self.nodes, "main", inputs, outputs, tensors)
        return complete_model(graph, list(self.used.values()), producer)


_ARITHMETIC = (
    (tirx.Add, "Add"),
    (tirx.Sub, "Sub"),
    (tirx.Mul, "Mul"),
    (tirx.FloorDiv, "Div"),
    (tirx.Min, "Min"),
    (tirx.Max, "Max"),
)


def layer_tensors(layer: BSRLayer) -> dict[str, npt.NDArray[Any]]:
    """Return the tensors of a layer by the names that its node reads."""
    arrays: dict[str, Any] = {
        "indptr": layer.indptr,
        "indices": layer.indices,
        "qweight": layer.qweight,
        "scales": layer.scales,
        "qzeros": layer.qzeros,
        "shape": np.array(layer.shape, np.int64),
    }
    return {
        f"{layer.name}.{part}": np.asarray(arrays[part])
        for part in sparse_op.parts_of(layer.symmetric)
    }


def complete_model(
    graph: Any, layers: list[BSRLayer], producer: str, opset: int | None = None
) -> ModelProto:
    """Make a model of a graph, with the bodies of the operators of our own that it uses."""
    kinds = sorted({(layer.bits, layer.symmetric) for layer in layers})
    versions = [helper.make_opsetid("", opset or sparse_op.OPSET)]
    if kinds:
        versions.append(helper.make_opsetid(sparse_op.DOMAIN, sparse_op.VERSION))
    program, _, version = producer.partition(" ")
    model = helper.make_model(
        graph,
        opset_imports=versions,
        functions=[sparse_op.function(*kind, opset or sparse_op.OPSET) for kind in kinds],
        producer_name=program,
        producer_version=version,
        ir_version=IR_VERSION,
    )
    return model


def value_info(name: str, kind: Any, sizes: Mapping[str, str] | None = None) -> ValueInfoProto:
    """Describe an input or output; a size that varies by its name or as an expression."""
    shape = [
        int(size) if isinstance(size, tirx.IntImm) else (sizes or {}).get(str(size), str(size))
        for size in kind.shape
    ]
    return helper.make_tensor_value_info(name, onnx_dtype(str(kind.dtype)), shape)


def onnx_dtype(name: str) -> int:
    """Return ONNX's number of a dtype."""
    if name == "bfloat16":
        return int(TensorProto.BFLOAT16)
    return int(helper.np_dtype_to_tensor_dtype(np.dtype(re.sub("^bool$", "bool_", name))))


Rule = Callable[[GraphWriter, Call, list[str], str], None]
"""Writes nodes for a call: the graph, the call, its tensors' names, and its output's name."""
