"""ONNX operators that compute value by value."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce

import numpy as np
from onnx import TensorProto, helper

from gqsa_compiler._tvm import relax
from gqsa_compiler.errors import ModelError
from gqsa_compiler.frontends.onnx.importer import Builder
from gqsa_compiler.frontends.onnx.values import Expr, Node, Value

op = relax.op


def _const(value: float, like: Expr) -> Expr:
    return relax.const(value, str(like.ty.dtype))


def _hard_sigmoid(x: Expr, slope: float, shift: float) -> Expr:
    line = op.add(op.multiply(x, _const(slope, x)), _const(shift, x))
    return op.clip(line, 0.0, 1.0)


def _softplus(x: Expr) -> Expr:
    """Emit log(1 + exp(x)), of which exp alone overflows where the result does not."""
    rest = op.log(op.add(op.exp(op.negative(op.abs(x))), _const(1, x)))
    return op.add(op.maximum(x, _const(0, x)), rest)


UNARY: Mapping[str, Callable[[Expr], Expr]] = {
    "Abs": op.abs,
    "Ceil": op.ceil,
    "Cos": op.cos,
    "Erf": op.erf,
    "Exp": op.exp,
    "Floor": op.floor,
    "HardSwish": lambda x: op.multiply(x, _hard_sigmoid(x, 1 / 6, 0.5)),
    "Identity": lambda x: x,
    "IsNaN": op.isnan,
    "Log": op.log,
    "Mish": lambda x: op.multiply(x, op.tanh(_softplus(x))),
    "Neg": op.negative,
    "Not": op.logical_not,
    "Reciprocal": lambda x: op.divide(_const(1, x), x),
    "Relu": op.nn.relu,
    "Round": op.round,
    "Sigmoid": op.sigmoid,
    "Sign": op.sign,
    "Sin": op.sin,
    "Softplus": lambda x: _softplus(x),
    "Sqrt": op.sqrt,
    "Tanh": op.tanh,
}
BINARY: Mapping[str, Callable[[Expr, Expr], Expr]] = {
    "Add": op.add,
    "And": op.logical_and,
    "BitwiseAnd": op.bitwise_and,
    "BitwiseOr": op.bitwise_or,
    "Equal": op.equal,
    "Greater": op.greater,
    "GreaterOrEqual": op.greater_equal,
    "Less": op.less,
    "LessOrEqual": op.less_equal,
    "Mul": op.multiply,
    "Or": op.logical_or,
    "Sub": op.subtract,
    "Xor": op.logical_xor,
}
VARIADIC: Mapping[str, Callable[[Expr, Expr], Expr]] = {
    "Max": op.maximum,
    "Min": op.minimum,
    "Sum": op.add,
}


def unary(builder: Builder, node: Node) -> Value:
    """Import an operator of one tensor."""
    x = builder.expr(node.inputs[0], node.names[0])
    return builder.elementwise(UNARY[node.op], node, x)


def binary(builder: Builder, node: Node) -> Value:
    """Import an operator of two tensors that broadcast."""
    one, other = _operands(builder, node)
    return builder.elementwise(BINARY[node.op], node, one, other)


def power(builder: Builder, node: Node) -> Value:
    """Import a power of floats."""
    one, other = _operands(builder, node)
    if "float" not in builder.dtype(one):
        raise ModelError(f"{node.where}: powers of {builder.dtype(one)} are not supported.")
    if builder.dtype(other) != builder.dtype(one):
        other = builder.emit(op.astype(other, builder.dtype(one)), node)
    return builder.elementwise(op.power, node, one, other)


def is_infinite(builder: Builder, node: Node) -> Value:
    """Import a search for infinities of one sign or of both."""
    x = builder.expr(node.inputs[0], node.names[0])
    signs = [
        sign
        for sign, name in ((1, "detect_positive"), (-1, "detect_negative"))
        if node.attributes.get(name, 1)
    ]
    if len(signs) == 2:
        return builder.elementwise(op.isinf, node, x)
    end = signs[0] * np.inf if signs else np.nan  # what nothing equals
    return builder.elementwise(lambda value: op.equal(value, _const(end, value)), node, x)


def divide(builder: Builder, node: Node) -> Value:
    """Import a division; of integers it cuts towards zero, as in C."""
    one, other = _operands(builder, node)
    dtype, traps = builder.dtype(one), _traps(node)

    def whole(one: Expr, other: Expr) -> Expr:
        divisor = _nonzero(other) if traps else other
        quotient = op.floor_divide(one, divisor)
        if dtype.startswith("u"):
            return quotient
        zero = _const(0, one)
        rest = op.not_equal(op.subtract(one, op.multiply(quotient, divisor)), zero)
        up = op.logical_and(rest, op.less(quotient, zero))
        quotient = op.add(quotient, op.astype(up, dtype))
        if not traps:
            return quotient
        return op.where(op.equal(other, _const(-1, other)), op.negative(quotient), quotient)

    return builder.elementwise(whole if "int" in dtype else op.divide, node, one, other)


def modulo(builder: Builder, node: Node) -> Value:
    """Import a remainder with the divisor's sign, or with ``fmod`` with that of what is divided."""
    one, other = _operands(builder, node)
    traps = "int" in builder.dtype(one) and _traps(node)
    remainder = op.mod if node.attributes.get("fmod", 0) else op.floor_mod
    return builder.elementwise(
        lambda one, other: remainder(one, _nonzero(other) if traps else other), node, one, other
    )


def _traps(node: Node) -> bool:
    """Whether a division may end the process: ONNX leaves that by 0 open, and a CPU traps.

    It also does where the smallest number is divided by -1.
    """
    known = node.inputs[1]
    return not (isinstance(known, np.ndarray) and known.all() and (known != -1).all())


def _nonzero(divisor: Expr) -> Expr:
    """Emit divisors with 1 for each 0 and each -1."""
    traps = op.equal(divisor, _const(0, divisor))
    if not str(divisor.ty.dtype).startswith("u"):
        traps = op.logical_or(traps, op.equal(divisor, _const(-1, divisor)))
    return op.where(traps, _const(1, divisor), divisor)


def variadic(builder: Builder, node: Node) -> Value:
    """Import an operator of any number of tensors."""
    operands = [
        builder.expr(value, name) for value, name in zip(node.inputs, node.names, strict=True)
    ]
    combine = VARIADIC[node.op]
    return reduce(lambda a, b: builder.elementwise(combine, node, a, b), operands)


def dropout(builder: Builder, node: Node) -> Value:
    """Import a dropout: outside training nothing is dropped."""
    training = node.array(2, "training_mode")
    if training is not None and training.any():
        raise ModelError(f"{node.where}: training_mode is set; export the model for inference.")
    return builder.expr(node.inputs[0], node.names[0])


def where(builder: Builder, node: Node) -> Value:
    """Import a choice between two tensors."""
    operands = [builder.expr(node.inputs[i], node.names[i]) for i in range(3)]
    return builder.emit(op.where(*operands), node)


def cast(builder: Builder, node: Node) -> Value:
    """Import a conversion."""
    x = builder.expr(node.inputs[0], node.names[0])
    dtype = tensor_dtype(int(node.attributes["to"]), node.where)
    if dtype == builder.dtype(x):
        return x
    return builder.elementwise(lambda value: op.astype(value, dtype), node, x)


def clip(builder: Builder, node: Node) -> Value:
    """Import a clamp between two constants."""
    x = builder.expr(node.inputs[0], node.names[0])
    ends = []
    for index, name, default in ((1, "min", -np.inf), (2, "max", np.inf)):
        given = node.array(index, name)
        ends.append(float(node.attributes.get(name, default) if given is None else given))
    low, high = ends

    def clamp(value: Expr) -> Expr:
        least, most = (_const(end, value) if np.isfinite(end) else None for end in (low, high))
        value = value if least is None else op.maximum(value, least)
        return value if most is None else op.minimum(value, most)

    return builder.elementwise(clamp, node, x)


def gelu(builder: Builder, node: Node) -> Value:
    """Import a GELU, exact or with tanh."""
    x = builder.expr(node.inputs[0], node.names[0])
    kind = str(node.attributes.get("approximate", "none"))
    return builder.elementwise(op.nn.gelu_tanh if kind == "tanh" else op.nn.gelu, node, x)


def swish(builder: Builder, node: Node) -> Value:
    """Import a SiLU."""
    alpha = float(node.attributes.get("alpha", 1.0))
    if alpha != 1.0:
        raise ModelError(f"{node.where}: only alpha = 1 is supported, not {alpha}.")
    return builder.elementwise(op.nn.silu, node, builder.expr(node.inputs[0], node.names[0]))


def leaky_relu(builder: Builder, node: Node) -> Value:
    """Import a leaky ReLU."""
    slope = float(node.attributes.get("alpha", 0.01))
    x = builder.expr(node.inputs[0], node.names[0])
    return builder.elementwise(lambda value: op.nn.leakyrelu(value, slope), node, x)


def elu(builder: Builder, node: Node) -> Value:
    """Import an ELU."""
    alpha = float(node.attributes.get("alpha", 1.0))

    def compute(x: Expr) -> Expr:
        zero = _const(0, x)
        low = op.subtract(op.exp(op.minimum(x, zero)), _const(1, x))
        return op.add(op.maximum(x, zero), op.multiply(low, _const(alpha, x)))

    return builder.elementwise(compute, node, builder.expr(node.inputs[0], node.names[0]))


def hard_sigmoid(builder: Builder, node: Node) -> Value:
    """Import a piecewise linear sigmoid."""
    slope = float(node.attributes.get("alpha", 0.2))
    shift = float(node.attributes.get("beta", 0.5))
    x = builder.expr(node.inputs[0], node.names[0])
    return builder.elementwise(lambda value: _hard_sigmoid(value, slope, shift), node, x)


def quantize(builder: Builder, node: Node) -> Value:
    """Import a rounding to 8-bit codes with one scale and zero point for the whole tensor."""
    x = builder.expr(node.inputs[0], node.names[0])
    scale, zero, dtype = _scheme(node)

    def compute(value: Expr) -> Expr:
        codes = op.add(op.round(op.divide(value, _const(scale, value))), _const(zero, value))
        info = np.iinfo(dtype)
        clipped = op.minimum(op.maximum(codes, _const(info.min, value)), _const(info.max, value))
        return op.astype(clipped, dtype)

    return builder.elementwise(compute, node, x)


def dequantize(builder: Builder, node: Node) -> Value:
    """Import the decoding of 8-bit codes that the graph has computed."""
    x = builder.expr(node.inputs[0], node.names[0])
    scale, zero, _ = _scheme(node)

    def compute(value: Expr) -> Expr:
        codes = op.astype(value, "float32")
        distance = op.subtract(codes, relax.const(float(zero), "float32"))
        return op.multiply(distance, relax.const(scale, "float32"))

    return builder.elementwise(compute, node, x)


def _scheme(node: Node) -> tuple[float, int, str]:
    scale, zero = node.array(1, "scale"), node.array(2, "zero point")
    if scale is None or scale.size != 1 or (zero is not None and zero.size != 1):
        raise ModelError(
            f"{node.where}: activations need one scale and zero point for the whole tensor."
        )
    said = int(node.attributes.get("output_dtype", 0)) or TensorProto.UINT8
    dtype = tensor_dtype(said, node.where) if zero is None else str(zero.dtype)
    if dtype not in ("int8", "uint8"):
        raise ModelError(f"{node.where}: activations of {dtype} are not supported, only 8 bits.")
    return float(scale.reshape(())), 0 if zero is None else int(zero.reshape(())), dtype


def _operands(builder: Builder, node: Node) -> tuple[Expr, Expr]:
    return (
        builder.expr(node.inputs[0], node.names[0]),
        builder.expr(node.inputs[1], node.names[1]),
    )


def tensor_dtype(code: int, where: str) -> str:
    """Return TVM's name of an ONNX dtype.

    Raises
    ------
    ModelError
        It is none that a graph can compute with.
    """
    if code == TensorProto.BFLOAT16:
        return "bfloat16"
    try:
        name = str(np.dtype(helper.tensor_dtype_to_np_dtype(code)))
    except (KeyError, TypeError):
        name = "unknown"
    if name not in _DTYPES:
        raise ModelError(f"{where}: tensors of ONNX dtype {code} ({name}) are not supported.")
    return name


_DTYPES = {
    "bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64",
    "float16", "float32", "float64",
}  # fmt: skip
