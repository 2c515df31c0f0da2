"""Arm's bfloat16 instructions, which TVM has no types for: helpers in LLVM's language."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from gqsa_compiler._tvm import B
from gqsa_compiler.schedules.generic.emit import Expr, const

FEATURE = "bf16"

# Inlined where they are called. A bfloat16 is the upper half of a float32.
_MULTIPLY = "gqsa_arm_bfmmla"
_ROUND = "gqsa_arm_round_bf16"
_HELPERS = f"""
declare <4 x float> @llvm.aarch64.neon.bfmmla(<4 x float>, <8 x bfloat>, <8 x bfloat>)
define <4 x float> @{_MULTIPLY}(<4 x float> %sums, <4 x i32> %a, <4 x i32> %b) {{
  %x = bitcast <4 x i32> %a to <8 x bfloat>
  %y = bitcast <4 x i32> %b to <8 x bfloat>
  %r = call <4 x float> @llvm.aarch64.neon.bfmmla(<4 x float> %sums, <8 x bfloat> %x, <8 x bfloat> %y)
  ret <4 x float> %r
}}
define <2 x i32> @{_ROUND}(<4 x float> %value) {{
  %x = fptrunc <4 x float> %value to <4 x bfloat>
  %r = bitcast <4 x bfloat> %x to <2 x i32>
  ret <2 x i32> %r
}}
"""  # noqa: E501


@contextmanager
def helpers() -> Iterator[None]:
    """Make the helpers known to the code that the block emits."""
    with B.attr(const(0, "int32"), "pragma_import_llvm", _HELPERS):
        yield


def multiply(sums: Expr, a: Expr, b: Expr) -> Expr:
    """Add the products of two 2 x 4 matrices, the second transposed, to a 2 x 2 one.

    Parameters
    ----------
    sums : Expr
        float32x4, row by row.
    a, b : Expr
        int32x4: eight bfloat16, row by row.
    """
    return B.bind(B.call_extern("float32x4", _MULTIPLY, sums, a, b))


def rounded(value: Expr) -> Expr:
    """Round a float32x4 to bfloat16, ties to even: int32x2."""
    return B.bind(B.call_extern("int32x2", _ROUND, value))
