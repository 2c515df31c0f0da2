"""A compressed layer as an ONNX node: operators of our own whose bodies are standard operators.

``ai.gqsa::BSRLinear<bits>(X, indptr, indices, qweight, scales, qzeros, shape) -> X @ W.T`` takes
the tensors of docs/format.md as they are. A file carries the bodies of the operators that it uses
(ONNX functions), so that a runtime which has never heard of them decodes the weights itself.
``BSRLinear<bits>Symmetric`` has no `qzeros`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from onnx import AttributeProto, FunctionProto, NodeProto, TensorProto, helper

from gqsa_compiler.checkpoint import BSRLayer, symmetric_zero
from gqsa_compiler.limits import BITS

DOMAIN = "ai.gqsa"
VERSION = 1
OPSET = 20
"""Standard operators of the graphs that we write."""
OLDEST_OPSET = 18
"""Standard operators that the bodies are written in."""
PARTS = ("indptr", "indices", "qweight", "scales", "qzeros", "shape")
"""The inputs after X, in order; `qzeros` is left out of a symmetric layer's."""


def op_name(bits: int, symmetric: bool) -> str:
    """Return the operator of layers of so many bits."""
    return f"BSRLinear{bits}{'Symmetric' if symmetric else ''}"


def parse_op(op_type: str) -> tuple[int, bool] | None:
    """Return bits and whether the layer is symmetric; None for another operator."""
    found = re.fullmatch(r"BSRLinear([0-9])(Symmetric)?", op_type)
    if found is None or int(found[1]) not in BITS:
        return None
    return int(found[1]), found[2] is not None


def parts_of(symmetric: bool) -> tuple[str, ...]:
    """List the inputs of a node after X."""
    return tuple(part for part in PARTS if not (symmetric and part == "qzeros"))


def node(layer: BSRLayer, x: str, y: str) -> NodeProto:
    """Return the node that computes a layer; its weights are called ``<layer>.<part>``."""
    return helper.make_node(
        op_name(layer.bits, layer.symmetric),
        [x, *(f"{layer.name}.{part}" for part in parts_of(layer.symmetric))],
        [y],
        name=layer.name,
        domain=DOMAIN,
        group_size=layer.group_size,
    )


class _Body:
    """A function's body that is being written; values are called v0, v1 and so on."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []

    def add(self, op: str, *inputs: str, to: str | None = None, **attributes: object) -> str:
        """Add a node and return its output's name."""
        name = to or f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], **attributes))
        return name

    def ints(self, *values: int) -> str:
        """Add a constant int64 vector."""
        return self.add("Constant", value_ints=list(values))

    def attribute(self, name: str) -> str:
        """Add the value of an attribute of the function, as an int64 vector of one."""
        self.nodes.append(helper.make_node("Constant", [], [f"a{len(self.nodes)}"]))
        reference = AttributeProto(name="value_int", ref_attr_name=name, type=AttributeProto.INT)
        self.nodes[-1].attribute.append(reference)
        return self.add("Reshape", self.nodes[-1].output[0], self.ints(1))

    def bytes(self, values: Sequence[int]) -> str:
        """Add a constant uint8 vector."""
        tensor = helper.make_tensor("bytes", TensorProto.UINT8, [len(values)], list(values))
        return self.add("Constant", value=tensor)

    def unpack(self, packed: str, bits: int) -> str:
        """Unpack a stream of codes, uint8 of any shape, to a float32 vector."""
        column = self.add("Unsqueeze", packed, self.ints(-1))
        width = 1 if bits == 3 else bits  # codes of 3 bits cross bytes: bit by bit
        shifts = self.bytes(range(0, 8, width))
        shifted = self.add("BitShift", column, shifts, direction="RIGHT")
        codes = self.add("BitwiseAnd", shifted, self.bytes([(1 << width) - 1]))
        values = self.cast(codes, TensorProto.FLOAT)
        if bits != 3:
            return self.add("Reshape", values, self.ints(-1))
        # The last bits of a stream may not fill a code.
        flat = self.add("Reshape", values, self.ints(-1))
        size = self.add("Shape", flat)
        whole = self.add("Mul", self.add("Div", size, self.ints(3)), self.ints(3))
        used = self.add("Slice", flat, self.ints(0), whole)
        rows = self.add("Reshape", used, self.ints(-1, 3))
        weights = self.add("Constant", value_floats=[1.0, 2.0, 4.0])
        return self.add("ReduceSum", self.add("Mul", rows, weights), self.ints(1), keepdims=0)

    def cast(self, value: str, dtype: int) -> str:
        """Add a conversion."""
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node("Cast", [value], [name], to=dtype))
        return name


def function(bits: int, symmetric: bool, opset: int = OPSET) -> FunctionProto:
    """Write the body of an operator in standard operators.

    ``W[r, indices[j] * G + i] = (code[j, i] - zero[j]) * scale[j]`` for the groups j of row r. The
    row of a group is the number of rows that end at or before it: a running sum of ones that are
    scattered to where rows begin.

    Parameters
    ----------
    bits : int
    symmetric : bool
    opset : int
        Of the model that the body stands in: both have to name the same.
    """
    body = _Body()
    size = body.attribute("group_size")
    count = body.add("Shape", "indices")  # nnz
    one = body.ints(1)
    begins = body.add("Slice", body.cast("indptr", TensorProto.INT64), one, body.ints(-1))
    zeros = body.add("Expand", body.ints(0), body.add("Add", count, one))
    ones = body.add("Expand", one, body.add("Shape", begins))
    marks = body.add("ScatterElements", zeros, begins, ones, axis=0, reduction="add")
    zero = body.add("Constant", value_int=0)
    rows = body.add("Slice", body.add("CumSum", marks, zero), body.ints(0), count)
    columns = body.add("Div", body.add("Slice", "shape", one, body.ints(2)), size)
    places = body.add(
        "Add", body.add("Mul", rows, columns), body.cast("indices", TensorProto.INT64)
    )
    codes = body.add(
        "Reshape", body.unpack("qweight", bits), body.add("Concat", count, size, axis=0)
    )
    if symmetric:
        points = body.add("Constant", value_float=float(symmetric_zero(bits)))
    else:
        stream = body.add("Slice", body.unpack("qzeros", bits), body.ints(0), count)
        points = body.add("Unsqueeze", stream, body.ints(-1))
    scales = body.add("Unsqueeze", body.cast("scales", TensorProto.FLOAT), body.ints(-1))
    values = body.add("Mul", body.add("Sub", codes, points), scales)
    height = body.add("Mul", body.add("Slice", "shape", body.ints(0), one), columns)
    nothing = body.add("Constant", value_floats=[0.0])
    empty = body.add("Expand", nothing, body.add("Concat", height, size, axis=0))
    index = body.add("Unsqueeze", places, body.ints(-1))
    weight = body.add("Reshape", body.add("ScatterND", empty, index, values), "shape")
    turned = body.add("Transpose", weight, perm=[1, 0])
    body.add("MatMul", "X", turned, to="Y")
    return helper.make_function(
        DOMAIN,
        op_name(bits, symmetric),
        ["X", *parts_of(symmetric)],
        ["Y"],
        body.nodes,
        [helper.make_opsetid("", opset)],
        attributes=["group_size"],
    )
