"""Compress an ONNX graph in one shot: its products by constant matrices become sparse layers."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper, version_converter

from gqsa_compiler.checkpoint import BSRLayer
from gqsa_compiler.checkpoint.names import LAYER_TENSORS
from gqsa_compiler.compress.recipes.recipe import Recipe
from gqsa_compiler.compress.request import PathText
from gqsa_compiler.compress.solver.oneshot import check_not_lost, compress_rows
from gqsa_compiler.compress.store import producer, to_layer
from gqsa_compiler.errors import ModelError
from gqsa_compiler.export.onnx_graph import complete_model, layer_tensors
from gqsa_compiler.frontends.onnx import sparse_op
from gqsa_compiler.frontends.onnx.file import load_model, opset, read_tensor
from gqsa_compiler.frontends.onnx.graph import import_onnx
from gqsa_compiler.frontends.onnx.layers import layer_name
from gqsa_compiler.modules.graph_walk import GraphWalk
from gqsa_compiler.modules.inputs import check_inputs
from gqsa_compiler.modules.result import DenseLayer, ModuleReport
from gqsa_compiler.modules.solve import (
    ON_PURPOSE,
    SHARED,
    bits_per_weight,
    check_ignored,
    layer_report,
    misfit,
    module_recipe,
    nothing_compressed,
)
from gqsa_compiler.modules.write import quantization_of, write_checkpoint
from gqsa_compiler.outdir import check_output
from gqsa_compiler.progress import Progress

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class _Linear:
    """The products by one constant matrix: what each node multiplies, and the values [N, K].

    `reads` has a name by each node's index; `elsewhere` is true if the graph reads the matrix in
    another way too.
    """

    reads: Mapping[int, str]
    name: str
    weight: Array
    elsewhere: bool

    @property
    def places(self) -> list[tuple[int, str]]:
        """The first node that multiplies each value, in the graph's order."""
        first = {name: index for index, name in sorted(self.reads.items(), reverse=True)}
        return sorted((index, name) for name, index in first.items())


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
    compressed on what it gets from the compressed layers before it, towards what the dense graph
    gives there; a matrix that multiplies several values once, on all of them in the dense graph.
    All other nodes stay as they are.

    Parameters
    ----------
    model : path
        An ONNX file.
    recipe, ignore, overwrite, progress
        As for `compress_module`; layers are called by their weight's name.
    output : path
        The module checkpoint to make.
    calibration : sequence of mappings
        Inputs by name, a call each; `read_inputs` reads them from files.
    shapes : mapping, optional
        Bounds of sizes that vary, as `ModuleOptions.shapes`; they become the checkpoint's.

    Returns
    -------
    ModuleReport

    Raises
    ------
    UsageError
        The recipe does not exist or is not for modules, the output exists, or the inputs are not
        the graph's.
    ModelError
        The graph cannot be read or run, cannot be compiled, or no layer fits.
    """
    began = time.monotonic()
    chosen = module_recipe(recipe)
    path = Path(model)
    check_output(output, overwrite, protect=(path,))
    say = progress or (lambda _stage, _done, _total: None)
    graph = load_model(path)
    # What cannot be compiled later is refused before the work.
    imported = import_onnx(graph, path.resolve().parent, shapes=shapes)
    calls = check_inputs(imported.inputs, imported.bounds, calibration)
    for tensor in graph.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(_array(tensor, path), tensor.name))
    graph = _recent(graph)
    dense: dict[str, str] = {}
    wanted = []
    linears = _linears(graph)
    check_ignored(ignore, [linear.name for linear in linears])
    for linear in linears:
        reason = misfit(linear.name, linear.weight.shape[1], chosen, ignore)
        if reason is None and linear.elsewhere:
            reason = SHARED
        if reason is None:
            wanted.append(linear)
        else:
            dense[linear.name] = reason
    if not wanted:
        otherwise = "no MatMul or Gemm without factors multiplies by a constant float32 matrix"
        raise nothing_compressed(str(path), dense, otherwise)
    layers: dict[str, BSRLayer] = {}
    walk = GraphWalk(graph, calls)
    for members in _groups(wanted):
        say("compressing layers", len(layers), len(wanted))
        places = members[0].places
        # What reads several values is needed by the first of its nodes, before the others have
        # run: it is learnt from the dense graph.
        moments = (walk if len(places) == 1 else GraphWalk(graph, calls)).moments(places)
        weights = [torch.from_numpy(np.array(item.weight, np.float32)) for item in members]
        targets, names = [chosen.target] * len(members), [item.name for item in members]
        for name, weight in zip(names, weights, strict=True):
            check_not_lost(name, weight)
        results = compress_rows(weights, moments, targets, chosen, names)
        for linear, found in zip(members, results, strict=True):
            layers[linear.name] = to_layer(linear.name, found)
            for index in linear.reads:
                walk.replace(index, found.decode().numpy())
    say("compressing layers", len(wanted), len(wanted))
    written = _rewrite(graph, wanted, layers)
    sparse = list(layers.values())
    on_purpose = [name for name, reason in dense.items() if reason == ON_PURPOSE]
    quantization = quantization_of(sparse, chosen.sparsity, chosen.balance, sorted(on_purpose))
    sizes = imported.bounds | {name: (size, size) for name, size in imported.fixed.items()}
    write_checkpoint(
        output, written, sparse, quantization, sizes, name=path.stem, overwrite=overwrite
    )
    return ModuleReport(
        module=path.name,
        recipe=chosen.name,
        output=str(output),
        layers=tuple(layer_report(layer) for layer in sparse),
        dense=tuple(DenseLayer(*item) for item in sorted(dense.items())),
        shared={},
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


def _linears(graph: ModelProto) -> list[_Linear]:
    """List constant matrices that the graph multiplies by, some of them through a transposition."""
    arrays = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in graph.graph.initializer
        if len(tensor.dims) == 2 and all(tensor.dims) and tensor.data_type == TensorProto.FLOAT
    }
    constants = {tensor.name for tensor in graph.graph.initializer}
    turned = {
        node.output[0]: node.input[0]
        for node in graph.graph.node
        if node.op_type == "Transpose" and node.input[0] in arrays
    }
    # Matrix -> its products, by whether it is stored as [K, N] there.
    products: dict[str, dict[bool, dict[int, str]]] = {}
    elsewhere = {item.name for item in graph.graph.output}
    for index, node in enumerate(graph.graph.node):
        if node.output[0] in turned:
            continue
        # What multiplies constants is a constant too, and no layer.
        flip = None if node.input and node.input[0] in constants else _product(node)
        others = list(node.input)
        if flip is not None:
            source = others.pop(1)
            if source in turned:
                source, flip = turned[source], not flip
            if source in arrays:
                products.setdefault(source, {}).setdefault(flip, {})[index] = node.input[0]
        elsewhere.update(others)
    elsewhere |= {turned[name] for name in elsewhere & turned.keys()}
    found: list[_Linear] = []
    taken = _names(graph)
    for source, uses in products.items():
        flip, reads = next(iter(uses.items()))
        weight = arrays[source].T if flip else arrays[source]
        shared = source in elsewhere or len(uses) > 1
        name = _unused(layer_name(source), {item.name for item in found}, taken)
        found.append(_Linear(reads, name, weight, shared))
    return found


def _names(graph: ModelProto) -> set[str]:
    """Return the names of all values of a graph."""
    named = {item.name for items in (graph.graph.input, graph.graph.initializer) for item in items}
    return named.union(*(node.output for node in graph.graph.node))


def _unused(name: str, layers: Set[str], taken: Set[str]) -> str:
    """Name a layer apart from the other layers, and its tensors from the graph's values."""
    while name in layers or any(f"{name}.{part}" in taken for part in LAYER_TENSORS):
        name += "_"
    return name


def _product(node: NodeProto) -> bool | None:
    """Whether a product's second operand is [K, N]; None for nodes of another kind."""
    if node.domain not in ("", "ai.onnx") or node.op_type not in ("MatMul", "Gemm"):
        return None
    said = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    plain = said.get("alpha", 1.0) == 1.0 and said.get("beta", 1.0) == 1.0
    return not said.get("transB", 0) if plain and not said.get("transA", 0) else None


def _groups(linears: Sequence[_Linear]) -> list[list[_Linear]]:
    """Put together what multiplies the same values; in the order of the graph."""
    found: dict[tuple[str, ...], list[_Linear]] = {}
    for linear in sorted(linears, key=lambda linear: min(linear.reads)):
        found.setdefault(tuple(name for _, name in linear.places), []).append(linear)
    return list(found.values())


def _rewrite(
    graph: ModelProto, linears: Sequence[_Linear], layers: Mapping[str, BSRLayer]
) -> ModelProto:
    """Put the compressed layers in the place of their nodes, and drop what nobody reads then."""
    places = {index: linear for linear in linears for index in linear.reads}
    taken = _names(graph)
    nodes: list[NodeProto] = []
    for index, node in enumerate(graph.graph.node):
        linear = places.get(index)
        if linear is None:
            nodes.append(node)
            continue
        bias = node.input[2] if len(node.input) > 2 else ""
        target = f"{node.output[0]}_product" if bias else node.output[0]
        while bias and target in taken:
            target += "_"
        nodes.append(sparse_op.node(layers[linear.name], node.input[0], target))
        if bias:
            nodes.append(helper.make_node("Add", [target, bias], [node.output[0]], f"{target}.add"))
    read = {name for node in nodes for name in node.input}
    read |= {item.name for item in graph.graph.output}
    nodes = [node for node in nodes if node.op_type != "Transpose" or set(node.output) & read]
    read = {name for node in nodes for name in node.input}
    read |= {item.name for item in graph.graph.output}
    kept = [tensor for tensor in graph.graph.initializer if tensor.name in read]
    for layer in layers.values():
        kept += [numpy_helper.from_array(a, name) for name, a in layer_tensors(layer).items()]
    # Old exporters list what is constant among the inputs.
    constants = {tensor.name for tensor in graph.graph.initializer}
    inputs = [item for item in graph.graph.input if item.name not in constants]
    new = helper.make_graph(nodes, graph.graph.name, inputs, list(graph.graph.output), kept)
    others = [item for item in graph.opset_import if item.domain not in ("", "ai.onnx")]
    model = complete_model(new, list(layers.values()), producer(), opset(graph))
    known = {item.domain for item in model.opset_import}
    model.opset_import.extend(item for item in others if item.domain not in known)
    return model
