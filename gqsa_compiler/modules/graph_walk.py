"""Run an ONNX graph piece by piece, as it is and as it is compressed so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from gqsa_compiler.compress.solver.hessian import MomentAccumulator, Moments
from gqsa_compiler.errors import ModelError
from gqsa_compiler.frontends.onnx.evaluator import evaluator

Array = npt.NDArray[Any]
Values = dict[str, Array]


class GraphWalk:
    """A graph that runs on calibration inputs up to one layer after another, every node once.

    Two versions run side by side: the dense one, and the one in which `replace` has put compressed
    weights. Only what later nodes read is kept in between.

    Parameters
    ----------
    graph : ModelProto
        With nodes in an order in which they can run, without subgraphs.
    calibration : sequence of mappings
        Inputs by name, a call each.
    """

    def __init__(self, graph: ModelProto, calibration: Sequence[Mapping[str, Array]]) -> None:
        self._graph = graph
        self._constants = {tensor.name: tensor for tensor in graph.graph.initializer}
        self._dense = list(graph.graph.node)
        self._compressed = list(graph.graph.node)
        self._names = {name for node in self._dense for name in (*node.input, *node.output)}
        self._position = 0
        # Before the first replacement both versions are one.
        self._replaced = False
        self._values: list[tuple[Values, Values]] = []
        for feeds in calibration:
            values = {name: np.asarray(value) for name, value in feeds.items()}
            self._values.append((values, dict(values)))

    def moments(self, places: Sequence[tuple[int, str]]) -> Moments:
        """Run up to a layer and return the moments of what it multiplies.

        Parameters
        ----------
        places : sequence of (int, str)
            The layer's nodes, by their index in the graph and in its order, with the names of what
            they multiply, float32 [..., K]. No node may be before those of an earlier call.

        Returns
        -------
        Moments
            Of the compressed version's values, with the drift from the dense one's.

        Raises
        ------
        ModelError
            The graph cannot run on the inputs, or gives values that are not finite.
        """
        accumulator = MomentAccumulator()
        for node, name in places:
            self._run_to(node)
            for dense, compressed in self._values:
                x, d = (
                    torch.from_numpy(np.ascontiguousarray(values[name], np.float32))
                    for values in (compressed, dense)
                )
                accumulator.add(x, dense=d)
        return accumulator.finish(places[0][1])

    def replace(self, node: int, weight: Array) -> None:
        """Give a ``MatMul`` or ``Gemm`` that has not run yet another weight, float32 [N, K]."""
        assert node >= self._position, "the node has run"
        before = self._dense[node]
        name = f"{before.output[0]}.compressed"
        while name in self._names:
            name += "_"
        self._constants[name] = numpy_helper.from_array(np.ascontiguousarray(weight.T), name)
        after = NodeProto()
        after.CopyFrom(before)
        after.input[1] = name
        kept = [item for item in after.attribute if item.name != "transB"]
        del after.attribute[:]
        after.attribute.extend(kept)
        self._compressed[node] = after
        self._replaced = True

    def _run_to(self, stop: int) -> None:
        if stop <= self._position:
            return
        later = {name for node in self._dense[stop:] for name in node.input}
        part = slice(self._position, stop)
        dense = self._piece(self._dense[part], later)
        compressed = self._piece(self._compressed[part], later) if self._replaced else None
        for index, (values, changed) in enumerate(self._values):
            left = _run(dense, values, later)
            right = dict(left) if compressed is None else _run(compressed, changed, later)
            self._values[index] = left, right
        self._position = stop

    def _piece(self, nodes: Sequence[NodeProto], later: set[str]) -> ModelProto:
        """Make a model of some nodes: its outputs are what later nodes read."""
        made = {name for node in nodes for name in node.output if name}
        read = {name for node in nodes for name in node.input if name}
        model = ModelProto()
        model.CopyFrom(self._empty())
        graph = model.graph
        graph.node.extend(nodes)
        constants = read & self._constants.keys()
        graph.initializer.extend(self._constants[name] for name in sorted(constants))
        info = helper.make_tensor_value_info
        inputs = sorted(read - made - constants)
        graph.input.extend(info(name, TensorProto.UNDEFINED, None) for name in inputs)
        graph.output.extend(
            info(name, TensorProto.UNDEFINED, None) for name in sorted(made & later)
        )
        return model

    def _empty(self) -> ModelProto:
        model = ModelProto(ir_version=self._graph.ir_version)
        model.opset_import.extend(self._graph.opset_import)
        model.functions.extend(self._graph.functions)
        model.graph.name = "piece"
        return model


def _run(model: ModelProto, values: Values, later: set[str]) -> Values:
    """Run a piece; returns all values that are read after it."""
    names = [item.name for item in model.graph.output]
    feeds = {item.name: values[item.name] for item in model.graph.input}
    try:
        results = evaluator(model).run(None, feeds) if names else []
    except Exception as error:  # the evaluator has no errors of its own
        raise ModelError(f"The graph cannot run on the calibration inputs: {error}.") from error
    kept = {name: value for name, value in values.items() if name in later}
    return kept | dict(zip(names, results, strict=True))
