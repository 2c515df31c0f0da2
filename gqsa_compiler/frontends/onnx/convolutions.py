"""ONNX convolutions and pooling over one or two spatial axes."""

from __future__ import annotations

from typing import Any

import numpy as np

from gqsa_compiler._tvm import relax
from gqsa_compiler.errors import ModelError
from gqsa_compiler.frontends.onnx.importer import Builder
from gqsa_compiler.frontends.onnx.values import Expr, Node, Value

op = relax.op


def convolution(builder: Builder, node: Node) -> Value:
    """Import a convolution; where windows do not overlap it is a linear layer of patches."""
    x = builder.expr(node.inputs[0], node.names[0])
    weight = node.array(1, "weight")
    assert weight is not None
    spatial = weight.ndim - 2
    if spatial not in (1, 2):
        raise ModelError(f"{node.where}: only convolutions of one or two axes are supported.")
    strides, pads, dilations = _window(node, spatial)
    groups = int(node.attributes.get("group", 1))
    kernel = list(weight.shape[2:])
    if not isinstance(builder.shape(x)[1], int):
        x = builder.fit(x, {1: weight.shape[1] * groups})
    bias = node.array(2, "bias")
    patches = groups == 1 and kernel == strides and not any(pads) and set(dilations) == {1}
    sizes = builder.shape(x)[2:]
    if patches and builder.dtype(x) == "float32" and _divided(sizes, kernel):
        matrix = weight.reshape(len(weight), -1)
        parameter = builder.parameter(node.names[1], np.ascontiguousarray(matrix))
        shift = None if bias is None else builder.parameter(node.names[2], bias)
        return patch_linear(builder, x, parameter, shift, kernel)
    function: Any = op.nn.conv1d if spatial == 1 else op.nn.conv2d
    result = builder.emit(
        function(
            x,
            builder.parameter(node.names[1], weight),
            strides=tuple(strides),
            padding=tuple(pads),
            dilation=tuple(dilations),
            groups=groups,
        ),
        node,
    )
    if bias is None:
        return result
    shape = (1, -1, *(1,) * spatial)
    shift = builder.parameter(f"{node.names[2]}.channels", bias.reshape(shape))
    return builder.emit(op.add(result, shift), node)


def patch_linear(
    builder: Builder, x: Expr, weight: Expr, bias: Expr | None, kernel: list[int]
) -> Expr:
    """Emit a convolution without overlap: x [B, C, H, W] cut into patches, each a row.

    Parameters
    ----------
    weight : float32 [N, C * kernel]
    kernel : list of int
        One or two sizes, which divide those of x.
    """
    sizes = list(builder.shape(x))
    spatial = [size // step for size, step in zip(sizes[2:], kernel, strict=True)]
    if set(kernel) != {1}:
        pairs = [item for pair in zip(spatial, kernel, strict=True) for item in pair]
        x = builder.emit(op.reshape(x, relax.ShapeExpr([*sizes[:2], *pairs])))
        counts = range(2, 2 + 2 * len(kernel))
        x = builder.emit(op.permute_dims(x, [0, *counts[::2], 1, *counts[1::2]]))
        columns = sizes[1] * int(np.prod(kernel))
        x = builder.emit(op.reshape(x, relax.ShapeExpr([sizes[0], *spatial, columns])))
    else:
        x = builder.emit(op.permute_dims(x, [0, *range(2, len(sizes)), 1]))
    result = builder.linear(x, weight, bias)
    rank = len(sizes)
    return builder.emit(op.permute_dims(result, [0, rank - 1, *range(1, rank - 1)]))


def _divided(sizes: tuple[Any, ...], kernel: list[int]) -> bool:
    """Whether a kernel's steps fill an image; a size that varies only goes with a step of 1."""
    return all(
        step == 1 or (isinstance(size, int) and size % step == 0)
        for size, step in zip(sizes, kernel, strict=True)
    )


def _window(node: Node, spatial: int) -> tuple[list[int], list[int], list[int]]:
    """Return strides, padding (all begins, then all ends) and dilations."""
    get = node.attributes.get
    if get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise ModelError(f"{node.where}: padding has to be explicit (auto_pad).")
    ones = [1] * spatial
    return get("strides", ones), get("pads", [0] * 2 * spatial), get("dilations", ones)


def pool(builder: Builder, node: Node) -> Value:
    """Import a maximum or mean over windows of one or two axes."""
    x = builder.expr(node.inputs[0], node.names[0])
    kernel = node.attributes["kernel_shape"]
    spatial = len(kernel)
    if spatial not in (1, 2):
        raise ModelError(f"{node.where}: only pooling over one or two axes is supported.")
    strides, pads, dilations = _window(node, spatial)
    arguments: dict[str, Any] = {
        "pool_size": tuple(kernel),
        "strides": tuple(strides),
        "padding": tuple(pads),
        "dilation": tuple(dilations),
        "ceil_mode": bool(node.attributes.get("ceil_mode", 0)),
    }
    if node.op == "MaxPool":
        largest = op.nn.max_pool1d if spatial == 1 else op.nn.max_pool2d
        return builder.emit(largest(x, **arguments), node)
    mean = op.nn.avg_pool1d if spatial == 1 else op.nn.avg_pool2d
    counted = bool(node.attributes.get("count_include_pad", 0))
    return builder.emit(mean(x, count_include_pad=counted, **arguments), node)


def global_pool(builder: Builder, node: Node) -> Value:
    """Import a mean over all spatial axes."""
    x = builder.expr(node.inputs[0], node.names[0])
    axes = list(range(2, len(builder.shape(x))))
    return builder.emit(op.mean(x, axis=axes, keepdims=True), node)
