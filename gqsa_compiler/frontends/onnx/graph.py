"""An ONNX graph as one Relax function over the sizes of its inputs.

TVM's own importer (0.27) loses shapes on the way: it reads neither export of MiniLM that PyTorch
makes (docs/modules.md). This one computes sizes as expressions of the inputs' sizes and refuses a
graph whose shapes depend on values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx import AttributeProto, ModelProto, NodeProto, ValueInfoProto, helper, numpy_helper

from gqsa_compiler._tvm import end_block, relax, tvm
from gqsa_compiler.errors import GqsaError, ModelError, UsageError
from gqsa_compiler.frontends.onnx import convolutions, elementwise, layers, sizes, tensors
from gqsa_compiler.frontends.onnx.elementwise import tensor_dtype
from gqsa_compiler.frontends.onnx.evaluator import fold
from gqsa_compiler.frontends.onnx.file import load_model, opset, read_tensor
from gqsa_compiler.frontends.onnx.importer import Builder, GraphParameter
from gqsa_compiler.frontends.onnx.sparse_op import DOMAIN
from gqsa_compiler.frontends.onnx.values import Array, Node, Sizes, Value

FUNCTION = "main"
MAX_SIZE = 4096
"""Largest value of a size that varies, unless another is given."""

Op = Callable[[Builder, Node], Value]

OPERATORS: Mapping[tuple[str, str], Op] = {
    **{("", name): elementwise.unary for name in elementwise.UNARY},
    **{("", name): elementwise.binary for name in elementwise.BINARY},
    **{("", name): elementwise.variadic for name in elementwise.VARIADIC},
    ("", "ArgMax"): layers.argmax,
    ("", "AveragePool"): convolutions.pool,
    ("", "BatchNormalization"): layers.batch_norm,
    ("", "Cast"): elementwise.cast,
    ("", "Clip"): elementwise.clip,
    ("", "Concat"): tensors.concat,
    ("", "ConstantOfShape"): tensors.constant_of_shape,
    ("", "Conv"): convolutions.convolution,
    ("", "CumSum"): layers.cumsum,
    ("", "DequantizeLinear"): elementwise.dequantize,
    ("", "Div"): elementwise.divide,
    ("", "Dropout"): elementwise.dropout,
    ("", "Elu"): elementwise.elu,
    ("", "Expand"): tensors.expand,
    ("", "Flatten"): tensors.flatten,
    ("", "Gather"): tensors.gather,
    ("", "GatherElements"): tensors.gather_elements,
    ("", "GatherND"): tensors.gather_nd,
    ("", "Gelu"): elementwise.gelu,
    ("", "Gemm"): layers.gemm,
    ("", "GlobalAveragePool"): convolutions.global_pool,
    ("", "HardSigmoid"): elementwise.hard_sigmoid,
    ("", "IsInf"): elementwise.is_infinite,
    ("", "LayerNormalization"): layers.layer_norm,
    ("", "LeakyRelu"): elementwise.leaky_relu,
    ("", "LogSoftmax"): layers.softmax,
    ("", "MatMul"): layers.matmul,
    ("", "MaxPool"): convolutions.pool,
    ("", "Mod"): elementwise.modulo,
    ("", "Pad"): tensors.pad,
    ("", "Pow"): elementwise.power,
    ("", "QuantizeLinear"): elementwise.quantize,
    ("", "RMSNormalization"): layers.rms_norm,
    ("", "Range"): tensors.range_,
    **{
        ("", f"Reduce{name}"): layers.reduce
        for name in ("Sum", "Mean", "Max", "Min", "Prod", "L2", "SumSquare")
    },
    ("", "Reshape"): tensors.reshape,
    ("", "Shape"): tensors.shape,
    ("", "Size"): tensors.size,
    ("", "Slice"): tensors.slice_,
    ("", "Softmax"): layers.softmax,
    ("", "Split"): tensors.split,
    ("", "Squeeze"): tensors.squeeze,
    ("", "Swish"): elementwise.swish,
    ("", "Tile"): tensors.tile,
    ("", "Transpose"): tensors.transpose,
    ("", "Trilu"): tensors.trilu,
    ("", "Unsqueeze"): tensors.unsqueeze,
    ("", "Where"): elementwise.where,
    ("com.microsoft", "Gelu"): elementwise.gelu,
    ("com.microsoft", "MatMulNBits"): layers.matmul_nbits,
    ("com.microsoft", "SimplifiedLayerNormalization"): layers.rms_norm,
    ("", "SimplifiedLayerNormalization"): layers.rms_norm,
}


@dataclass(frozen=True)
class GraphTensor:
    """An input or output.

    Parameters
    ----------
    name : str
    dtype : str
    shape : tuple
        Each size an int, or the name of a size that varies; other expressions as text (outputs).
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, eq=False)
class ImportedGraph:
    """A graph as Relax.

    Parameters
    ----------
    mod : tvm.IRModule
        One function, `FUNCTION`, with the attribute ``num_input``; parameters follow the inputs.
    inputs, outputs : tuple of GraphTensor
    parameters : tuple of GraphParameter
        In the function's order.
    bounds : dict of str to (int, int)
        Smallest and largest value of each size that varies.
    fixed : dict of str to int
        Sizes that vary in the file and not here.
    dense : tuple of (str, str)
        Layers of another quantiser that had to be decoded, and why.
    """

    mod: Any
    inputs: tuple[GraphTensor, ...]
    outputs: tuple[GraphTensor, ...]
    parameters: tuple[GraphParameter, ...]
    bounds: dict[str, tuple[int, int]]
    fixed: dict[str, int]
    dense: tuple[tuple[str, str], ...]


def import_onnx(
    source: str | Path | ModelProto,
    directory: Path | None = None,
    *,
    shapes: Mapping[str, int | tuple[int, int]] | None = None,
) -> ImportedGraph:
    """Import an ONNX model.

    Parameters
    ----------
    source : path or ModelProto
    directory : Path, optional
        Where external data of a ModelProto lie.
    shapes : mapping, optional
        For sizes that vary, by name: a value to fix it at, or the smallest and largest one. All
        others go from 1 to `MAX_SIZE`. A size without a name is called ``<input>_<axis>``.

    Raises
    ------
    UsageError
        There is no such size, or its bounds are impossible.
    ModelError
        The file cannot be read, or has an operator that is not supported.
    """
    if isinstance(source, ModelProto):
        model, folder = source, directory or Path()
    else:
        model, folder = load_model(source), Path(source).resolve().parent
    return _Import(model, folder, dict(shapes or {})).run()


class _Import:
    def __init__(
        self, model: ModelProto, folder: Path, shapes: dict[str, int | tuple[int, int]]
    ) -> None:
        self.model, self.folder, self.version = model, folder, opset(model)
        initial = {tensor.name for tensor in model.graph.initializer}
        self.given = [item for item in model.graph.input if item.name not in initial]
        if not self.given:
            raise ModelError("The ONNX graph has no inputs; there is nothing to run.")
        self.fixed: dict[str, int] = {}
        self.called: dict[str | tuple[str, int], str] = {}
        self.builder = Builder(relax.BlockBuilder(), self._bounds(shapes))
        self.values: dict[str, Value] = {"": None}
        self.turned: dict[int, tuple[str, Array]] = {}

    def _bounds(self, shapes: dict[str, int | tuple[int, int]]) -> dict[str, tuple[int, int]]:
        names = {size for item in self.given for size in self._sizes(item) if isinstance(size, str)}
        unknown = sorted(shapes.keys() - names)
        if unknown:
            raise UsageError(
                f"The model has no size {unknown[0]!r} that varies; it has "
                f"{', '.join(sorted(names)) or 'none'}."
            )
        bounds = {}
        for name in sorted(names):
            given = shapes.get(name, (1, MAX_SIZE))
            low, high = (given, given) if isinstance(given, int) else given
            if not 0 < low <= high < 1 << 31:
                raise UsageError(f"Size {name!r} cannot go from {low} to {high}.")
            if low == high:
                self.fixed[name] = low
            else:
                bounds[name] = (low, high)
        return bounds

    def run(self) -> ImportedGraph:
        """Walk through the graph."""
        graph, builder = self.model.graph, self.builder
        inputs = [self._input(item) for item in self.given]
        for tensor in graph.initializer:
            self.values[tensor.name] = read_tensor(tensor, self.folder)
        if graph.sparse_initializer:
            raise ModelError("ONNX sparse initializers are not supported.")
        block = builder.block
        with block.function(FUNCTION, attrs={"num_input": len(inputs)}):
            try:
                with block.dataflow():
                    for number, proto in enumerate(graph.node):
                        self._node(proto, number)
                    outputs = [self._output(item.name) for item in graph.output]
            except BaseException:
                end_block(block)
                raise
            whole = outputs[0] if len(outputs) == 1 else relax.Tuple(outputs)
            parameters = tuple(builder.parameters.values())
            block.emit_func_output(whole, [*inputs, *(item.var for item in parameters)])
        module = relax.transform.DeadCodeElimination()(block.get())
        pairs = list(zip(self.given, inputs, strict=True))
        return ImportedGraph(
            module,
            tuple(self._described(item.name, var) for item, var in pairs),
            tuple(
                self._described(item.name, var)
                for item, var in zip(graph.output, outputs, strict=True)
            ),
            parameters,
            dict(builder.bounds),
            dict(self.fixed),
            tuple(builder.dense),
        )

    def _input(self, item: ValueInfoProto) -> Any:
        dims = [
            self.fixed.get(size) or self.builder.dim(size) if isinstance(size, str) else size
            for size in self._sizes(item)
        ]
        where = f"ONNX input {item.name!r}"
        dtype = tensor_dtype(item.type.tensor_type.elem_type, where)
        if dtype == "bfloat16":
            raise ModelError(f"{where} is bfloat16, which numpy has no arrays of; cast it inside.")
        if item.name in self.values:
            raise ModelError(f"{where} is listed twice, or has no name.")
        var = relax.Var(_plain(item.name), relax.TensorType(dims, dtype))
        self.values[item.name] = var
        return var

    def _output(self, name: str) -> Any:
        """Emit an output."""
        where = f"ONNX output {name!r}"
        with _told(where):
            value = self.builder.expr(self._value(name, "the outputs"), name)
            result = self.builder.block.emit_output(value)
        if self.builder.dtype(result) == "bfloat16":
            raise ModelError(f"{where} is bfloat16, which numpy has no arrays of; cast it inside.")
        return result

    def _described(self, name: str, var: Any) -> GraphTensor:
        shape = tuple(
            size if isinstance(size, int) else str(size) for size in self.builder.shape(var)
        )
        return GraphTensor(name, self.builder.dtype(var), shape)

    def _value(self, name: str, reader: str) -> Value:
        if name not in self.values:
            raise ModelError(f"The ONNX graph has no value {name!r}, which {reader} read.")
        return self.values[name]

    def _node(self, proto: NodeProto, number: int) -> None:
        # protobuf gives bytes for what is no UTF-8
        if not str(proto.op_type).isidentifier():
            raise ModelError(f"ONNX node {number} names the operator {proto.op_type!r}.")
        name = proto.name or f"{proto.op_type}_{number}"
        domain = "" if proto.domain == "ai.onnx" else proto.domain
        inputs = tuple(self._value(item, f"node {name!r}") for item in proto.input)
        names = tuple(map(self._origin, proto.input, inputs))
        with _told(f"ONNX node {name!r} ({proto.op_type})"):
            attributes = {item.name: _attribute(item, name) for item in proto.attribute}
            node = Node(name, proto.op_type, inputs, names, attributes, len(proto.output))
            result = self._compute(node, domain, proto)
        results = result if isinstance(result, tuple) else (result,)
        for output, value in zip(proto.output, results, strict=False):
            if not output:
                continue
            if output in self.values:
                raise ModelError(f"{node.where} computes {output!r}, which is there already.")
            self.values[output] = value
            if node.op == "Transpose" and isinstance(value, np.ndarray):
                self.turned[id(value)] = (names[0], value)

    def _origin(self, name: str, value: Value) -> str:
        """Return the initializer's name for one that was only transposed."""
        known = self.turned.get(id(value))
        return name if known is None else known[0]

    def _compute(self, node: Node, domain: str, proto: NodeProto) -> Value:
        if domain == "" and node.op == "Constant":
            return _constant(node)
        if domain == DOMAIN:
            return layers.bsr_linear(self.builder, node)
        function = OPERATORS.get((domain, node.op))
        constant = all(value is None or isinstance(value, np.ndarray) for value in node.inputs)
        if domain == "" and constant and node.inputs and node.outputs == 1:
            if node.op == "Transpose":
                return np.transpose(np.asanyarray(node.inputs[0]), node.attributes.get("perm"))
            arrays = dict(zip(proto.input, node.inputs, strict=True))
            return fold(proto, node.where, arrays, self.version)
        if domain == "":
            known = sizes.compute(self.builder, node)
            if known is not None:
                return known
        if function is None:
            raise ModelError(
                f"{node.where}: the operator {domain + '::' if domain else ''}{node.op} is not "
                "supported (docs/modules.md lists those that are)."
            )
        return function(self.builder, node)

    def _sizes(self, item: ValueInfoProto) -> list[int | str]:
        """List an input's sizes; one that varies by its name."""
        if not item.type.HasField("tensor_type") or not item.type.tensor_type.HasField("shape"):
            raise ModelError(f"ONNX input {item.name!r} is no tensor of known rank.")
        found: list[int | str] = []
        for axis, dim in enumerate(item.type.tensor_type.shape.dim):
            if dim.HasField("dim_value"):
                if dim.dim_value < 1:
                    raise ModelError(f"ONNX input {item.name!r} has a size of {dim.dim_value}.")
                found.append(int(dim.dim_value))
            else:
                found.append(self._size_name(dim.dim_param or (item.name, axis)))
        return found

    def _size_name(self, said: str | tuple[str, int]) -> str:
        """Name a size: as the file does, or after an input and its axis; apart from all others."""
        if said not in self.called:
            name = _plain(said if isinstance(said, str) else f"{said[0]}_{said[1]}")
            while name in self.called.values():
                name += "_"
            self.called[said] = name
        return self.called[said]


@contextmanager
def _told(where: str) -> Iterator[None]:
    """Say where in the graph it was that TVM, numpy or onnx refused something."""
    try:
        yield
    except GqsaError:
        raise
    except (
        tvm.error.InternalError, AssertionError, ArithmeticError, AttributeError, LookupError,
        MemoryError, RuntimeError, TypeError, ValueError,
    ) as error:  # fmt: skip
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[-1].rstrip(".")[:200] if lines else type(error).__name__
        lacks = "it lacks " if isinstance(error, KeyError) else ""
        raise ModelError(f"{where} cannot be imported: {lacks}{reason}.") from error


def _plain(name: str) -> str:
    """Make a name of letters, digits and underscores."""
    plain = "".join(c if c.isalnum() and c.isascii() else "_" for c in name)
    return plain if plain[:1].isalpha() else f"v_{plain}"


def _attribute(item: AttributeProto, node: str) -> Any:
    value = helper.get_attribute_value(item)
    if item.type == AttributeProto.TENSOR:
        return numpy_helper.to_array(value)
    if item.type == AttributeProto.STRING:
        return value.decode("utf-8", "replace")
    if item.type in (AttributeProto.INTS, AttributeProto.FLOATS):
        return list(value)
    if item.type in (AttributeProto.INT, AttributeProto.FLOAT):
        return value
    raise ModelError(
        f"ONNX node {node!r}: its attribute {item.name!r} is of a kind (a graph, strings) that is "
        "not supported."
    )


def _constant(node: Node) -> Array:
    kinds = {"value_int": np.int64, "value_ints": np.int64, "value_float": np.float32,
             "value_floats": np.float32}  # fmt: skip
    for key, dtype in kinds.items():
        if key in node.attributes:
            return np.array(node.attributes[key], dtype)
    value = node.attributes.get("value")
    if not isinstance(value, np.ndarray):
        raise ModelError(f"{node.where}: a constant of this kind is not supported.")
    return value


__all__: Sequence[str] = [
    "FUNCTION",
    "MAX_SIZE",
    "GraphTensor",
    "ImportedGraph",
    "Sizes",
    "import_onnx",
]
