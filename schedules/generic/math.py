"""Elementary functions on float32 scalars and vectors, written so that LLVM keeps them in SIMD.

LLVM turns ``exp`` and ``erf`` of a vector into one call of the C library per lane. These
are polynomials instead, with no table, no branch and no call. Every function takes and returns a
TIR expression of type float32 or float32xL. Call them while a function is being built (by the IR
builder, or inside TVMScript, which is one): shared terms become bindings in front of the statement.
"""

from __future__ import annotations

from collections.abc import Callable

from gqsa_compiler._tvm import B, T
from gqsa_compiler.schedules.generic.emit import Expr, broadcast, const, lanes_of, vector
from gqsa_compiler.schedules.spec import Activation

LOG2_E = 1.4426950408889634
_LN2_HIGH = 0.693359375
_LN2_LOW = -2.12194440e-4
_EXP_MIN = -87.0  # e^x below is still a normal float32
_EXP_MAX = 88.0  # e^x above would need an exponent of 128
# Cephes' exp2f: 2^f on |f| <= 1 / 2.
_EXP2_POLY = (
    1.535336188319500e-4,
    1.339887440266574e-3,
    9.618437357674640e-3,
    5.550332471162809e-2,
    2.402264791363012e-1,
    6.931472028550421e-1,
    1.0,
)
# Eigen's erf: x P(x^2) / Q(x^2) on |x| <= 4.
_ERF_P = (
    -2.72614225801306e-10,
    2.77068142495902e-08,
    -2.10102402082508e-06,
    -5.69250639462346e-05,
    -7.34990630326855e-04,
    -2.95459980854025e-03,
    -1.60960333262415e-02,
)
_ERF_Q = (
    -1.45660718464996e-05,
    -2.13374055278905e-04,
    -1.68282697438203e-03,
    -7.37332916720468e-03,
    -1.42647390514189e-02,
)


def _splat(value: float, like: Expr, dtype: str = "float32") -> Expr:
    """Repeat a number in every lane of `like`."""
    return broadcast(const(value, dtype), lanes_of(like))


def fma(a: Expr, b: Expr, c: Expr) -> Expr:
    """``a * b + c``, rounded once where the target has the instruction.

    TVM emits no fast-math flags, so LLVM may not fuse a plain product and sum.
    """
    return T.call_llvm_pure_intrin(c.ty, "llvm.fmuladd", a, b, c)


def _horner(x: Expr, coefficients: tuple[float, ...]) -> Expr:
    result = _splat(coefficients[0], x)
    for c in coefficients[1:]:
        result = fma(result, x, _splat(c, x))
    return result


def power_of_two(whole: Expr, fraction: Expr) -> Expr:
    """``2^(whole + fraction)`` for a fraction within -1/2 .. 1/2, to 2 parts in ten million.

    `whole` is a float32 without a fraction; the result must be a normal float32.
    """
    floats, integers = (vector(dtype, lanes_of(fraction)) for dtype in ("float32", "int32"))
    exponent = T.shift_left(T.Cast(integers, whole), _splat(23, whole, "int32"))
    bits = T.reinterpret(integers, _horner(fraction, _EXP2_POLY)) + exponent
    return B.bind(T.reinterpret(floats, bits))


def exp(x: Expr) -> Expr:
    """``e^x`` to 2 units in the last place; saturates at e^-87 and e^88, so never 0 or infinite."""
    t = B.bind(T.max(T.min(x, _splat(_EXP_MAX, x)), _splat(_EXP_MIN, x)))
    n = B.bind(T.nearbyint(t * _splat(LOG2_E, x)))
    r = fma(n, _splat(-_LN2_LOW, x), fma(n, _splat(-_LN2_HIGH, x), t))
    return power_of_two(n, B.bind(r * _splat(LOG2_E, x)))


def _times_sigmoid(x: Expr, minus_t: Expr) -> Expr:
    """``x * sigmoid(t)``, which is ``x / (1 + e^-t)``."""
    return x / (_splat(1.0, x) + exp(minus_t))


def silu(x: Expr) -> Expr:
    """``x * sigmoid(x)``."""
    v = B.bind(x)
    return _times_sigmoid(v, _splat(0.0, v) - v)


def erf(x: Expr) -> Expr:
    """The error function, to an absolute error of 4e-7."""
    v = B.bind(T.max(T.min(x, _splat(4.0, x)), _splat(-4.0, x)))
    square = B.bind(v * v)
    return v * _horner(square, _ERF_P) / _horner(square, _ERF_Q)


def gelu(x: Expr) -> Expr:
    """``x / 2 * (1 + erf(x / sqrt(2)))``."""
    v = B.bind(x)
    half = B.bind(_splat(0.5, v) * v)
    return fma(half, erf(v * _splat(0.7071067811865476, v)), half)


def gelu_tanh(x: Expr) -> Expr:
    """GELU's tanh form; ``x / 2 * (1 + tanh(u)) = x * sigmoid(2 u)`` needs one exponential."""
    v = B.bind(x)
    cubic = fma(v * v, _splat(0.044715, v), _splat(1.0, v))
    return _times_sigmoid(v, v * cubic * _splat(-2 * 0.7978845608028654, v))


def relu(x: Expr) -> Expr:
    """``max(x, 0)``."""
    return T.max(x, _splat(0.0, x))


def activate(name: Activation, x: Expr) -> Expr:
    """Apply the activation that `Epilogue.activation` names."""
    functions: dict[Activation, Callable[[Expr], Expr]] = {
        "silu": silu,
        "gelu": gelu,
        "gelu_tanh": gelu_tanh,
        "relu": relu,
    }
    return functions[name](x)
