"""What onnx's reference evaluator gets wrong is right here."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from onnx import TensorProto, helper

from gqsa_compiler.frontends.onnx.evaluator import evaluator


@pytest.mark.parametrize(
    ("axis", "data", "chosen"),
    [
        (1, (1, 512), (1, 64)),  # numpy.choose, which onnx uses, takes 64 choices
        (0, (70, 3), (5, 3)),
        (-1, (4, 6), (2, 9)),  # indices that cover less of the other axis
    ],
)
def test_gather_elements(axis: int, data: tuple[int, ...], chosen: tuple[int, ...]) -> None:
    node = helper.make_node("GatherElements", ["x", "i"], ["y"], axis=axis)
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node],
        "gather",
        [info("x", TensorProto.FLOAT, data), info("i", TensorProto.INT64, chosen)],
        [info("y", TensorProto.FLOAT, chosen)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    rng = np.random.default_rng(0)
    x = rng.standard_normal(data).astype(np.float32)
    indices = rng.integers(-data[axis], data[axis], chosen)
    (found,) = evaluator(model).run(None, {"x": x, "i": indices})
    expected = np.empty(chosen, np.float32)
    for place in np.ndindex(chosen):
        source = list(place)
        source[axis] = indices[place]
        expected[place] = x[tuple(source)]
    assert_array_equal(found, expected)
