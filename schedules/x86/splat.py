"""A few bytes of a record, copied to every lane of a vector and picked from there.

Zero points belong to whole groups. Copied by the load itself and spread by a shuffle of bytes they
cost three instructions a record less than widened and permuted ones do; left to itself, LLVM loads
them into a scalar register, because columns are made of the same bytes, and copies them from there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from gqsa_compiler._tvm import B, T
from gqsa_compiler.schedules.generic.emit import Buffer, Expr, const, constants, pick, vector

SIZES = {2: "w", 4: "d", 8: "q"}
"""Bytes that one instruction copies, and its last letter."""
_NONE = -128  # a byte of a shuffle's pattern that gives 0


def _name(count: int, lanes: int) -> str:
    return f"gqsa_x86_splat{count}_{lanes}"


@contextmanager
def helpers(count: int, lanes: int) -> Iterator[None]:
    """Make what `splat` calls known to the code that the block emits."""
    register, kind = ("v", 8 * count) if lanes == 32 else ("x", 8 * count)
    helper = f"""
define <{2 * lanes} x i8> @{_name(count, lanes)}(ptr %p) {{
  %r = call <{2 * lanes} x i8> asm "vpbroadcast{SIZES[count]} $1, $0", "={register},*m"(ptr elementtype(i{kind}) %p)
  ret <{2 * lanes} x i8> %r
}}
"""  # noqa: E501
    with B.attr(const(0, "int32"), "pragma_import_llvm", helper):
        yield


def splat(buffer: Buffer, at: Expr, count: int, lanes: int) -> Expr:
    """Load `count` bytes, and copy them all over a register of `lanes` 16-bit lanes: int8."""
    return B.call_extern(vector("int8", 2 * lanes), _name(count, lanes), B.address_of(buffer[at]))


def spread(copies: Expr, bytes_: Sequence[int], lanes: int, register: int) -> Expr:
    """Pick one of the copied bytes for every lane, int16.

    Parameters
    ----------
    copies : Expr
        What `splat` has given, for a register of `register` lanes.
    bytes_ : sequence of int
        Which byte; as many for each of the `lanes` lanes, in order.
    """
    instruction = f"llvm.x86.{'avx512.pshuf.b.512' if register == 32 else 'avx2.pshuf.b'}"
    parts = []
    for start in range(0, lanes, register):
        chosen = [bytes_[i * len(bytes_) // lanes] for i in range(start, start + register)]
        pattern = constants([p for byte in chosen for p in (byte, _NONE)], "int8")
        kind = vector("int8", 2 * register)
        picked = B.bind(T.call_llvm_pure_intrin(kind, instruction, copies, pattern))
        parts.append(B.bind(B.reinterpret(vector("int16", register), picked)))
    return parts[0] if len(parts) == 1 else B.bind(pick(parts, range(lanes)))
