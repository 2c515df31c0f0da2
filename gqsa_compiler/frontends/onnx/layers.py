"""ONNX operators that reduce: linear layers, products, norms, convolutions, pooling."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from gqsa_compiler._tvm import relax
from gqsa_compiler.checkpoint import BSRLayer, validate_layer
from gqsa_compiler.errors import CheckpointError, ModelError
from gqsa_compiler.frontends.onnx.importer import Builder
from gqsa_compiler.frontends.onnx.matmul_nbits import read_matmul_nbits
from gqsa_compiler.frontends.onnx.sparse_op import PARTS, parse_op
from gqsa_compiler.frontends.onnx.values import Expr, Node, Value

op = relax.op


def layer_name(initializer: str) -> str:
    """Return the name of the layer that an initializer is the weight of."""
    return initializer.removesuffix(".weight") or initializer


def matmul(builder: Builder, node: Node) -> Value:
    """Import a product; by a constant matrix it is a linear layer."""
    x, weight = builder.expr(node.inputs[0], node.names[0]), node.inputs[1]
    if isinstance(weight, np.ndarray) and weight.ndim == 2 and builder.dtype(x) == "float32":
        return builder.linear(x, builder.parameter(node.names[1], np.ascontiguousarray(weight.T)))
    return _product(builder, node, x, builder.expr(weight, node.names[1]))


def _product(builder: Builder, node: Node, x: Expr, other: Expr) -> Expr:
    """Emit a product of matrices that share their inner size; 16-bit floats are added up in 32."""
    dtype, axis = builder.dtype(x), -1 if len(builder.shape(other)) == 1 else -2
    mine, its = builder.shape(x)[-1], builder.shape(other)[axis]
    if not isinstance(mine, int):
        x = builder.fit(x, {-1: its})
    elif not isinstance(its, int):
        other = builder.fit(other, {axis: mine})
    wide = "float32" if dtype in ("float16", "bfloat16") else dtype
    result = builder.emit(op.matmul(x, other, out_dtype=wide), node)
    return result if wide == dtype else builder.emit(op.astype(result, dtype))


def gemm(builder: Builder, node: Node) -> Value:
    """Import ``alpha * A B + beta * C``; by a constant matrix it is a linear layer."""
    get = node.attributes.get
    alpha, beta = float(get("alpha", 1.0)), float(get("beta", 1.0))
    x, weight, bias = builder.expr(node.inputs[0], node.names[0]), node.inputs[1], node.input(2)
    if "float" not in builder.dtype(x) and (alpha, beta) != (1.0, 1.0):
        raise ModelError(f"{node.where}: integers are not scaled (alpha, beta).")
    if get("transA", 0):
        x = builder.emit(op.permute_dims(x, [1, 0]))
    if isinstance(weight, np.ndarray) and alpha == 1.0 and builder.dtype(x) == "float32":
        matrix = np.ascontiguousarray(weight if get("transB", 0) else weight.T)
        parameter = builder.parameter(node.names[1], matrix)
        rows = len(matrix)
        vector = isinstance(bias, np.ndarray) and bias.shape in ((rows,), (1, rows))
        if isinstance(bias, np.ndarray) and vector:
            scaled = bias.reshape(-1) * np.float32(beta)
            name = node.names[2] if beta == 1.0 else f"{node.names[2]}.scaled"
            return builder.linear(x, parameter, builder.parameter(name, scaled))
        result = builder.linear(x, parameter)
    else:
        other = builder.expr(weight, node.names[1])
        if get("transB", 0):
            other = builder.emit(op.permute_dims(other, [1, 0]))
        result = _product(builder, node, x, other)
        if alpha != 1.0:
            result = builder.emit(op.multiply(result, relax.const(alpha, builder.dtype(x))))
    if bias is None:
        return result
    extra = builder.expr(bias, node.names[2])
    if beta != 1.0:
        extra = builder.emit(op.multiply(extra, relax.const(beta, builder.dtype(x))))
    return builder.emit(op.add(result, extra), node)


def bsr_linear(builder: Builder, node: Node) -> Value:
    """Import a compressed layer, as it is stored."""
    layer = read_layer(node)
    return builder.linear(builder.expr(node.inputs[0], node.names[0]), builder.layer(layer))


def read_layer(node: Node) -> BSRLayer:
    """Return the layer of a node of our own domain, checked.

    Raises
    ------
    ModelError
        Its tensors do not make a layer of docs/format.md.
    """
    kind = parse_op(node.op)
    if kind is None:
        raise ModelError(f"{node.where}: there is no such operator in this release of gqsa.")
    bits, symmetric = kind
    names = [part for part in PARTS if not (symmetric and part == "qzeros")]
    arrays = {}
    for index, part in enumerate(names, 1):
        array = node.array(index, part)
        if array is None:
            raise ModelError(f"{node.where} lacks its input {part}.")
        arrays[part] = array
    if arrays["shape"].shape != (2,) or arrays["shape"].dtype != np.int64:
        raise ModelError(f"{node.where}: its shape is not int64 [2].")
    layer = BSRLayer(
        name=node.names[1].removesuffix(".indptr"),
        shape=(int(arrays["shape"][0]), int(arrays["shape"][1])),
        group_size=int(node.attributes.get("group_size", 0)),
        indptr=arrays["indptr"],
        indices=arrays["indices"],
        qweight=arrays["qweight"],
        scales=arrays["scales"],
        qzeros=arrays.get("qzeros"),
        bits=bits,
    )
    try:
        validate_layer(layer)
    except CheckpointError as error:
        raise ModelError(f"{node.where}: {error}") from error
    return layer


def matmul_nbits(builder: Builder, node: Node) -> Value:
    """Import ONNX Runtime's linear layer of INT4 blocks."""
    found = read_matmul_nbits(node)
    x = builder.expr(node.inputs[0], node.names[0])
    if builder.dtype(x) != "float32":
        raise ModelError(f"{node.where}: only float32 activations are supported.")
    if isinstance(found, BSRLayer):
        weight = builder.layer(found)
    else:
        name = layer_name(node.names[1])
        builder.dense.append((name, found.reason))
        weight = builder.parameter(f"{name}.weight", found.matrix)
    bias = node.array(5, "bias")
    vector = None if bias is None else builder.parameter(node.names[5], bias.astype(np.float32))
    return builder.linear(x, weight, vector)


def layer_norm(builder: Builder, node: Node) -> Value:
    """Import a layer norm over the last axis."""
    x = builder.expr(node.inputs[0], node.names[0])
    sizes = builder.shape(x)
    if int(node.attributes.get("axis", -1)) % len(sizes) != len(sizes) - 1:
        raise ModelError(f"{node.where}: only norms over the last axis are supported.")
    scale, shift = node.array(1, "scale"), node.array(2, "bias")
    assert scale is not None
    if shift is None:
        shift = np.zeros_like(scale)
        shift_name = f"{node.names[1]}.no_bias"
    else:
        shift_name = node.names[2]
    weights = builder.parameter(node.names[1], scale), builder.parameter(shift_name, shift)
    epsilon = float(node.attributes.get("epsilon", 1e-5))
    return _on_rows(
        builder, x, lambda rows: op.nn.layer_norm(rows, *weights, axes=[-1], epsilon=epsilon)
    )


def rms_norm(builder: Builder, node: Node) -> Value:
    """Import an RMS norm over the last axis."""
    x = builder.expr(node.inputs[0], node.names[0])
    sizes = builder.shape(x)
    scale = node.array(1, "scale")
    if scale is None or int(node.attributes.get("axis", -1)) % len(sizes) != len(sizes) - 1:
        raise ModelError(f"{node.where}: only norms over the last axis, by a constant scale.")
    weight = builder.parameter(node.names[1], scale)
    epsilon = float(node.attributes.get("epsilon", 1e-5))
    return _on_rows(
        builder, x, lambda rows: op.nn.rms_norm(rows, weight, axes=[-1], epsilon=epsilon)
    )


def _on_rows(builder: Builder, x: Expr, compute: Callable[[Expr], Expr]) -> Expr:
    sizes = builder.shape(x)
    if len(sizes) == 1:
        rows = builder.emit(op.reshape(x, (1, sizes[0])))
        return builder.emit(op.reshape(builder.emit(compute(rows)), (sizes[0],)))
    return builder.from_rows(builder.emit(compute(builder.rows(x))), sizes[:-1])


def softmax(builder: Builder, node: Node) -> Value:
    """Import a softmax along one axis."""
    x = builder.expr(node.inputs[0], node.names[0])
    axis = int(node.attributes.get("axis", -1))
    function = op.nn.log_softmax if node.op == "LogSoftmax" else op.nn.softmax
    return builder.emit(function(x, axis=axis), node)


_REDUCTIONS: Mapping[str, Callable[..., Expr]] = {
    "ReduceSum": op.sum,
    "ReduceMean": op.mean,
    "ReduceMax": op.max,
    "ReduceMin": op.min,
    "ReduceProd": op.prod,
}


def reduce(builder: Builder, node: Node) -> Value:
    """Import a reduction over axes."""
    x = builder.expr(node.inputs[0], node.names[0])
    keep, axes = bool(node.attributes.get("keepdims", 1)), node.axes(1) or None
    if builder.dtype(x) == "bool":
        raise ModelError(f"{node.where}: reductions of truth values are not supported.")
    nothing = axes is None and bool(node.attributes.get("noop_with_empty_axes", 0))
    if node.op in ("ReduceL2", "ReduceSumSquare"):
        total = builder.emit(op.multiply(x, x))
        if not nothing:
            total = builder.emit(op.sum(total, axis=axes, keepdims=keep), node)
        return builder.emit(op.sqrt(total)) if node.op == "ReduceL2" else total
    if nothing:
        return x
    return builder.emit(_REDUCTIONS[node.op](x, axis=axes, keepdims=keep), node)


def argmax(builder: Builder, node: Node) -> Value:
    """Import the place of the largest value."""
    if node.attributes.get("select_last_index", 0):
        raise ModelError(f"{node.where}: only the first of several largest values is found.")
    x = builder.expr(node.inputs[0], node.names[0])
    axis, keep = int(node.attributes.get("axis", 0)), bool(node.attributes.get("keepdims", 1))
    return builder.emit(op.argmax(x, axis=axis, keepdims=keep), node)


def cumsum(builder: Builder, node: Node) -> Value:
    """Import a running sum."""
    if node.attributes.get("reverse", 0):
        raise ModelError(f"{node.where}: running sums from the end are not supported.")
    x, axis = builder.expr(node.inputs[0], node.names[0]), node.array(1, "axis")
    assert axis is not None
    strict = bool(node.attributes.get("exclusive", 0))
    return builder.emit(op.cumsum(x, axis=int(axis.reshape(-1)[0]), exclusive=strict), node)


def batch_norm(builder: Builder, node: Node) -> Value:
    """Import a batch norm of inference: a scale and a shift for each channel."""
    if node.attributes.get("training_mode", 0):
        raise ModelError(f"{node.where}: training_mode is set; export the model for inference.")
    x = builder.expr(node.inputs[0], node.names[0])
    parts = [node.array(index, "statistics") for index in range(1, 5)]
    scale, shift, mean, variance = (np.asarray(part, np.float64) for part in parts)
    factor = scale / np.sqrt(variance + float(node.attributes.get("epsilon", 1e-5)))
    sizes = (-1, *(1,) * (len(builder.shape(x)) - 2))
    arrays = [factor.reshape(sizes), (shift - mean * factor).reshape(sizes)]
    factor_var, shift_var = (
        builder.parameter(f"{node.names[1]}.{what}", array.astype(np.float32))
        for what, array in zip(("factor", "shift"), arrays, strict=True)
    )
    return builder.emit(op.add(builder.emit(op.multiply(x, factor_var)), shift_var), node)
