"""AVX-512's bfloat16 instructions, which TVM has no types for: helpers in LLVM's language."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from gqsa_compiler._tvm import B
from gqsa_compiler.schedules.generic.emit import Expr, const

FEATURE = "avx512bf16"
LANES = 16
"""Sums of a vector; twice as many products."""

# Inlined where they are called. A bfloat16 is the upper half of a float32.
_DOT = "gqsa_x86_dot_bf16"
_ROUND = "gqsa_x86_round_bf16"
_HELPERS = f"""
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
declare <32 x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.512(<16 x float>, <16 x float>)
define <16 x float> @{_DOT}(<16 x float> %sum, <16 x i32> %a, <16 x i32> %b) {{
  %x = bitcast <16 x i32> %a to <32 x bfloat>
  %y = bitcast <16 x i32> %b to <32 x bfloat>
  %r = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float> %sum, <32 x bfloat> %x, <32 x bfloat> %y)
  ret <16 x float> %r
}}
define <16 x i32> @{_ROUND}(<16 x float> %low, <16 x float> %high) {{
  %x = call <32 x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.512(<16 x float> %high, <16 x float> %low)
  %r = bitcast <32 x bfloat> %x to <16 x i32>
  ret <16 x i32> %r
}}
"""  # noqa: E501


@contextmanager
def helpers() -> Iterator[None]:
    """Make the helpers known to the code that the block emits."""
    with B.attr(const(0, "int32"), "pragma_import_llvm", _HELPERS):
        yield


def dot(sums: Expr, a: Expr, b: Expr) -> Expr:
    """Emit ``sums + a[2i] b[2i] + a[2i + 1] b[2i + 1]``, float32x16.

    Parameters
    ----------
    a, b : Expr
        int32x16: two bfloat16 in each, that of the lower index in the low half.
    """
    return B.call_extern("float32x16", _DOT, sums, a, b)


def rounded(low: Expr, high: Expr) -> Expr:
    """Round two vectors of 16 float32 to 32 bfloat16, ties to even: int32x16."""
    return B.call_extern("int32x16", _ROUND, low, high)
