"""onnx's own evaluator, with what it gets wrong put right."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, helper, numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from gqsa_compiler.errors import ModelError, first_line

Array = np.ndarray
_MOST_BYTES = 1 << 28
"""Of a constant that is computed while a graph is imported, and of what it is computed from."""
_FEW = 1024
"""Integers of so few elements may be a shape: the size of a result may follow from them."""


class GatherElements(OpRun):
    """The operator for any size: that of onnx 1.23 goes wrong from 64 elements on an axis."""

    def _run(self, data: Array, indices: Array, axis: int = 0) -> tuple[Array]:
        axis %= data.ndim
        wrapped = np.where(indices < 0, indices + data.shape[axis], indices)
        # Indices may cover less of the other axes than the data does.
        sizes = enumerate(indices.shape)
        part = tuple(slice(None) if place == axis else slice(size) for place, size in sizes)
        return (np.take_along_axis(data[part], wrapped, axis),)


def evaluator(model: ModelProto) -> ReferenceEvaluator:
    """Return an evaluator of a model; nothing has to be installed for it besides onnx."""
    return ReferenceEvaluator(model, new_ops=[GatherElements])


def fold(node: NodeProto, where: str, arrays: Mapping[str, Array | None], opset: int) -> Array:
    """Compute an operator of constants.

    Parameters
    ----------
    node : NodeProto
        With one output.
    where : str
        What it is called in messages.
    arrays : mapping of str to ndarray
        Its inputs by name.
    opset : int
        Of the standard operators.

    Raises
    ------
    ModelError
        It cannot be computed, or takes or gives too much for that.
    """
    feeds = {name: np.asarray(array) for name, array in arrays.items() if name}
    if any(array.dtype.kind in "OSU" for array in feeds.values()):
        raise ModelError(f"{where}: texts are not supported.")
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node],
        "fold",
        [info(name, 0, None) for name in feeds],
        [info(node.output[0], 0, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    size = max(sum(array.nbytes for array in feeds.values()), _result_bytes(model, feeds))
    if size > _MOST_BYTES:
        raise ModelError(f"{where}: a constant of {size} bytes is too large to compute.")
    try:
        (result,) = evaluator(model).run(None, feeds)
    except Exception as error:  # whatever a damaged graph makes of the evaluator
        raise ModelError(f"{where} cannot be computed: {first_line(error)}.") from error
    return np.asarray(result)


def _result_bytes(model: ModelProto, feeds: Mapping[str, Array]) -> int:
    """Return the bytes that the one output will have; 0 where the inputs' sizes do not tell."""
    probe: Any = ModelProto()
    probe.CopyFrom(model)
    del probe.graph.input[:]
    for name, array in feeds.items():
        dtype = helper.np_dtype_to_tensor_dtype(array.dtype)
        probe.graph.input.append(helper.make_tensor_value_info(name, dtype, array.shape))
        if array.size <= _FEW:
            probe.graph.initializer.append(numpy_helper.from_array(array, name))
    try:
        found = shape_inference.infer_shapes(probe, data_prop=True).graph.output[0]
    except Exception:  # C++ that has no errors of its own; the evaluator will say what is wrong
        return 0
    kind = found.type.tensor_type
    sizes = [dim.dim_value for dim in kind.shape.dim]
    if not kind.HasField("shape") or not kind.elem_type:
        return 0
    itemsize = np.dtype(helper.tensor_dtype_to_np_dtype(kind.elem_type)).itemsize
    return math.prod(sizes, start=itemsize)
