"""The piecewise run of a graph: both versions' values, and what they are kept for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from onnx import ModelProto, TensorProto, helper, numpy_helper

from gqsa_compiler.compress.solver.hessian import MomentAccumulator
from gqsa_compiler.errors import ModelError
from gqsa_compiler.modules.graph_walk import GraphWalk

RNG = np.random.default_rng(0)
FIRST, SECOND = (RNG.standard_normal(shape).astype(np.float32) for shape in ((8, 16), (16, 8)))
BIAS = RNG.standard_normal(8).astype(np.float32)
CALLS = [{"x": RNG.standard_normal((rows, 8)).astype(np.float32)} for rows in (5, 3)]


def _graph() -> ModelProto:
    """X W1 -> Relu -> Gemm W2^T + bias -> + x, whose result a third layer reads."""
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Gemm", ["b", "w2", "bias"], ["c"], transB=1),
        helper.make_node("Add", ["c", "x"], ["d"]),
        helper.make_node("MatMul", ["d", "w1"], ["y"]),
    ]
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "two",
        [info("x", TensorProto.FLOAT, ["n", 8])],
        [info("y", TensorProto.FLOAT, ["n", 16])],
        [
            numpy_helper.from_array(array, name)
            for name, array in (("w1", FIRST), ("w2", SECOND.T.copy()), ("bias", BIAS))
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


def _values(x: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    hidden: np.ndarray = np.maximum(x @ first, 0) @ second + BIAS + x
    return hidden


def test_moments_are_of_the_compressed_graph_and_drift_from_the_dense_one() -> None:
    walk = GraphWalk(_graph(), CALLS)
    assert walk.moments([(0, "x")]).drift is not None
    first, second = FIRST * 0.5, SECOND + 1
    walk.replace(0, first.T)
    walk.moments([(2, "b")])
    walk.replace(2, second.T)
    found = walk.moments([(4, "d")])
    wanted = MomentAccumulator()
    for call in CALLS:
        now, before = (_values(call["x"], *pair) for pair in ((first, second), (FIRST, SECOND)))
        wanted.add(torch.from_numpy(now), dense=torch.from_numpy(before))
    expected = wanted.finish("d")
    torch.testing.assert_close(found.hessian, expected.hessian, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.drift, expected.drift, rtol=1e-4, atol=1e-4)


def test_a_matrix_that_reads_two_values_learns_from_both() -> None:
    found = GraphWalk(_graph(), CALLS).moments([(0, "x"), (4, "d")])
    wanted = MomentAccumulator()
    for value in (lambda x: x, lambda x: _values(x, FIRST, SECOND)):
        for call in CALLS:
            x = torch.from_numpy(value(call["x"]))
            wanted.add(x, dense=x)
    torch.testing.assert_close(found.hessian, wanted.finish("x").hessian, rtol=1e-5, atol=1e-5)
    assert found.drift is not None
    assert_array_equal(found.drift, 0)


def test_only_what_is_read_later_is_kept() -> None:
    walk = GraphWalk(_graph(), CALLS)
    walk.moments([(4, "d")])
    assert all(set(values) == {"d"} for pair in walk._values for values in pair)


def test_inputs_that_the_graph_cannot_run_on_are_named() -> None:
    walk = GraphWalk(_graph(), [{"x": np.zeros((2, 7), np.float32)}])
    with pytest.raises(ModelError, match="cannot run on the calibration inputs"):
        walk.moments([(2, "b")])
