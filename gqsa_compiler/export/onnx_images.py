"""Relax's operators on signals and images as ONNX nodes: convolutions, pooling, batch norms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gqsa_compiler._tvm import tirx
from gqsa_compiler.errors import ModelError
from gqsa_compiler.export.onnx_graph import Call, GraphWriter, Rule


def _convolution(graph: GraphWriter, call: Call, inputs: list[str], to: str) -> None:
    attrs = call.attrs
    graph.add(
        "Conv",
        *inputs,
        to=to,
        strides=_integers(attrs.strides),
        pads=_integers(attrs.padding),
        dilations=_integers(attrs.dilation),
        group=int(attrs.groups),
    )


def _batch_norm(graph: GraphWriter, call: Call, inputs: list[str], to: str) -> None:
    """Of inference; of the operator's three results it is the first."""
    if bool(call.attrs.training) or int(call.attrs.axis) != 1:
        raise ModelError("A batch norm that trains, or not over axis 1, cannot be written as ONNX.")
    epsilon = float(call.attrs.epsilon)
    graph.add("BatchNormalization", *inputs, to=f"{to}_part0", epsilon=epsilon)


def _window(call: Call) -> dict[str, Any]:
    """Return the attributes that maxima and means over windows have in common."""
    attrs = call.attrs
    return {
        "kernel_shape": _integers(attrs.pool_size),
        "strides": _integers(attrs.strides),
        "pads": _integers(attrs.padding),
        "dilations": _integers(attrs.dilation),
        "ceil_mode": int(bool(attrs.ceil_mode)),
    }


def _max_pool(graph: GraphWriter, call: Call, inputs: list[str], to: str) -> None:
    graph.add("MaxPool", *inputs, to=to, **_window(call))


def _mean_pool(graph: GraphWriter, call: Call, inputs: list[str], to: str) -> None:
    counted = int(bool(call.attrs.count_include_pad))
    graph.add("AveragePool", *inputs, to=to, count_include_pad=counted, **_window(call))


def _adaptive_mean(graph: GraphWriter, call: Call, inputs: list[str], to: str) -> None:
    """Means of parts of an image: all of it, or parts that share it evenly."""
    given, wanted = list(call.args[0].ty.shape)[2:], _integers(list(call.ty.shape)[2:])
    if set(wanted) == {1}:
        graph.add("GlobalAveragePool", *inputs, to=to)
        return
    kernel = []
    for size, parts in zip(given, wanted, strict=True):
        if not isinstance(size, tirx.IntImm) or int(size) % parts:
            whole = int(size) if isinstance(size, tirx.IntImm) else size
            raise ModelError(f"Pooling an axis of {whole} to {parts} parts is not supported.")
        kernel.append(int(size) // parts)
    graph.add("AveragePool", *inputs, to=to, kernel_shape=kernel, strides=kernel)


def _integers(values: Any) -> list[int]:
    return [int(item) for item in values]


IMAGES: Mapping[str, Rule] = {
    "nn.adaptive_avg_pool1d": _adaptive_mean,
    "nn.adaptive_avg_pool2d": _adaptive_mean,
    "nn.avg_pool1d": _mean_pool,
    "nn.avg_pool2d": _mean_pool,
    "nn.batch_norm": _batch_norm,
    "nn.conv1d": _convolution,
    "nn.conv2d": _convolution,
    "nn.max_pool1d": _max_pool,
    "nn.max_pool2d": _max_pool,
}
"""As `onnx_ops.RULES`."""
