"""Small ONNX graphs for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

Shape = Sequence[int | str]


def model(
    nodes: Sequence[NodeProto],
    inputs: Mapping[str, tuple[int, Shape]],
    outputs: Mapping[str, Shape | None],
    arrays: Mapping[str, Any] | None = None,
    *,
    opset: int = 20,
    domains: Sequence[str] = (),
    dtypes: Mapping[str, int] | None = None,
) -> ModelProto:
    """Make a model of nodes; outputs are float32 unless `dtypes` says otherwise."""
    kinds = dtypes or {}
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info(n, kind, list(s)) for n, (kind, s) in inputs.items()],
        [
            helper.make_tensor_value_info(n, kinds.get(n, TensorProto.FLOAT), shape)
            for n, shape in outputs.items()
        ],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in (arrays or {}).items()],
    )
    versions = [helper.make_opsetid("", opset)]
    versions += [helper.make_opsetid(domain, 1) for domain in domains]
    return helper.make_model(graph, opset_imports=versions, ir_version=10)


def node(op: str, inputs: str, outputs: str, **attributes: Any) -> NodeProto:
    """Make a node; names are given with blanks between them, `-` leaves an input out."""
    names = ["" if name == "-" else name for name in inputs.split()]
    return helper.make_node(op, names, outputs.split(), name=f"{op}_{outputs}", **attributes)
