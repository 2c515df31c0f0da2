"""Compress an ONNX graph in one shot: its products by constant matrices become sparse layers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper, version_converter
from onnx.reference import ReferenceEvaluator

from gqsa_compiler.checkpoint import BSRLayer
from gqsa_compiler.compress.recipes.recipe import Recipe
from gqsa_compiler.compress.request import PathText
from gqsa_compiler.compress.solver.hessian import MomentAccumulator, Moments
from gqsa_compiler.compress.solver.oneshot import compress_rows
from gqsa_compiler.compress.store import producer, to_layer
from gqsa_compiler.errors import ModelError, UsageError
from gqsa_compiler.export.onnx_graph import complete_model, layer_tensors
from gqsa_compiler.frontends.onnx import sparse_op
from gqsa_compiler.frontends.onnx.file import load_model, opset, read_tensor
from gqsa_compiler.frontends.onnx.graph import import_onnx
from gqsa_compiler.frontends.onnx.layers import layer_name
from gqsa_compiler.modules.result import DenseLayer, ModuleReport
from gqsa_compiler.modules.solve import (
    ON_PURPOSE,
    bits_per_weight,
    layer_report,
    misfit,
    module_recipe,
)
from gqsa_compiler.modules.write import quantization_of, write_checkpoint
from gqsa_compiler.outdir import check_output
from gqsa_compiler.progress import Progress

Array = npt.NDArray[Any]
_MOST_BYTES = 1 << 29
"""Second moments held at once; a graph with more runs several times."""


@dataclass(frozen=True, eq=False)
class _Linear:
    """A product by a constant matrix: the node, its input and its weight [N, K]."""

    node: NodeProto
    name: str
    x: str
    weight: Array


def compress_onnx(
    model: str | Path,
    recipe: PathText | Recipe,
    output: str | Path,
    *,
    calibration: Sequence[Mapping[str, Array]],
    shapes: Mapping[str, int | tuple[int, int]] | None = None,
    ignore: Sequence[str] = (),
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ModuleReport:
    """Compress every ``MatMul`` and ``Gemm`` by a constant matrix that the groups fit.

    The graph runs in onnx's own evaluator, so that no other runtime is needed; each layer is
    compressed on what it gets in the dense graph. All other nodes stay as they are.

    Parameters
    ----------
    model : path
        An ONNX file.
    recipe, ignore, overwrite, progress
        As for `compress_module`; layers are called by their weight's name.
    output : path
        The module checkpoint to make.
    calibration : sequence of mappings
        Inputs by name, a call each.
    shapes : mapping, optional
        Bounds of sizes that vary, as `ModuleOptions.shapes`; they become the checkpoint's.

    Returns
    -------
    ModuleReport

    Raises
    ------
    UsageError
        The recipe does not exist or is not for modules, the output exists, or there are no inputs.
    ModelError
        The graph cannot be read or run, cannot be compiled, or no layer fits.
    """
    began = time.monotonic()
    chosen = module_recipe(recipe)
    path = Path(model)
    check_output(output, overwrite, protect=(path,))
    if not calibration:
        raise UsageError("There are no calibration inputs; give at least one.")
    say = progress or (lambda _stage, _done, _total: None)
    graph = load_model(path)
    # What cannot be compiled later is refused before the work.
    imported = import_onnx(graph, path.resolve().parent, shapes=shapes)
    for tensor in graph.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(_array(tensor, path), tensor.name))
    graph = _recent(graph)
    dense: dict[str, str] = {}
    wanted = []
    for linear in _linears(graph):
        reason = misfit(linear.name, linear.weight.shape[1], chosen, ignore)
        if reason is None:
            wanted.append(linear)
        else:
            dense[linear.name] = reason
    if not wanted:
        raise ModelError(f"{path} has no linear layer that groups of {chosen.group_size} fit.")
    layers: dict[str, BSRLayer] = {}
    for done, (linear, moments) in enumerate(_moments(graph, wanted, calibration)):
        say("compressing layers", done, len(wanted))
        weight = torch.from_numpy(np.ascontiguousarray(linear.weight, np.float32))
        (found,) = compress_rows([weight], moments, [chosen.target], chosen, [linear.name])
        layers[linear.name] = to_layer(linear.name, found)
    say("compressing layers", len(wanted), len(wanted))
    written = _rewrite(graph, wanted, layers)
    sparse = list(layers.values())
    on_purpose = [name for name, reason in dense.items() if reason == ON_PURPOSE]
    quantization = quantization_of(sparse, chosen.sparsity, chosen.balance, sorted(on_purpose))
    write_checkpoint(
        output, written, sparse, quantization, imported.bounds, name=path.stem, overwrite=overwrite
    )
    return ModuleReport(
        module=path.name,
        recipe=chosen.name,
        output=str(output),
        layers=tuple(layer_report(layer) for layer in sparse),
        dense=tuple(DenseLayer(*item) for item in sorted(dense.items())),
        bits_per_weight=bits_per_weight(sparse),
        seconds=time.monotonic() - began,
    )


def _recent(graph: ModelProto) -> ModelProto:
    """Convert a graph to operators that our own layers' bodies can stand beside."""
    if opset(graph) >= sparse_op.OLDEST_OPSET:
        return graph
    try:
        return version_converter.convert_version(graph, sparse_op.OLDEST_OPSET)
    except Exception as error:  # the converter, in C++, has no errors of its own
        raise ModelError(
            f"The graph's operator set {opset(graph)} cannot be converted to "
            f"{sparse_op.OLDEST_OPSET}: {error}."
        ) from error


def _array(tensor: TensorProto, path: Path) -> Array:
    return np.array(read_tensor(tensor, path.resolve().parent), order="C")


def _linears(graph: ModelProto) -> Iterator[_Linear]:
    """List products by a constant matrix, or by one that is transposed; each weight once."""
    arrays = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in graph.graph.initializer
        if len(tensor.dims) == 2 and tensor.data_type == TensorProto.FLOAT
    }
    turned = {
        node.output[0]: node.input[0]
        for node in graph.graph.node
        if node.op_type == "Transpose" and node.input[0] in arrays
    }
    seen: set[str] = set()
    for node in graph.graph.node:
        if node.domain not in ("", "ai.onnx") or node.op_type not in ("MatMul", "Gemm"):
            continue
        said = {item.name: helper.get_attribute_value(item) for item in node.attribute}
        plain = said.get("alpha", 1.0) == 1.0 and said.get("beta", 1.0) == 1.0
        if not plain or said.get("transA", 0):
            continue
        source, flip = node.input[1], not said.get("transB", 0)
        if source in turned:
            source, flip = turned[source], not flip
        if source not in arrays:
            continue
        name = layer_name(source)
        if name in seen:
            continue  # a weight that several nodes share is left dense in the others
        seen.add(name)
        weight = arrays[source]
        yield _Linear(node, name, node.input[0], weight.T if flip else weight)


def _moments(
    graph: ModelProto, linears: Sequence[_Linear], calibration: Sequence[Mapping[str, Array]]
) -> Iterator[tuple[_Linear, Moments]]:
    """Yield every layer with the moments of its inputs, running the graph as often as needed."""
    start = 0
    while start < len(linears):
        stop, size = start, 0
        while stop < len(linears):
            size += 8 * linears[stop].weight.shape[1] ** 2
            if size > _MOST_BYTES and stop > start:
                break
            stop += 1
        part = linears[start:stop]
        names = list(dict.fromkeys(linear.x for linear in part))
        found = {name: MomentAccumulator() for name in names}
        evaluator = _evaluator(graph, names)
        for feeds in calibration:
            try:
                results = evaluator.run(None, dict(feeds))
            except Exception as error:  # the evaluator has no errors of its own
                raise ModelError(f"The graph cannot run on the calibration inputs: {error}.") from (
                    error
                )
            for name, result in zip(names, results, strict=True):
                found[name].add(torch.from_numpy(np.ascontiguousarray(result, np.float32)))
        done = {name: accumulator.finish(name) for name, accumulator in found.items()}
        for linear in part:
            yield linear, done[linear.x]
        start = stop


def _evaluator(graph: ModelProto, names: Sequence[str]) -> ReferenceEvaluator:
    model = ModelProto()
    model.CopyFrom(graph)
    del model.graph.output[:]
    model.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names
    )
    return ReferenceEvaluator(model)


def _rewrite(
    graph: ModelProto, linears: Sequence[_Linear], layers: Mapping[str, BSRLayer]
) -> ModelProto:
    """Put the compressed layers in the place of their nodes, and drop what nobody reads then."""
    places = {linear.node.output[0]: linear for linear in linears}
    nodes: list[NodeProto] = []
    for node in graph.graph.node:
        linear = places.get(node.output[0])
        if linear is None:
            nodes.append(node)
            continue
        bias = node.input[2] if len(node.input) > 2 else ""
        target = f"{node.output[0]}_product" if bias else node.output[0]
        nodes.append(sparse_op.node(layers[linear.name], linear.x, target))
        if bias:
            nodes.append(
                helper.make_node("Add", [target, bias], [node.output[0]], f"{linear.name}.add")
            )
    read = {name for node in nodes for name in node.input}
    read |= {item.name for item in graph.graph.output}
    nodes = [node for node in nodes if node.op_type != "Transpose" or set(node.output) & read]
    read = {name for node in nodes for name in node.input}
    read |= {item.name for item in graph.graph.output}
    kept = [tensor for tensor in graph.graph.initializer if tensor.name in read]
    for layer in layers.values():
        kept += [numpy_helper.from_array(a, name) for name, a in layer_tensors(layer).items()]
    inputs = [item for item in graph.graph.input if item.name not in {t.name for t in kept}]
    new = helper.make_graph(nodes, graph.graph.name, inputs, list(graph.graph.output), kept)
    others = [item for item in graph.opset_import if item.domain not in ("", "ai.onnx")]
    model = complete_model(new, list(layers.values()), producer(), opset(graph))
    known = {item.domain for item in model.opset_import}
    model.opset_import.extend(item for item in others if item.domain not in known)
    return model
