from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from gqsa_compiler.checkpoint import from_dense, to_dense
from gqsa_compiler.export.onnx_graph import complete_model, layer_tensors
from gqsa_compiler.frontends.onnx import sparse_op
from gqsa_compiler.frontends.onnx.graph import import_onnx


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_body_decodes_the_layer_and_the_import_gives_it_back(
    bits: int, symmetric: bool
) -> None:
    rng = np.random.default_rng(bits)
    weight = rng.standard_normal((21, 64)).astype(np.float32)
    keep = rng.random((21, 4)) < 0.6
    keep[[0, 3, 20]] = False  # empty rows: first, last and between
    layer = from_dense("a.b", weight, 16, keep, symmetric=symmetric, bits=bits)
    tensors = [numpy_helper.from_array(a, name) for name, a in layer_tensors(layer).items()]
    graph = helper.make_graph(
        [sparse_op.node(layer, "x", "y")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 3, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", 3, 21])],
        tensors,
    )
    model = complete_model(graph, [layer], "test 1")
    onnx.checker.check_model(model, full_check=True)
    x = rng.standard_normal((2, 3, 64)).astype(np.float32)
    (result,) = ReferenceEvaluator(model).run(None, {"x": x})
    np.testing.assert_array_equal(result, x @ to_dense(layer).T)
    (parameter,) = import_onnx(model).parameters
    back = parameter.layer
    assert back is not None
    assert (back.name, back.bits, back.group_size) == ("a.b", bits, 16)
    for part in ("indptr", "indices", "qweight", "scales"):
        np.testing.assert_array_equal(getattr(back, part), getattr(layer, part))
    assert (back.qzeros is None) == symmetric
    np.testing.assert_array_equal(to_dense(back), to_dense(layer))


def test_other_operators_of_the_domain_are_none_of_ours() -> None:
    assert sparse_op.parse_op("BSRLinear4") == (4, False)
    assert sparse_op.parse_op("BSRLinear3Symmetric") == (3, True)
    assert sparse_op.parse_op("BSRLinear5") is None
    assert sparse_op.parse_op("Linear") is None
