"""The state of an import: the Relax function that is being built, its parameters, known sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gqsa_compiler._tvm import Analyzer, relax, tirx, tvm
from gqsa_compiler.checkpoint import BSRLayer
from gqsa_compiler.errors import ModelError
from gqsa_compiler.frontends.onnx.values import Array, Dim, Expr, Node, Sizes, Value

INLINE = 16
"""Constants of at most so many elements are written into the function; others are parameters."""


@dataclass(frozen=True, eq=False)
class GraphParameter:
    """A tensor that the function takes after its inputs.

    Parameters
    ----------
    name : str
        Of the initializer; that of a linear layer's weight is ``<layer>.weight``.
    var : relax.Var
    array : numpy.ndarray or None
        None for a compressed layer.
    layer : BSRLayer or None
    """

    name: str
    var: Any
    array: Array | None = None
    layer: BSRLayer | None = None


@dataclass
class Builder:
    """Emits Relax, and remembers which tensors also exist as matrices of rows.

    A linear layer, a norm and everything that is computed value by value work on [m, K], with m
    the product of all leading sizes: that is what the kernels and their fusion know. The tensor
    in its own shape is a view of that matrix.

    Attributes
    ----------
    block : relax.BlockBuilder
    bounds : mapping of str to (int, int)
        Smallest and largest value of each symbolic size.
    parameters : dict of str to GraphParameter
    dense : list of (str, str)
        Layers that could not be taken as compressed ones, and why.
    """

    block: Any
    bounds: Mapping[str, tuple[int, int]]
    parameters: dict[str, GraphParameter] = field(default_factory=dict)
    dense: list[tuple[str, str]] = field(default_factory=list)
    _dims: dict[str, Any] = field(default_factory=dict)
    _rows: dict[int, Expr] = field(default_factory=dict)
    _analyzer: Any = field(default_factory=Analyzer)

    def dim(self, name: str) -> Dim:
        """Return the symbolic size of a name, the same for every use."""
        if name not in self._dims:
            low, high = self.bounds[name]
            variable = tirx.Var(name, "int64")
            self._analyzer.bind(variable, tvm.ir.Range(low, high + 1))
            self._dims[name] = variable
        return self._dims[name]

    def simple(self, value: Dim) -> Dim:
        """Simplify a size under the bounds; an int if it is one."""
        if isinstance(value, int):
            return value
        value = self._analyzer.simplify(value)
        return int(value) if isinstance(value, tirx.IntImm) else value

    def proves(self, condition: Any) -> bool:
        """Whether a condition on sizes always holds."""
        if isinstance(condition, (bool, np.bool_)):
            return bool(condition)
        return bool(self._analyzer.can_prove(condition))

    def equal(self, one: Dim, other: Dim) -> bool:
        """Whether two sizes are always the same."""
        if isinstance(one, int) and isinstance(other, int):
            return one == other
        return bool(self._analyzer.can_prove_equal(prim(one), prim(other)))

    def emit(self, expr: Expr, node: Node | None = None) -> Expr:
        """Bind an expression to a variable; its shape has to be known.

        Raises
        ------
        ModelError
            The shape cannot be inferred: sizes depend on values, or do not fit.
        """
        var = self.block.emit(expr)
        shape = getattr(var.ty, "shape", None)
        if isinstance(var.ty, relax.TensorType) and shape is None:
            where = "The graph" if node is None else node.where
            raise ModelError(
                f"{where}: the shape of its result is not known before it runs, or its inputs' "
                "shapes do not fit; only sizes of the inputs may vary."
            )
        return var

    def shape(self, value: Value) -> tuple[Dim, ...]:
        """Return the sizes of a tensor."""
        if isinstance(value, np.ndarray):
            return tuple(int(size) for size in value.shape)
        if isinstance(value, Sizes):
            return () if value.scalar else (len(value.items),)
        return tuple(
            int(size) if isinstance(size, tirx.IntImm) else size for size in value.ty.shape
        )

    def dtype(self, value: Value) -> str:
        """Return the dtype of a tensor."""
        if isinstance(value, np.ndarray):
            return str(value.dtype)
        return "int64" if isinstance(value, Sizes) else str(value.ty.dtype)

    def parameter(self, name: str, array: Array) -> Expr:
        """Return a parameter's variable, the same for the same array.

        A linear layer's weight is [N, K] here; where the graph also reads it as [K, N], that is
        another parameter, ``<name>.turned``.
        """
        known = self.parameters.get(name)
        while known is not None and not _equal(known.array, array):
            name = f"{name}.turned"
            known = self.parameters.get(name)
        if known is None:
            kind = relax.TensorType(array.shape, str(array.dtype))
            known = GraphParameter(name, relax.Var(_identifier(name), kind), array)
            self.parameters[name] = known
        return known.var

    def layer(self, layer: BSRLayer) -> Expr:
        """Return the variable of a compressed layer's weight, float32 [N, K]."""
        name = f"{layer.name}.weight"
        known = self.parameters.get(name)
        if known is None:
            var = relax.Var(_identifier(name), relax.TensorType(layer.shape, "float32"))
            known = GraphParameter(name, var, None, layer)
            self.parameters[name] = known
        return known.var

    def expr(self, value: Value, name: str) -> Expr:
        """Return a value as a Relax expression; `name` is what a large constant will be called."""
        if isinstance(value, np.ndarray):
            # The weights of an artefact are finite numbers; masks stay in the code.
            mask = value.dtype == bool or not np.isfinite(value.astype(np.float32)).all()
            if value.size > INLINE and not mask:
                return self.parameter(name, value)
            return relax.const(np.array(value, order="C"), str(value.dtype))
        if isinstance(value, Sizes):
            if all(isinstance(item, int) for item in value.items):
                items = np.array(value.items, np.int64)
                return relax.const(items[0] if value.scalar else items, "int64")
            parts = [self._range(prim(item)) for item in value.items]
            whole = parts[0] if len(parts) == 1 else self.emit(relax.op.concat(parts, axis=0))
            return self.emit(relax.op.reshape(whole, ())) if value.scalar else whole
        return value

    def _range(self, item: Dim) -> Expr:
        """Return a tensor of one symbolic integer."""
        return self.emit(
            relax.op.arange(
                relax.prim_value(item), relax.prim_value(item + 1), relax.prim_value(1), "int64"
            )
        )

    def fit(self, value: Expr, axes: Mapping[int, Dim]) -> Expr:
        """Return a tensor whose axes have certain sizes; the module stops where they have not.

        TVM takes sizes that it cannot compare for equal, and reads beyond the smaller tensor.
        """
        wanted = list(self.shape(value))
        for axis, size in axes.items():
            wanted[axis] = size
        if all(map(self.equal, self.shape(value), wanted)):
            return value
        # A mere name would be another name of the size that is there, and nothing checked.
        asked = [tirx.max(size, 1) if isinstance(size, tirx.Var) else size for size in wanted]
        cast = self.block.match_cast(value, relax.TensorType(asked, self.dtype(value)))
        return self.emit(relax.op.reshape(cast, relax.ShapeExpr(wanted)))

    def rows(self, value: Expr) -> Expr:
        """Return a tensor as a matrix [m, K] of its last axis."""
        shape = self.shape(value)
        if len(shape) == 2:
            return value
        known = self._rows.get(_key(value))
        if known is None:
            rows = self.simple(math.prod(shape[:-1], start=1))
            known = self.emit(relax.op.reshape(value, relax.ShapeExpr([rows, shape[-1]])))
            self._rows[_key(value)] = known
        return known

    def from_rows(self, matrix: Expr, leading: Sequence[Dim]) -> Expr:
        """Return a matrix [m, N] as a tensor [*leading, N]."""
        if len(leading) == 1:
            return matrix
        shape = relax.ShapeExpr([*leading, self.shape(matrix)[-1]])
        value = self.emit(relax.op.reshape(matrix, shape))
        self._rows[_key(value)] = matrix
        return value

    def linear(self, x: Expr, weight: Expr, bias: Expr | None = None) -> Expr:
        """Emit ``x @ weight.T + bias`` over the last axis of x, float32 in and out."""
        shape = self.shape(x)
        if len(shape) == 1:
            x, shape = self.emit(relax.op.reshape(x, (1, shape[0]))), (1, *shape)
            return self.emit(relax.op.reshape(self.linear(x, weight, bias), (-1,)))
        columns = self.shape(weight)[1]
        if not isinstance(shape[-1], int):
            x = self.fit(x, {-1: columns})
        turned = self.emit(relax.op.permute_dims(weight, [1, 0]))
        result = self.emit(relax.op.matmul(self.rows(x), turned, out_dtype="float32"))
        if bias is not None:
            result = self.emit(relax.op.add(result, bias))
        return self.from_rows(result, shape[:-1])

    def elementwise(self, function: Callable[..., Expr], node: Node, *values: Expr) -> Expr:
        """Emit a function of values at one place, on rows where all operands allow it."""
        shapes = [self.shape(value) for value in values]
        largest = max(shapes, key=len)
        full = [len(shape) > 2 and self._same(shape, largest) for shape in shapes]
        known = [
            is_full and _key(value) in self._rows
            for value, is_full in zip(values, full, strict=True)
        ]
        if not any(known) or not all(map(self._follows, shapes, full, [largest[-1]] * len(full))):
            return self.emit(function(*values), node)
        operands = [
            self.rows(value) if is_full else self._flat(value)
            for value, is_full in zip(values, full, strict=True)
        ]
        return self.from_rows(self.emit(function(*operands), node), largest[:-1])

    def _follows(self, shape: Sequence[Dim], is_full: bool, columns: Dim) -> bool:
        """Whether an operand can be used with a matrix of rows: full, a vector, or one value."""
        if is_full:
            return True
        fixed = all(isinstance(size, int) for size in shape)
        return fixed and (math.prod(shape, start=1) == 1 or tuple(shape) == (columns,))

    def _flat(self, value: Expr) -> Expr:
        """Return a constant of size 1, or a vector, with a rank that a matrix can take."""
        if len(self.shape(value)) <= 1:
            return value
        return self.emit(relax.op.reshape(value, (1,)))

    def _same(self, one: Sequence[Dim], other: Sequence[Dim]) -> bool:
        return len(one) == len(other) and all(map(self.equal, one, other))


def _equal(one: Array | None, other: Array) -> bool:
    if one is other:
        return True
    return one is not None and one.dtype == other.dtype and np.array_equal(one, other)


def prim(value: Dim) -> Any:
    """Return a size as an expression of TVM's."""
    return tirx.IntImm("int64", value) if isinstance(value, int) else value


def _key(expr: Expr) -> int:
    return int(expr.__chandle__())


def _identifier(name: str) -> str:
    """Make a name for the printed module: letters, digits and underscores."""
    return "".join(c if c.isalnum() and c.isascii() else "_" for c in name)
